"""kill -9 at random moments: the run resumes and ends with the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serval.train import checkpoint
from tests.train.toy import toy_trainer

ROOT = Path(__file__).parents[2]
EVERY = 3


def start(directory: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.kill_worker", str(directory), str(steps)]
    return subprocess.Popen(
        [*command, str(EVERY)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_and_kill(directory: Path, steps: int, rng: random.Random) -> tuple[int, int]:
    """Kill a run some random time after its first step; returns (first step, last step told)."""
    process = start(directory, steps)
    assert process.stdout is not None
    first = int(process.stdout.readline().split()[1])
    process.stdout.readline()
    time.sleep(rng.uniform(0.0, 0.4))
    process.kill()
    rest = [line for line in process.stdout.read().splitlines() if line.startswith("step ")]
    process.wait()
    return first, int(rest[-1].split()[1]) if rest else first + 1


def check(directory: Path, kills: int, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    last = 0
    for _ in range(kills):
        first, told = run_and_kill(directory / "killed", steps, rng)
        assert first >= last - EVERY, "more was lost than the steps since the last checkpoint"
        last = told
        names = [path.name for path in (directory / "killed" / "checkpoints").glob("step-*")]
        saved = checkpoint.list_checkpoints(directory / "killed" / "checkpoints")
        assert len(names) == len(saved)
        if last >= steps:
            break
    process = start(directory / "killed", steps)
    process.communicate()
    assert process.returncode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed runs: the same products in the same order
    undisturbed = toy_trainer(None, "muon", steps)
    undisturbed.fit()
    torch.set_num_threads(threads)
    want = undisturbed.decoder.state_dict()
    got = load_file(directory / "killed" / "final.safetensors")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert not list((directory / "killed" / "checkpoints").glob(".writing-*"))


def test_three_kills(tmp_path: Path) -> None:
    check(tmp_path, kills=3, steps=60, seed=1)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    check(tmp_path, kills=20, steps=250, seed=2)
