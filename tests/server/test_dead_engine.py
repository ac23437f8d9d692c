"""An engine whose thread has died is told of: by /health, by every request, to every listener."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from serval.server.app import create_app
from serval.server.engine import EngineBackend
from serval.server.state import AppOptions
from tests.server.live import LiveServer


class Crash(BaseException):
    """What no handler expects."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_answers_503(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EngineBackend.load(str(model_dir), cache_bytes=2**20, max_sequences=4)
    engine = backend.llm.engine
    step, crash = engine.step, threading.Event()
    first = threading.Event()

    def crashing() -> object:
        if crash.is_set():
            raise Crash
        first.set()
        return step()

    monkeypatch.setattr(engine, "step", crashing)
    body = {"model": "tiny", "prompt": "a cat", "max_tokens": 200, "ignore_eos": True}
    with (
        LiveServer(create_app(backend, AppOptions(model_names=("tiny",))), backend) as live,
        httpx.Client(base_url=live.url, timeout=30) as client,
    ):
        assert client.get("/health").status_code == 200
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            assert first.wait(20)
            crash.set()
            text = answer.read().decode()
        assert '"code":"engine_stopped"' in text.replace(" ", "")
        backend.engine._thread.join(20)
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["error"]["code"] == "engine_stopped"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
            refused = client.post(path, json=asked)
            assert refused.status_code == 503
            error = refused.json()["error"]
            assert error["type"] == "service_unavailable_error"
            assert "restart" in error["message"]
        assert client.get("/v1/models").status_code == 200
        assert not backend.live
        assert live.app.state.serval.admission.in_flight == 0
