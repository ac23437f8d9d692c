"""Prometheus metrics: one registry per app, so that several apps can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serval.server.errors import CLIENT_GONE

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# name in /stats -> (kind, metric, help)
ENGINE_METRICS: dict[str, tuple[str, str, str]] = {
    "running": ("gauge", "serval_requests_running", "Sequences being computed."),
    "waiting": ("gauge", "serval_requests_waiting", "Sequences waiting for room in the batch."),
    "cache_usage": ("gauge", "serval_cache_usage_ratio", "Share of cache blocks in use, 0 to 1."),
    "cache_blocks": ("gauge", "serval_cache_blocks", "Cache blocks in the pool."),
    "cache_bytes": ("gauge", "serval_cache_bytes", "Bytes of the cache's storage."),
    "preemptions": ("counter", "serval_preemptions", "Sequences pushed out for lack of blocks."),
    "prefix_hit_tokens": (
        "counter",
        "serval_prefix_cache_hit_tokens",
        "Prompt tokens found in the cache.",
    ),
    "prefix_query_tokens": (
        "counter",
        "serval_prefix_cache_query_tokens",
        "Prompt tokens looked up in the cache.",
    ),
}


class Metrics:
    """What the server counts itself, beside the engine's own numbers (`stats`)."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(_EngineCollector(stats))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.generated_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.finished = Counter(
            "serval_sequences_finished",
            "Sequences finished, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.http = Counter(
            "serval_http_requests",
            "HTTP requests by route and status (499: the client went away).",
            ["route", "status"],
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to first token.", _FIRST_TOKEN
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between tokens of one sequence.", _BETWEEN
        )
        self.duration = self._histogram(
            "request_duration_seconds", "From arrival to the end of the answer.", _WHOLE
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"serval_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"serval_{name}", text, buckets=buckets, registry=self.registry)


class _EngineCollector(Collector):
    """Reads the engine's statistics when somebody scrapes, not before."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for key, (kind, name, text) in ENGINE_METRICS.items():
            if key not in stats:
                continue
            family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
            yield family(name, text, value=float(stats[key]))

    def describe(self) -> Iterator[Metric]:
        return iter(())


class CountRequests:
    """ASGI layer that counts every answer, by route template and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, gone, finished = 500, False, False

        async def listen() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def watch(message: Message) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body":
                finished = not message.get("more_body", False)

        try:
            await self.app(scope, listen, watch)
        finally:
            if gone and not finished:
                status = CLIENT_GONE
            route = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.http.labels(route, str(status)).inc()
