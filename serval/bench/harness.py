"""What benchmarks share: contestants measured in turn, ratios with their spread, one case a claim.

A round measures every contestant once, one after the other, so that a machine that slows down
slows all of them. The reported value is the median over rounds; the spread is that of the ratios
of single rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serval.errors import ServalError


class MissingPeerError(ServalError):
    """A peer is not installed; `install` is the command that installs it."""

    def __init__(self, name: str, install: str) -> None:
        super().__init__(f"{name} is not installed; run: {install}")
        self.peer, self.install = name, install


@dataclass
class Sample:
    """One measurement: wall and processor seconds per unit of work (the benchmark says which), and
    anything worth keeping beside it."""

    seconds: float
    cpu_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contestant:
    """Something to measure. `measure` runs one round; it may raise MissingPeerError."""

    name: str
    measure: Callable[[], Sample]


@dataclass
class Outcome:
    """All rounds of one contestant, or why there are none."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    missing: str | None = None
    failed: str | None = None

    @property
    def seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(s.seconds for s in self.samples)

    @property
    def cpu_seconds(self) -> float | None:
        values = [s.cpu_seconds for s in self.samples if s.cpu_seconds is not None]
        return statistics.median(values) if values else None

    def extra(self, key: str) -> Any:
        """The last round's extra value `key`, None when it has none."""
        return self.samples[-1].extra.get(key) if self.samples else None


@dataclass
class Case:
    """One line of a report: a case of ours beside one peer.

    ours, peer_value: seconds per unit of work. ratio: peer_value / ours (above 1: ours is faster).
    spread: smallest and largest ratio of a round. floor_fraction: the time that the memory
    bandwidth or the arithmetic alone would take, divided by ours. missing: how to install the peer.
    failed: why a contestant has no value. machine: where it was measured, when the report was
    measured elsewhere or otherwise since.
    """

    case: str
    ours: float | None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    floor_fraction: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    failed: str | None = None
    machine: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "case": self.case,
            "ours": self.ours,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "spread": list(self.spread) if self.spread else None,
            "floor_fraction": self.floor_fraction,
            "metrics": self.metrics,
        }
        for key in ("missing", "failed", "machine"):
            if getattr(self, key) is not None:
                values[key] = getattr(self, key)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        values = dict(values)
        if values.get("spread"):
            values["spread"] = tuple(values["spread"])
        return cls(**values)


@dataclass
class Report:
    """One benchmark's cases and the machine they ran on; quick: tiny shapes, not a result."""

    bench: str
    machine: dict[str, Any]
    cases: list[Case]
    quick: bool = False

    def machines(self) -> list[dict[str, Any]]:
        """Where the cases were measured, this report's own machine first."""
        found = [case.machine for case in self.cases if case.machine is not None]
        if len(found) < len(self.cases) or not found:
            found.insert(0, self.machine)
        return [machine for i, machine in enumerate(found) if machine not in found[:i]]


def _to_stderr(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


@dataclass
class Setup:
    """How a benchmark is to run. only: substring of the case names wanted. note: progress.
    offered: every case name that a benchmark asked about."""

    quick: bool = False
    only: str | None = None
    note: Callable[[str], None] = _to_stderr
    offered: list[str] = field(default_factory=list)

    def wants(self, case: str) -> bool:
        self.offered.append(case)
        return self.only is None or self.only in case


def paired_rounds(
    contestants: Sequence[Contestant], rounds: int, note: Callable[[str], None]
) -> dict[str, Outcome]:
    """Measure every contestant once per round, in turn.

    A contestant that is missing or fails keeps its outcome and leaves the rounds; the others go on.
    """
    outcomes = {c.name: Outcome(c.name) for c in contestants}
    for index in range(rounds):
        for contestant in contestants:
            outcome = outcomes[contestant.name]
            if outcome.missing or outcome.failed:
                continue
            try:
                sample = contestant.measure()
            except MissingPeerError as error:
                outcome.missing = error.install
                note(f"  {contestant.name}: missing, {error}")
            except Exception as error:
                outcome.failed = f"{type(error).__name__}: {error}"
                outcome.samples.clear()
                note(f"  {contestant.name}: failed, {outcome.failed}")
            else:
                outcome.samples.append(sample)
                note(f"  round {index + 1}/{rounds} {contestant.name}: {sample.seconds:.4g} s")
    return outcomes


def compare(
    case: str,
    ours: Outcome,
    peer: Outcome | None,
    *,
    floor_seconds: float | None = None,
    metrics: dict[str, Any] | None = None,
) -> Case:
    """Put `ours` beside `peer` (None: a case without a peer).

    floor_seconds: the least time that bandwidth or arithmetic allows for `ours`.
    """
    result = Case(case, None, metrics=dict(metrics or {}))
    if ours.samples:
        result.ours = ours.seconds
        if ours.cpu_seconds is not None:
            result.metrics["cpu_seconds"] = ours.cpu_seconds
        if floor_seconds is not None:
            result.floor_fraction = floor_seconds / result.ours
    else:
        result.failed = f"{ours.name}: {ours.failed or ours.missing}"
    if peer is None:
        return result
    result.peer = peer.name
    if peer.samples:
        result.peer_value = peer.seconds
        if peer.cpu_seconds is not None:
            result.metrics["peer_cpu_seconds"] = peer.cpu_seconds
    elif peer.missing is not None:
        result.missing = peer.missing
    else:
        result.failed = "; ".join(filter(None, [result.failed, f"{peer.name}: {peer.failed}"]))
    if result.ours is not None and result.peer_value is not None:
        result.ratio = result.peer_value / result.ours
        ratios = [p.seconds / o.seconds for o, p in zip(ours.samples, peer.samples, strict=False)]
        result.spread = (min(ratios), max(ratios))
    return result
