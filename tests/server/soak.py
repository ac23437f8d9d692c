"""Clients that behave, leave, stall and send garbage, against one server, for a while.

`python -m tests.server.soak --url http://127.0.0.1:8000 --seconds 120 --clients 64` prints a
summary of any running server; `test_soak.py` runs it against a server in its own process and looks
at blocks and memory as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
GARBAGE = (
    b"{",
    b"",
    b"\xff\xfe",
    b"null",
    b"[" * 5000,
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "model": "nobody"}',
    b'{"prompt": "a", "nonsense": 1}',
    b'{"prompt": [1, 999999]}',
    b'{"prompt": "a\\ud800"}',
    b'{"messages": [{"role": "wizard"}]}',
    b'{"prompt": "a", "logit_bias": {"x": 1}}',
    b'{"prompt": "a", "structured_outputs": {"regex": "("}}',
)


@dataclass
class Report:
    """Answers by status, and what else happened."""

    statuses: Counter[int] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str) -> None:
        self.events["failure"] += 1
        if len(self.failures) < 20:
            self.failures.append(what)

    @property
    def server_errors(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)


def body(rng: random.Random, stream: bool) -> dict[str, Any]:
    """A valid completion request of varied length, sampling and constraint."""
    words = ["cat", "serval", "jump", "Africa", "def", "mean", "🐈", "naïve"]
    request: dict[str, Any] = {
        "prompt": "The serval " + " ".join(rng.choices(words, k=rng.randrange(1, 30))),
        "max_tokens": rng.randrange(1, 60),
        "temperature": rng.choice((0, 0.7, 1.5)),
        "stream": stream,
        "n": rng.choice((1, 1, 1, 2, 4)),
    }
    extra = rng.randrange(8)
    if extra == 0:
        request["structured_outputs"] = {"regex": "[a-z]{1,20}"}
    elif extra == 1:
        request["logprobs"] = 5
    elif extra == 2:
        request["stop"] = ["e", "a"]
    elif extra == 3:
        request["repetition_penalty"] = 1.2
    return request


class Client:
    """One client that picks a behaviour at random until the time is up."""

    def __init__(self, url: str, seed: int, report: Report) -> None:
        self.url, self.rng, self.report = url, random.Random(seed), report
        self.behaviours = (
            (6, self.whole),
            (6, self.stream),
            (6, self.leave_stream),
            (4, self.leave_whole),
            (4, self.garbage),
            (2, self.broken_http),
            (2, self.half_body),
            (1, self.too_large),
            (2, self.look_around),
            (1, self.stall),
        )

    async def run(self, until: float) -> None:
        weights, actions = zip(*self.behaviours, strict=True)
        timeout = httpx.Timeout(60.0)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=timeout, verify=False, trust_env=False
        ) as self.http:
            while time.monotonic() < until:
                action = self.rng.choices(actions, weights)[0]
                self.report.events[action.__name__] += 1
                try:
                    await action()
                except Exception as error:
                    self.report.fail(f"{action.__name__}: {type(error).__name__}: {error}")

    def note(self, answer: httpx.Response, *allowed: int) -> None:
        self.report.statuses[answer.status_code] += 1
        if answer.status_code not in allowed:
            self.report.fail(f"status {answer.status_code}, expected {allowed}")

    async def whole(self) -> None:
        answer = await self.http.post("/v1/completions", json=body(self.rng, False))
        self.note(answer, 200, 429)

    async def stream(self) -> None:
        request = body(self.rng, True)
        async with self.http.stream("POST", "/v1/completions", json=request) as answer:
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
        self.note(answer, 200, 429)
        if answer.status_code == 200 and last != "data: [DONE]":
            self.report.fail(f"a stream ended with {last[:80]!r}")

    async def leave_stream(self) -> None:
        request = body(self.rng, True)
        left = self.rng.randrange(1, 6)
        async with self.http.stream("POST", "/v1/completions", json=request) as answer:
            async for _ in answer.aiter_bytes():
                left -= 1
                if left <= 0:
                    break
        self.note(answer, 200, 429)

    async def leave_whole(self) -> None:
        wait = self.rng.uniform(0.0, 0.3)
        request = {**body(self.rng, False), "max_tokens": 150}
        work = asyncio.create_task(self.http.post("/v1/completions", json=request))
        await asyncio.wait({work}, timeout=wait)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    async def garbage(self) -> None:
        path = self.rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize"))
        data = self.rng.choice(GARBAGE)
        answer = await self.http.post(path, content=data, headers=JSON)
        self.note(answer, 400, 404, 429)
        json.loads(answer.content)["error"]["message"]

    async def broken_http(self) -> None:
        data = self.rng.randbytes(self.rng.randrange(1, 200))
        await self.raw(data, self.rng.uniform(0, 0.2))

    async def half_body(self) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"
        await self.raw(head, self.rng.uniform(0, 0.2))

    async def stall(self) -> None:
        """Ask for a lot, read nothing, hang up."""
        data = json.dumps({**body(self.rng, True), "max_tokens": 150, "logprobs": 20}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        await self.raw(head.encode() + b"Content-Type: application/json\r\n\r\n" + data, 1.0)

    async def raw(self, data: bytes, wait: float) -> None:
        host, port = self.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=2**12)
        try:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(wait)
        finally:
            writer.transport.abort()

    async def too_large(self) -> None:
        answer = await self.http.post("/v1/completions", content=b"x" * 2**21, headers=JSON)
        self.note(answer, 413)

    async def look_around(self) -> None:
        for path in ("/", "/health", "/metrics", "/stats", "/v1/models"):
            self.note(await self.http.get(path), 200)
        self.note(await self.http.get("/nothing"), 404)


async def soak(url: str, seconds: float, clients: int, seed: int = 0) -> Report:
    """Run `clients` clients for `seconds`; the report names everything unexpected."""
    report = Report()
    until = time.monotonic() + seconds
    await asyncio.gather(*(Client(url, seed * 1000 + i, report).run(until) for i in range(clients)))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    chosen = parser.parse_args()
    report = asyncio.run(soak(chosen.url, chosen.seconds, chosen.clients))
    print("answers:", dict(sorted(report.statuses.items())))
    print("actions:", dict(report.events))
    print("unexpected:", report.failures or "nothing")


if __name__ == "__main__":
    main()
