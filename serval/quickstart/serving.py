"""A server of our own in a subprocess, and a client of its OpenAI-compatible API."""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from serval.errors import ServalError

_ADDRESS = re.compile(r"https?://[\w.\[\]:-]+:\d+")
_STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Server:
    """A running server: its address, the command that started it, seconds until it answered."""

    url: str
    command: list[str]
    seconds: float


@contextmanager
def serving(model: Path, arguments: Sequence[str] = (), timeout: float = 90.0) -> Iterator[Server]:
    """`serval serve MODEL` on a free port of this machine; stopped with SIGTERM at the end.

    Raises ServalError, with what the server printed, when it does not come up within `timeout`.
    """
    command = ["serve", str(model), "--port", "0", *arguments]
    start = monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "serval.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = _wait_for_address(process, start + timeout)
        yield Server(url, ["serval", *command], monotonic() - start)
    finally:
        stop(process)


def _wait_for_address(process: subprocess.Popen[str], deadline: float) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    said: list[str] = []
    while monotonic() < deadline:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            break
        said.append(line.rstrip())
        found = _ADDRESS.search(line)
        if found and line.startswith("Serving"):
            return found.group()
    told = "\n".join(said[-15:]) or "(it printed nothing)"
    raise ServalError(f"the server did not start; it said:\n{told}")


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Keep the pipe empty for as long as the server lives."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def stop(process: subprocess.Popen[str]) -> int:
    """Ask for a graceful end; insist after a while. Returns the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None and not process.stdout.closed:
        process.stdout.close()
    return process.returncode


def complete(url: str, prompt: str, max_tokens: int = 64, timeout: float = 60.0) -> Iterator[str]:
    """Stream a greedy completion from /v1/completions, piece by piece.

    Raises ServalError with the server's message when it refuses.
    """
    model = _request(f"{url}/v1/models", None, timeout)["data"][0]["id"]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    with _open(f"{url}/v1/completions", body, timeout) as response:
        for raw in response:
            line = raw.decode("utf-8").strip()
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ServalError(f"the server answered: {event['error'].get('message', event)}")
            for choice in event.get("choices", []):
                if choice.get("text"):
                    yield choice["text"]


def _request(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    with _open(url, body, timeout) as response:
        return json.loads(response.read())


def _open(url: str, body: dict[str, Any] | None, timeout: float) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    # The server is on this machine: no proxy of the environment may come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        raise ServalError(f"the server answered {error.code}: {text[:500]}") from error
    except OSError as error:
        raise ServalError(f"the server at {url} cannot be reached: {error}") from error
