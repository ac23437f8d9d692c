"""What the quickstart shows of each variant: a list of measures, each one row of its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table

from serval.quickstart.variants import BATCHES, Outcome

Change = Literal["ratio", "inverse", "percent", "points", "none"]


@dataclass(frozen=True)
class Measure:
    """group: heading of the row; value: the number, NaN if there is none; show: its text. change:
    how it is compared with the first variant ("ratio" old/new, "inverse" new/old)."""

    group: str
    label: str
    value: Callable[[Outcome], float]
    show: Callable[[float], str]
    change: Change = "none"

    def cell(self, outcome: Outcome) -> str:
        value = self.value(outcome)
        return "–" if math.isnan(value) else self.show(value)

    def difference(self, outcome: Outcome, base: Outcome) -> str:
        """The change from `base`, or "" where there is nothing to compare or nothing changed."""
        if outcome is base or self.change == "none":
            return ""
        new, old = self.value(outcome), self.value(base)
        if math.isnan(new) or math.isnan(old) or new == old:
            return ""
        if self.change == "points":
            return f"{100 * (new - old):+.1f} points"
        if old == 0 or new == 0:
            return ""
        if self.change == "percent":
            return f"{100 * (new / old - 1):+.2f} %"
        if self.change == "ratio":
            return f"{old / new:.2f}x smaller"
        return f"{new / old:.2f}x"


def _text(field: str) -> Callable[[Outcome], float]:
    def value(outcome: Outcome) -> float:
        found = None if outcome.quality.text is None else getattr(outcome.quality.text, field)
        return float("nan") if found is None else float(found)

    return value


def _speed(field: str, batch: int) -> Callable[[Outcome], float]:
    def value(outcome: Outcome) -> float:
        found = [getattr(s, field) for s in outcome.speed if s.batch == batch]
        return float(found[0]) if found else float("nan")

    return value


def _task(task: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.quality.by_task().get(task, float("nan"))


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


_SPEEDS = [
    Measure(
        "speed, tokens/s",
        f"{kind}, batch {batch}",
        _speed(kind, batch),
        whole,
        "inverse",
    )
    for kind in ("prefill", "decode")
    for batch in BATCHES
]

MEASURES: tuple[Measure, ...] = (
    Measure(
        "quality",
        "perplexity",
        _text("perplexity"),
        lambda value: f"{value:.3f}",
        "percent",
    ),
    Measure("quality", "KL divergence, nats", _text("kl"), lambda value: f"{value:.5f}"),
    Measure("quality", "same top token", _text("same_top"), percent),
    Measure("quality", "retrieval, needle", _task("needle"), percent, "points"),
    Measure("quality", "retrieval, key-value", _task("key_value"), percent, "points"),
    Measure("memory", "weights, loaded", lambda o: o.weight_bytes, megabytes, "ratio"),
    Measure("memory", "weights, on disk", lambda o: o.file_bytes, megabytes, "ratio"),
    Measure(
        "memory",
        "cache per token",
        lambda o: o.cache_bytes_per_token,
        lambda value: f"{value:,.0f} bytes",
        "ratio",
    ),
    *_SPEEDS,
)


def shown(outcomes: Sequence[Outcome]) -> list[Measure]:
    """The measures that at least one variant has a number for."""
    return [m for m in MEASURES if any(not math.isnan(m.value(o)) for o in outcomes)]


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row per measure, one column per variant, changes from the first one in brackets."""
    headings = [outcome.variant.name for outcome in outcomes]
    grid = Table("", *headings, box=box.SIMPLE_HEAD, pad_edge=False)
    grid.columns[0].no_wrap = True
    for column in grid.columns[1:]:
        column.justify = "right"
    previous = ""
    for measure in shown(outcomes):
        if measure.group != previous:
            if previous:
                grid.add_section()
            grid.add_row(f"[bold]{measure.group}[/bold]")
            previous = measure.group
        cells = []
        for outcome in outcomes:
            change = measure.difference(outcome, outcomes[0])
            cells.append(measure.cell(outcome) + (f"\n[dim]{change}[/dim]" if change else ""))
        grid.add_row(f"  {measure.label}", *cells)
    return grid
