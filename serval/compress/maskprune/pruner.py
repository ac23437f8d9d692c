"""What a pruner implements: decide, before training or during it, which units stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from serval.compress.maskprune.masks import MaskedDecoder
from serval.compress.maskprune.minimax import (
    Minimax,
    Phases,
    Rates,
    mask_importance,
    measured_weights,
)
from serval.compress.maskprune.units import Costs, Levels, Widths, even_widths
from serval.errors import ConfigError
from serval.train.reporting import Callback
from serval.train.stream import Targets

LEAST_STEPS = 10  # for phases of a step or more


@dataclass
class Task:
    """One pruning. keep: the budget R must not exceed; widths: given ones instead (every kind).
    batches: calibration text. steps: of the training that follows, recovery included."""

    masked: MaskedDecoder
    costs: Costs
    levels: Levels
    keep: float
    widths: Widths | None
    batches: Sequence[Targets]
    steps: int
    seed: int


class Pruner(ABC):
    """A dataclass whose fields are the method's settings."""

    @abstractmethod
    def start(self, task: Task) -> Callback | None:
        """Cut `task.masked` now, or return a callback that cuts it while it is trained."""

    @property
    def recovery(self) -> float:
        """Share of the steps that follow the cut."""
        return 1.0

    @property
    def mask_rate(self) -> float:
        """Learning rate of the masks."""
        return Rates.mask

    def facts(self) -> dict[str, Any]:
        """What to say of the pruning afterwards, as JSON values."""
        return {}


@dataclass
class OneShot(Pruner):
    """Ranks units once and keeps the best of each layer: given widths, or the same share of heads
    and of channels."""

    @abstractmethod
    def scores(self, task: Task) -> dict[str, Tensor]:
        """One score per unit, by site's name; higher ones stay."""

    def start(self, task: Task) -> Callback | None:
        """Cut at once."""
        widths = task.widths or even_widths(task.costs, task.levels, task.keep)
        scores = self.scores(task)
        kept = {}
        for site in task.masked.sites:
            order = scores[site.name].argsort(descending=True, stable=True)
            kept[site.name] = order[: widths[site.kind]]
        task.masked.cut(kept)
        return None


@dataclass
class MaskPrune(Pruner):
    """Learnt masks with one learnt width per kind; see `minimax.py`.

    warmup, ramp, kill: shares of the steps; recovery takes the rest. mask_lr, rho_lr, y_lr, z_lr:
    see `Rates`.
    """

    warmup: float = 0.15
    ramp: float = 0.35
    kill: float = 0.25
    mask_lr: float = Rates.mask
    rho_lr: float = Rates.rho
    y_lr: float = Rates.y
    z_lr: float = Rates.z

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} is {value}; expected a finite number >= 0")
        if self.warmup + self.ramp + self.kill > 1 or not self.ramp:
            raise ConfigError(
                f"warmup {self.warmup}, ramp {self.ramp} and kill {self.kill} are shares of the "
                "steps; expected a ramp above 0 and a sum of at most 1"
            )
        self.minimax: Minimax | None = None

    @property
    def recovery(self) -> float:
        return max(0.0, 1 - self.warmup - self.ramp - self.kill)

    @property
    def mask_rate(self) -> float:
        return self.mask_lr

    def start(self, task: Task) -> Callback | None:
        """Return the callback that learns the masks."""
        phases = Phases.of(task.steps, self.warmup, self.ramp, self.kill)
        if task.steps < LEAST_STEPS or phases.ramp <= phases.warmup:
            raise ConfigError(
                f"{task.steps} steps are too few to learn masks in; give at least {LEAST_STEPS}, "
                "better 300"
            )
        if task.widths is not None:
            raise ConfigError(
                "widths are learnt by maskprune; give a budget (keep), or choose a method that "
                "takes widths, such as taylor"
            )
        with torch.enable_grad():
            importance = mask_importance(task.masked, task.batches)
        rates = Rates(self.mask_lr, self.rho_lr, self.y_lr, self.z_lr)
        about = (task.masked, task.batches, task.costs, task.levels, task.keep, importance)
        self.minimax = Minimax(
            task.masked,
            task.costs,
            task.levels,
            task.keep,
            importance,
            phases,
            rates,
            measured_weights(*about),
        )
        return self.minimax

    def facts(self) -> dict[str, Any]:
        """Largest dropped mask before the cut, the last multiplier of the budget, the kinds'
        weights."""
        if self.minimax is None:
            return {}
        learnt = self.minimax
        return {"residual": learnt.residual, "z": learnt.z, "weights": learnt.weights}
