"""Clients that leave, in every phase, and what must not be left behind."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from serval.server.app import create_app
from serval.server.state import AppOptions
from tests.server.live import LiveServer
from tests.server.scripted import ScriptedBackend

LONG = {"prompt": "The serval", "max_tokens": 200, "ignore_eos": True}


def raw_request(server: LiveServer, body: dict[str, Any]) -> socket.socket:
    """Send a completion request over a socket of our own."""
    host, port = server.listener.getsockname()
    connection = socket.create_connection((host, port))
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def wait_until_running(server: LiveServer) -> None:
    deadline = time.monotonic() + 5
    while not server.backend.live and time.monotonic() < deadline:
        time.sleep(0.001)
    assert server.backend.live


def finished(server: LiveServer, reason: str) -> float:
    registry = server.app.state.serval.metrics.registry
    labels = {"reason": reason}
    return registry.get_sample_value("serval_sequences_finished_total", labels) or 0.0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_frees_blocks_at_once(server: LiveServer, stream: bool, n: int) -> None:
    complete = finished(server, "length")
    connection = raw_request(server, {**LONG, "stream": stream, "n": n})
    wait_until_running(server)
    if stream:
        connection.recv(200)
    connection.close()
    began = time.monotonic()
    server.wait_idle(2.0)
    assert time.monotonic() - began < 1.0
    assert finished(server, "length") == complete, "the answer was generated to its end"
    server.check_integrity()


def test_leaving_with_many_prompts(server: LiveServer) -> None:
    body = {**LONG, "prompt": [f"cat {i}" for i in range(12)], "stream": True}
    connection = raw_request(server, body)
    wait_until_running(server)
    connection.close()
    server.check_integrity()


def test_leaving_before_the_body_is_complete(server: LiveServer) -> None:
    host, port = server.listener.getsockname()
    for part in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 90\r\n\r\n{"):
        connection = socket.create_connection((host, port))
        connection.sendall(part)
        connection.close()
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_reader_that_stalls_holds_nobody_up(server: LiveServer) -> None:
    connection = raw_request(server, {**LONG, "stream": True, "logprobs": 20, "n": 4})
    wait_until_running(server)
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "cat", "max_tokens": 4})
    assert answer.status_code == 200
    connection.close()
    server.check_integrity()


def test_garbage_on_the_wire(server: LiveServer) -> None:
    host, port = server.listener.getsockname()
    for data in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\r\n" * 50):
        connection = socket.create_connection((host, port))
        connection.sendall(data)
        connection.settimeout(0.3)
        try:
            reply = connection.recv(100)
        except TimeoutError:
            reply = b""
        assert b" 500 " not in reply
        connection.close()
    assert httpx.get(server.url + "/health").status_code == 200


def test_too_large_bodies_are_answered_not_reset(server: LiveServer) -> None:
    answer = httpx.post(server.url + "/v1/completions", content=b"x" * 3 * 2**20)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"

    def chunks() -> Any:
        for _ in range(30):
            yield b"x" * 100_000

    answer = httpx.post(
        server.url + "/v1/completions",
        content=chunks(),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 413


def test_stream_form(server: LiveServer) -> None:
    body = {"prompt": "cat", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    for event in text.split("\n\n")[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_bodies_that_never_arrive(tokenizer: Any) -> None:
    backend = ScriptedBackend(tokenizer, ["a"])
    with LiveServer(create_app(backend, AppOptions(body_timeout=0.2)), backend) as live:
        with socket.create_connection(live.listener.getsockname()) as connection:
            head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 90\r\n\r\n{")
            connection.settimeout(10)
            reply = b""
            while data := connection.recv(4096):
                reply += data
        assert reply.startswith(b"HTTP/1.1 408")
        assert b'"error"' in reply
