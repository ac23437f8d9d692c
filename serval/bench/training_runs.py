"""What benchmarks that train many small models share: rows, kept results, rates, paired seeds.

Every finished run is kept under a name made of everything it depends on (`SERVAL_BENCH_DIR`), so an
interrupted benchmark continues with the next.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from serval.bench.shapes import cache_directory
from serval.train.reporting import Callback, Metrics
from serval.train.stream import Row

T = TypeVar("T")
WIDENINGS = 3  # rates tried beyond a grid whose best is at its edge


@dataclass
class Text:
    """Rows that all runs share: training rows for one pass, validation rows, test rows."""

    training: list[Row]
    validation: list[Row]
    test: list[Row] = field(default_factory=list)


class Once(Generic[T]):
    """Calls `make` when it is first asked, and never again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make, self.made = make, list[T]()

    def __call__(self) -> T:
        if not self.made:
            self.made.append(self.make())
        return self.made[0]


class Shuffled:
    """Fixed rows as an endless, resumable stream; with a seed, in an order of its own."""

    def __init__(self, rows: Sequence[Row], seed: int | None) -> None:
        self.rows, self.at = rows, 0
        self.order = list(range(len(rows)))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.order = torch.randperm(len(rows), generator=generator).tolist()

    def next(self) -> Row:
        self.at += 1
        return self.rows[self.order[(self.at - 1) % len(self.order)]]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Curve(Callback):
    """Validation losses: [step, loss]."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
        self.points.append((step, metrics["validation_loss"]))


def kept_path(bench: str, name: str, facts: Any) -> Path:
    """Where a run's result is kept. facts: what it depends on, as JSON values."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / bench / f"{name}-{digest}.json"


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier call kept at `path`, or what `compute` returns, kept with its `seconds`."""
    if path.exists():
        earlier: dict[str, Any] = json.loads(path.read_text())
        return earlier
    begin = time.perf_counter()
    found = compute()
    found["seconds"] = time.perf_counter() - begin
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps(found))
    temporary.replace(path)
    return found


def trained(
    path: Path,
    compute: Callable[[], dict[str, Any]],
    title: str,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """`kept` of a run with a "curve" of losses; a new result is told as `title`."""
    new = not path.exists()
    found = kept(path, compute)
    if new:
        note(f"  {title}: {found['curve'][-1][1]:.4f} nats in {found['seconds']:.0f} s")
    return found


def best_rate(
    rates: Sequence[float], loss: Callable[[float], float], widen: bool = True
) -> tuple[float, bool]:
    """(the learning rate of least loss, whether it is at the edge of those tried).

    rates: ascending. While the best is the least or the largest of those tried, the next one in
    that direction is tried too, at most `WIDENINGS` times: a method is not judged by a grid that
    missed it.
    """
    tried = {rate: loss(rate) for rate in rates}
    for left in range(WIDENINGS if widen and len(rates) > 1 else 0, -1, -1):
        order = sorted(tried)
        best = min(order, key=lambda rate: tried[rate])
        if best not in (order[0], order[-1]):
            return best, False
        if left:
            step = order[1] / order[0]
            rate = float(f"{best / step if best == order[0] else best * step:.3g}")
            tried[rate] = loss(rate)
    best = min(tried, key=lambda rate: tried[rate])
    return best, len(tried) > 1


def of_seeds(losses: Sequence[float], name: str = "validation_loss") -> dict[str, Any]:
    """Metrics of runs that differ in their seeds only."""
    return {
        name: statistics.mean(losses),
        "spread": max(losses) - min(losses),
        "seeds": len(losses),
        "losses": list(losses),
    }


def paired(losses: Sequence[float], others: Sequence[float], name: str) -> dict[str, Any]:
    """Metrics `against_NAME`: differences of losses to those of the same seeds; below 0: lower."""
    gaps = [loss - other for loss, other in zip(losses, others, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return {
        f"against_{name}": statistics.mean(gaps),
        f"against_{name}_min": min(gaps),
        f"against_{name}_max": max(gaps),
        f"against_{name}_error": error,
        "better": f"{sum(gap < 0 for gap in gaps)}/{len(gaps)}",
    }
