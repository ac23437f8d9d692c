"""Drawn requests against the server's own OpenAPI description: no 5xx, answers as described."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from serval.server.app import create_app
from serval.server.engine import EngineBackend
from serval.server.state import AppOptions
from tests.server.live import LiveServer

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def short(model_dir: Path) -> Iterator[LiveServer]:
    """A server whose answers are short, so that many requests fit into a test."""
    backend = EngineBackend.load(str(model_dir), cache_bytes=2**20, max_sequences=16)
    options = AppOptions(model_names=("tiny",), max_in_flight=64, max_tokens=4)
    with LiveServer(create_app(backend, options), backend) as live:
        yield live
        live.check_integrity()


OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def api(short: LiveServer) -> Any:
    return schemathesis.openapi.from_url(short.url + "/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_drawn_requests(api: Any, method: str, path: str, mode: Any) -> None:
    # Valid JSON can still be a wrong request (a token outside the vocabulary, a grammar without
    # words), so acceptance of all valid data is not asked for.
    excluded = [
        check
        for check in schemathesis.checks.CHECKS.get_all()
        if check.__name__ == "positive_data_acceptance"
    ]
    body = method == "POST"

    @given(api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=30 if body else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded)

    try:
        run()
    except Unsatisfiable:
        pytest.skip("nothing about this operation can be violated")


def test_every_operation_is_drawn(short: LiveServer) -> None:
    paths = short.app.openapi()["paths"]
    described = {(m.upper(), path) for path, methods in paths.items() for m in methods}
    assert described == set(OPERATIONS)


def test_the_description_is_openai_shaped(short: LiveServer) -> None:
    description = short.app.openapi()
    assert "/v1/chat/completions" in description["paths"]
    for operations in description["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
