"""Two and four gloo processes against one: the same weights and state, and no more
communication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.placement_worker import PLACEMENTS, STRIDED, Pair, drive, plain
from tests.optim.shard_worker import CASES, run
from tests.processes import torchrun


def launch(worker: str, processes: int, out: Path) -> Any:
    """What the processes computed and saved as `out`."""
    torchrun(processes, f"tests.optim.{worker}", out)
    return torch.load(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch("shard_worker", 2, tmp_path_factory.mktemp("two") / "results.pt")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch("placement_worker", 4, tmp_path_factory.mktemp("four") / "results.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, two: Any) -> None:
    alone, _ = run(case, sharded=False)
    together, _ = two[case]
    assert alone.keys() == together.keys()
    # Lite's rounding noise differs from process to process
    tolerance = 2e-2 if case == "mona-lite" else 1e-5
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=tolerance, atol=tolerance)


def test_one_gather_per_sharded_matrix_and_none_for_stacks_or_mona(two: Any) -> None:
    """Four matrices are cut in two and gathered; the stacks lie whole on their processes."""
    assert {case: collectives for case, (_, collectives) in two.items()} == dict.fromkeys(CASES, 4)


@pytest.mark.parametrize("placement", [*PLACEMENTS, STRIDED])
@pytest.mark.parametrize("case", CASES)
def test_every_placement_equals_one_process(case: str, placement: str, four: Any) -> None:
    """Replicas, HSDP, tensor parallelism; replicas stay the same bit for bit, Lite's noise too."""
    together, agree = four[case, placement]
    assert agree
    alone = drive(case, Pair().named()) if placement == STRIDED else plain(case)
    assert alone.keys() == together.keys()
    # Lite's rounding noise is that of the shard; where nothing is sharded it is the same
    exact = case != "mona-lite" or placement == "replicas"
    tolerance = 1e-5 if exact else 2e-2
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=tolerance, atol=tolerance)
