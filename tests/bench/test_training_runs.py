"""What the training benchmarks share: rates, seeds, kept results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serval.bench import training_runs
from serval.bench.training_runs import Shuffled, best_rate, kept, of_seeds, paired


def bowl(best: float) -> Any:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(rate - best)

    loss.asked = asked  # type: ignore[attr-defined]
    return loss


def test_the_best_of_three_rates_is_widened_at_an_edge() -> None:
    middle = bowl(0.2)
    assert best_rate((0.1, 0.2, 0.4), middle) == (0.2, False)
    assert middle.asked == [0.1, 0.2, 0.4]
    low = bowl(0.03)
    assert best_rate((0.1, 0.2, 0.4), low) == (0.025, False)
    assert low.asked == [0.1, 0.2, 0.4, 0.05, 0.025, 0.0125]
    high = bowl(100.0)
    assert best_rate((0.1, 0.2, 0.4), high) == (3.2, True)
    assert len(high.asked) == 3 + training_runs.WIDENINGS
    assert best_rate((0.1, 0.2), bowl(9.0), widen=False) == (0.2, True)
    assert best_rate((0.1,), bowl(9.0)) == (0.1, False)


def test_gaps_are_taken_seed_by_seed() -> None:
    found = paired([1.0, 2.0, 4.0], [1.5, 2.25, 3.75], "none")
    assert found["against_none"] == pytest.approx(-1 / 6)
    assert (found["against_none_min"], found["against_none_max"]) == (-0.5, 0.25)
    assert found["against_none_error"] == pytest.approx(0.2205, abs=1e-4)
    assert found["better"] == "2/3"
    assert paired([1.0], [2.0], "none")["against_none_error"] is None
    assert of_seeds([1.0, 4.0])["spread"] == 3.0


def test_a_kept_result_is_not_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    first = kept(path, lambda: {"value": 1})
    assert first["seconds"] >= 0
    assert kept(path, lambda: {"value": 2}) == first


def test_seeds_order_rows_and_none_keeps_them() -> None:
    rows = [(torch.tensor([i]), [1], None) for i in range(6)]

    def read(seed: int | None, count: int = 6) -> list[int]:
        stream = Shuffled(rows, seed)  # type: ignore[arg-type]
        return [int(stream.next()[0]) for _ in range(count)]

    assert read(None, 8) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert sorted(read(1)) == sorted(read(2)) == list(range(6))
    assert read(1) == read(1) != read(2)
