"""Two gloo processes with FSDP2 against one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serval.train.distributed import World
from tests.processes import torchrun
from tests.train.shard_worker import KINDS, rescaling, train


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the runs of two processes; those named "alone" were begun by one."""
    directory = tmp_path_factory.mktemp("two")
    for kind in KINDS:
        train(directory / f"{kind}-alone", kind, "uneven", 3, World())
        shutil.copytree(directory / f"{kind}-alone", directory / f"{kind}-one")
    torchrun(2, "tests.train.shard_worker", directory)
    return directory


def log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def assert_same_curve(left: Path, right: Path) -> None:
    """Losses, validation losses and gradient norms agree to 1e-4 at every step."""
    assert len(log(left)) == len(log(right)) == 9
    for one, other in zip(log(left), log(right), strict=True):
        for key in {"step", "loss", "validation_loss", "grad_norm"} & one.keys():
            assert other[key] == pytest.approx(one[key], abs=1e-4), (one["step"], key)


@pytest.mark.parametrize(
    ("optimizer", "model"), [("adamw", "plain"), ("muon", "mtp"), ("muon", "moe")]
)
def test_two_processes_follow_the_curve_of_one(
    tmp_path: Path, two: Path, optimizer: str, model: str
) -> None:
    train(tmp_path, optimizer, model, 8, World())
    assert_same_curve(tmp_path, two / f"{optimizer}-{model}")


def test_rescaling_sees_the_whole_of_sharded_weights(tmp_path: Path, two: Path) -> None:
    train(tmp_path, "adamw", "mtp", 8, World(), rescaling())
    assert_same_curve(tmp_path, two / "adamw-wisca")
    ours, theirs = log(tmp_path), log(two / "adamw-wisca")
    found = [line["step"] for line in ours if "wisca_mlp" in line]
    assert found == [3, 6]
    for one, other in zip(ours, theirs, strict=True):
        for key in ("wisca_qk", "wisca_vo", "wisca_mlp"):
            assert other.get(key) == (pytest.approx(one[key], rel=1e-3) if key in one else None)


def test_a_run_resumes_on_another_number_of_processes(tmp_path: Path, two: Path) -> None:
    """Two processes stopped at step 3; two and one finish alike, as an undisturbed run."""
    shards = (two / "resumed" / "checkpoints" / "step-00000008").glob("*.safetensors")
    assert len(list(shards)) == 2
    train(tmp_path, "mona", "plain", 8, World())
    train(two / "alone", "mona", "plain", 8, World())
    curve = {line["step"]: line["loss"] for line in log(tmp_path) if "loss" in line}
    for name in ("resumed", "alone"):
        for line in log(two / name):
            if "loss" in line:
                assert line["loss"] == pytest.approx(curve[line["step"]], abs=1e-4)
    left = load_file(two / "alone" / "final.safetensors")
    right = load_file(tmp_path / "final.safetensors")
    assert all((left[name] - right[name]).abs().max() < 1e-5 for name in left)


def assert_same_bits(left: Path, right: Path) -> None:
    """Weights and the state of the optimizer."""
    for name in ("final.safetensors", "state.safetensors"):
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype, key
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_resumes_bit_for_bit(kind: str, two: Path) -> None:
    """Rows and experts shared out unevenly; Lite's noise goes on where it was."""
    state = load_file(two / f"{kind}-undisturbed" / "state.safetensors")
    assert {key.split("|")[1] for key in state} == {
        *("step", "exp_avg", "exp_avg_sq", "momentum_buffer"),
        *(("acceleration", "previous_gradient") if kind == "mona-two-buffers" else ()),
        *(("gradient_average",) if kind in ("mona", "mona-lite") else ()),
    }
    assert_same_bits(two / f"{kind}-undisturbed", two / f"{kind}-resumed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_the_same_bits_for_any_number_of_processes(
    kind: str, two: Path, tmp_path: Path
) -> None:
    """Two processes load what one saved, and one what two saved."""
    assert_same_bits(two / f"{kind}-one", two / f"{kind}-alone")
    shutil.copytree(two / f"{kind}-stopped" / "checkpoints", tmp_path / "checkpoints")
    train(tmp_path, kind, "uneven", 3, World())
    assert_same_bits(two / f"{kind}-stopped", tmp_path)
