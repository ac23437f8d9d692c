"""A benchmark that is stopped takes the server under test with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVER = """
import http.server, os, subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(f"{os.getpid()} {grandchild.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
BENCH = """
import sys, time
from pathlib import Path
from serval.bench import servers
servers.model_directory = lambda name: Path("model")
command = lambda model, port, threads: [sys.executable, "-c", sys.argv[1], str(port), sys.argv[2]]
with servers.Server(command, "any", 1):
    print("ready", flush=True)
    if len(sys.argv) == 3:
        time.sleep(600)
print("left", flush=True)
"""


def start(pids: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BENCH, SERVER, str(pids), *more]
    bench = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    assert bench.stdout.readline() == "ready\n"
    return bench


def running(pid: int) -> bool:
    """Whether a process exists and is more than an entry nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_ended(pid: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_benchmark_leaves_no_server(tmp_path: Path, end: signal.Signals) -> None:
    pids = tmp_path / "pids"
    bench = start(pids)
    server, grandchild = map(int, pids.read_text().split())
    assert running(server)
    assert running(grandchild)
    os.kill(bench.pid, end)
    code = bench.wait(timeout=120)
    wait_ended(server)
    if end == signal.SIGKILL:  # nobody was left to clean up behind the server
        os.kill(grandchild, signal.SIGKILL)
    else:
        assert code != 0
        wait_ended(grandchild)
    if end == signal.SIGTERM:
        assert code == 143


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_leaving_ends_the_server_and_restores_the_handler(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    bench = start(pids, "leave")
    out, _ = bench.communicate(timeout=120)
    assert out == "left\n"
    for pid in map(int, pids.read_text().split()):
        wait_ended(pid)
