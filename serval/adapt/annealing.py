"""Activation function annealing: beta(t), from 1 (non-linear) to exactly 0 (plain LoRA).

AFA-LoRA (arXiv 2512.22455) lets beta fall from 1 to 0 during training; the curve and its length
are not given in the parts of the paper that could be read, so both are options here:

    beta(t) = 1                     t < t0
            = 1 - u                 linear (default),  u = (t - t0) / (t1 - t0)
            = (1 + cos(pi u)) / 2   cosine
            = 0 exactly             t >= t1

t counts optimizer steps and is set from outside: a counter in `forward` would also count
evaluations and recomputed activations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from serval.adapt.lora import set_beta
from serval.errors import ConfigError
from serval.optim import MixedOptimizer
from serval.train.reporting import Callback, Metrics

CURVES = ("linear", "cosine")
LATE = 0.8  # an end beyond this share of a run leaves the linear adapter too few steps


@dataclass(frozen=True)
class Annealing:
    """beta over a run of `steps` optimizer steps; start and end (t0, t1) are shares of it."""

    steps: int
    start: float = 0.0
    end: float = 0.3
    curve: str = "linear"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"annealing needs at least one step, got {self.steps}")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(
                f"anneal_start is {self.start} and anneal_end {self.end}; expected "
                "0 <= anneal_start < anneal_end <= 1, as shares of all steps"
            )
        if self.curve not in CURVES:
            raise ConfigError(f"anneal_curve is {self.curve!r}; choose one of: {', '.join(CURVES)}")

    @property
    def warning(self) -> str | None:
        """What to tell the user about a schedule that ends late, or None."""
        if self.end <= LATE:
            return None
        return (
            f"anneal_end is {self.end}: the linear adapter, which is what remains, is trained in "
            f"the last {1 - self.end:.0%} of the steps only; {LATE} or less leaves it more"
        )

    def beta(self, step: int) -> float:
        """The weight of the non-linear part in the forward pass of step `step` (0-based: the
        number of optimizer steps done)."""
        first, last = self.start * self.steps, self.end * self.steps
        if step >= last:
            return 0.0
        if step <= first:
            return 1.0
        u = (step - first) / (last - first)
        return 1.0 - u if self.curve == "linear" else (1.0 + math.cos(math.pi * u)) / 2.0


class Anneal(Callback):
    """Sets beta of every adapter of the model before each step; adds `beta` to the metrics."""

    def __init__(self, annealing: Annealing) -> None:
        self.annealing = annealing
        self.now = 1.0

    def _set(self, step: int, model: nn.Module) -> None:
        self.now = self.annealing.beta(step)
        set_beta(model, self.now)

    def on_train_start(self, step: int, model: nn.Module, optimizer: MixedOptimizer) -> None:
        self._set(step, model)

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        metrics["beta"] = self.now  # of the step that ended
        self._set(step, model)

    def state_dict(self) -> dict[str, Any]:
        """For whoever reads a checkpoint; the step alone decides when a run resumes."""
        return {"beta": self.now}
