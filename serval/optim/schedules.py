"""Learning-rate schedules: pure functions of the step, so that resuming needs only the step.

Each returns a multiplier in [0, 1] of the base learning rate for optimizer step ``step``
(0-based). Warm-up is linear and never starts at zero: step 0 has multiplier 1 / warmup_steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from serval.errors import ConfigError
from serval.registry import Entry


@dataclass(frozen=True)
class Schedule(ABC):
    """Fields shared by all schedules.

    total_steps: optimizer steps of the whole run. warmup_steps: length of the linear warm-up.
    decay_steps: length of the final decay (wsd only). final: multiplier reached at the end.
    reads: names of those that a kind of schedule uses.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"warmup_steps"})
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ConfigError(
                f"schedule: warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} "
                f"exceed the {self.total_steps} steps of the run; shorten one of them"
            )

    def multiplier(self, step: int) -> float:
        """Return the learning-rate multiplier of 0-based optimizer step `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """Return the multiplier of a step that lies after the warm-up."""


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then constant."""

    def after_warmup(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm-up, then half a cosine down to `final` at the last step (arXiv:1608.03983)."""

    reads: ClassVar[frozenset[str]] = frozenset({"warmup_steps", "final"})

    def after_warmup(self, step: int) -> float:
        span = max(1, self.total_steps - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, constant, then a linear decay over the last `decay_steps` (arXiv:2404.06395)."""

    reads: ClassVar[frozenset[str]] = frozenset({"warmup_steps", "decay_steps", "final"})

    def after_warmup(self, step: int) -> float:
        left = self.total_steps - step  # steps still to do, this one included
        if left > self.decay_steps:
            return 1.0
        return self.final + (1.0 - self.final) * max(0, left) / (self.decay_steps + 1)


SCHEDULES: dict[str, Entry] = {
    "wsd": Entry(
        "serval.optim.schedules:WarmupStableDecay",
        "linear warm-up, constant, linear decay at the end",
        "2404.06395",
    ),
    "cosine": Entry(
        "serval.optim.schedules:Cosine", "linear warm-up, then cosine decay", "1608.03983"
    ),
    "constant": Entry("serval.optim.schedules:Constant", "linear warm-up, then constant"),
}
