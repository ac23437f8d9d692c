"""64 clients that misbehave: no 5xx, no leaked block, memory flat.

The short version runs for ten seconds; `-m slow` runs two minutes and looks at the memory's slope.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.soak import Report, soak

# A server that answers SIGUSR1-like questions over its own port would be one more thing to trust,
# so the process checks its cache's books itself, after the drain, and says so on its way out.
PROGRAM = """
import json, sys
from serval.server import serve

made = []
build = serve.build_app
serve.build_app = lambda options: made.append(build(options)) or made[0]
code = serve.run(serve.ServeOptions(**json.loads(sys.argv[1])))
manager = made[0].state.serval.backend.llm.engine.manager
manager.check_integrity()
print("blocks held:", manager.used_blocks, flush=True)
sys.exit(code)
"""


@dataclass
class Process:
    process: subprocess.Popen[str]
    url: str

    @property
    def resident(self) -> int:
        """Bytes of memory the server holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    @property
    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@pytest.fixture
def process(model_dir: Path) -> Iterator[Process]:
    # A cache of 40 blocks for up to 16 sequences of 8 blocks: preemption happens all the time.
    options = {
        "model": str(model_dir),
        "port": 0,
        "cache_bytes": 40 * 32 * 2 * 2 * 2 * 16 * 4,
        "max_sequences": 16,
        "max_in_flight": 100,
        "max_body_bytes": 2**20,
        "log_level": "error",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(options)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    found = re.search(r"at (http://\S+)", child.stdout.readline())
    assert found
    yield Process(child, found[1])
    child.kill()
    child.wait()


def finish(running: Process) -> None:
    """Everything is free while the server still runs, and its books agree when it ends."""
    deadline = time.monotonic() + 10
    stats = {"in_flight": 1, "cache_usage": 1.0}
    while time.monotonic() < deadline and (stats["in_flight"] or stats["cache_usage"]):
        stats = httpx.get(running.url + "/stats").json()
        time.sleep(0.05)
    assert stats["in_flight"] == 0
    assert stats["cache_usage"] == 0.0
    assert stats["running"] == stats["waiting"] == 0
    running.process.send_signal(signal.SIGTERM)
    assert running.process.stdout is not None
    assert "blocks held: 0" in running.process.stdout.read()
    assert running.process.wait(30) == 0


def check(report: Report) -> None:
    assert report.failures == []
    assert report.server_errors == 0
    assert report.statuses[200] > 20
    assert report.statuses[400] > 2


def test_short(process: Process) -> None:
    check(asyncio.run(soak(process.url, 8.0, 64)))
    finish(process)


@pytest.mark.slow
def test_two_minutes(process: Process) -> None:
    asyncio.run(soak(process.url, 20.0, 64, seed=1))  # caches, pools and arenas fill first
    memory = [process.resident]
    reports = []
    for part in range(8):
        reports.append(asyncio.run(soak(process.url, 15.0, 64, seed=2 + part)))
        time.sleep(0.5)
        memory.append(process.resident)
    for report in reports:
        check(report)
    statuses = sum((report.statuses for report in reports), start=type(reports[0].statuses)())
    print("\nanswers:", dict(sorted(statuses.items())))
    print("memory in MiB:", [round(size / 2**20, 1) for size in memory])
    found = re.search(r"preemptions_total (\d+)", httpx.get(process.url + "/metrics").text)
    print("preemptions:", found and found[1])
    assert process.descriptors < 60
    assert memory[-1] - memory[len(memory) // 2] < 12 * 2**20, memory
    finish(process)
