"""`run(ServeOptions)` in a process of its own: start-up, drain, second signal, bad options."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from serval.errors import ConfigError, ServalError
from serval.kernels import jit
from serval.server.serve import ServeOptions, build_app, default_name, run

PROGRAM = (
    "import json, sys\n"
    "from serval.server.serve import ServeOptions, run\n"
    "sys.exit(run(ServeOptions(**json.loads(sys.argv[1]))))\n"
)
Start = Callable[..., tuple["subprocess.Popen[str]", str, float]]


@pytest.fixture
def start(model_dir: Path) -> Iterator[Start]:
    """Start a server process; returns (process, url, seconds until ready as it says)."""
    processes = []

    def begin(**options: object) -> tuple[subprocess.Popen[str], str, float]:
        chosen = {"model": str(model_dir), "port": 0, "cache_bytes": 2**20, **options}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(chosen)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+) .*ready in ([\d.]+) s", line)
        assert found, line
        return process, found[1], float(found[2])

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def stream_in_thread(url: str, tokens: int) -> tuple[threading.Thread, list[str]]:
    """Read a stream in the background; returns after its first event arrived."""
    lines: list[str] = []
    first = threading.Event()
    body = {"prompt": "cat", "max_tokens": tokens, "ignore_eos": True, "stream": True, "n": 4}

    def read() -> None:
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                first.set()
        first.set()

    thread = threading.Thread(target=read)
    thread.start()
    first.wait(30)
    return thread, lines


def test_a_start_builds_every_kernel(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[bool] = []
    monkeypatch.setattr(jit, "build_all", lambda: built.append(True))
    monkeypatch.delenv("SERVAL_KERNELS", raising=False)
    options = ServeOptions(str(model_dir), cache_bytes=2**20)
    build_app(options).state.serval.backend.close()
    assert built == [True]
    monkeypatch.setenv("SERVAL_KERNELS", "reference")
    build_app(options).state.serval.backend.close()
    assert built == [True]


def test_drain_finishes_running_requests(start: Start) -> None:
    process, url, seconds = start(served_model_name=["mine"])
    assert seconds < 20  # the five seconds are measured on a quiet machine, not here
    assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
    thread, lines = stream_in_thread(url, 240)
    process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert process.wait(30) == 0
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons.count("length") == 4
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_drain_gives_up_in_time(start: Start) -> None:
    process, url, _ = start(drain_seconds=0.0)
    thread, lines = stream_in_thread(url, 250)
    process.send_signal(signal.SIGTERM)
    thread.join(30)
    assert process.wait(30) == 0
    text = "\n".join(lines)
    assert "shut down before" in text
    assert "data: [DONE]" in text


def test_second_signal_stops_at_once(start: Start) -> None:
    process, url, _ = start(drain_seconds=60.0)
    host, port = url.removeprefix("http://").split(":")
    idle = socket.create_connection((host, int(port)), timeout=30)  # holds the drain up
    idle.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
        b"Expect: 100-continue\r\n\r\n"
    )
    assert b"100 Continue" in idle.recv(1000)  # the request runs and waits for its body
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    idle.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "--port"),
        ({"log_level": "loud"}, "--log-level"),
        ({"max_in_flight": 0}, "--max-in-flight"),
        ({"api_key": [" "]}, "--api-key"),
        ({"drain_seconds": -1.0}, "--drain-seconds"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServeOptions("model", **options)  # type: ignore[arg-type]


def test_wrong_files_and_addresses(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="chat-template"):
        build_app(ServeOptions(str(model_dir), chat_template=tmp_path / "none.jinja"))
    with pytest.raises(ServalError):
        build_app(ServeOptions(str(tmp_path)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="another --port"):
            run(ServeOptions(str(model_dir), port=taken.getsockname()[1]))


def test_default_name(tmp_path: Path) -> None:
    assert default_name(str(tmp_path)) == tmp_path.name
    assert default_name("org/model") == "org/model"
