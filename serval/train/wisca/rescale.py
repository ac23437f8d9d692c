"""`wisca_` rescales a model once, `WiscaCallback` during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import nn

from serval.errors import ConfigError
from serval.optim.covariant import AnyOptimizer, check_state
from serval.train.reporting import Callback, Metrics
from serval.train.wisca.adapters import ADAPTERS, BENT, gated_mlp, low_rank
from serval.train.wisca.pairs import Kind, Level, Norm, Pair, Report, balance, distinct
from serval.train.wisca.sites import AttentionAdapter, Site, UnusableError


@torch.no_grad()
def wisca_(
    model: nn.Module,
    qk: Level | None = "tensor",
    vo: Level | None = "tensor",
    *,
    mlp: Level | None = None,
    lora: Level | None = "tensor",
    norm: Norm = "l1",
    optimizer: AnyOptimizer | None = None,
    covariant: bool = True,
    frozen: bool = False,
    adapters: Sequence[AttentionAdapter] = ADAPTERS,
) -> Report:
    """Move `model` in place to the equivalent model whose pairs have equal norms.

    qk, vo: one factor per layer ("tensor"), per key head ("head") or per coordinate ("row"; per
    rotary pair for queries and keys); None leaves the pair alone. mlp: up against down projection
    of gated feed-forward layers (no "head"). lora: A against B of low-rank adapters, per adapter or
    per rank ("row"). norm: "l1" (the paper's: the sum of absolute entries) or "l2". optimizer: its
    state follows, unless `covariant` is False. frozen: also rescale attention and feed-forward
    weights that do not train; an adapter trained afterwards fits the rescaled base only, so keep
    that base. Once is enough, since frozen weights stay balanced.

    Weights are float32 masters; 16-bit ones are multiplied by powers of two. A KV cache filled
    before is invalid. Under FSDP2 and DTensor every process calls it. Raises ConfigError when the
    model has nothing to rescale, with the reasons.
    """
    report = Report()
    wanted: dict[Kind, Level | None] = {"qk": qk, "vo": vo, "mlp": mlp, "lora": lora}
    _check_levels(wanted, norm)
    found = list(_pairs(model, wanted, adapters, report.skipped))
    pairs = distinct(found, report.skipped.__setitem__)
    pairs = [pair for pair in pairs if _trains(pair, frozen, report.skipped)]
    if optimizer is not None and covariant:
        check_state(optimizer, (m.parameter for pair in pairs for m in pair.members))
    for pair in pairs:
        level = wanted[pair.kind]
        assert level is not None
        done = balance(pair, level, norm, optimizer, covariant)
        if done is None:
            report.skipped[f"{pair.name} {pair.kind}"] = "a side is zero or not finite"
        else:
            report.pairs.append(done)
    if not found and BENT not in report.skipped.values():
        reasons = "; ".join(f"{name}: {why}" for name, why in list(report.skipped.items())[:3])
        raise ConfigError(
            f"wisca found nothing to rescale in {type(model).__name__}"
            f"{f' ({reasons})' if reasons else ''}; describe its attention with an adapter: "
            "wisca_(model, adapters=[mine, *ADAPTERS]), see docs/methods/wisca.md"
        )
    return report


def _check_levels(wanted: dict[Kind, Level | None], norm: str) -> None:
    for kind, level in wanted.items():
        heads = ("head",) if kind in ("qk", "vo") else ()
        allowed = (None, "tensor", *heads, "row")
        if level not in allowed:
            raise ConfigError(
                f"wisca {kind} is {level!r}; expected one of "
                f"{', '.join(str(each) for each in allowed)}"
            )
    if norm not in ("l1", "l2"):
        raise ConfigError(f"wisca norm is {norm!r}; expected l1 or l2")
    if not any(wanted.values()):
        raise ConfigError("wisca has nothing to do: qk, vo, mlp and lora are all None")


def _pairs(
    model: nn.Module,
    wanted: dict[Kind, Level | None],
    adapters: Sequence[AttentionAdapter],
    skipped: dict[str, str],
) -> Iterator[Pair]:
    """All pairs wanted, in the model's order; what is recognised and left goes to `skipped`."""

    def attempt(name: str, make: Callable[[], Pair | None]) -> Iterator[Pair]:
        try:
            pair = make()
        except UnusableError as error:
            skipped[name] = str(error)
        else:
            if pair is not None:
                yield pair

    for name, module in model.named_modules():
        if wanted["qk"] or wanted["vo"]:
            site = _site(name, module, adapters, skipped)
            if site is not None and wanted["qk"]:
                yield from attempt(f"{name} qk", site.qk)
            if site is not None and wanted["vo"]:
                yield from attempt(f"{name} vo", site.vo)
        if wanted["mlp"]:
            yield from attempt(f"{name} mlp", partial(gated_mlp, name, module))
        if wanted["lora"]:
            yield from low_rank(name, module, skipped.__setitem__)


def _site(
    name: str,
    module: nn.Module,
    adapters: Sequence[AttentionAdapter],
    skipped: dict[str, str],
) -> Site | None:
    """What the first adapter that knows `module` says of it."""
    for adapter in adapters:
        try:
            site = adapter(name, module)
        except UnusableError as error:
            skipped[name] = str(error)
            return None
        if site is not None:
            return site
    return None


def _trains(pair: Pair, frozen: bool, skipped: dict[str, str]) -> bool:
    if frozen or all(m.parameter.requires_grad for m in pair.members if m.measured):
        return True
    skipped[f"{pair.name} {pair.kind}"] = "its weights are frozen (frozen=True includes them)"
    return False


@dataclass
class WiscaCallback(Callback):
    """`wisca_` before the first step (`at_init`) and after every `every`-th one (0: never).

    The other fields are those of `wisca_`; frozen weights stay as they are. A resumed run keeps the
    phase: steps are counted from the start of training. Adds to the step's metrics, when it acts,
    wisca_qk, wisca_vo, wisca_mlp and wisca_lora: the mean of |log(left norm / right norm)| found.
    """

    every: int = 250
    at_init: bool = True
    qk: Level | None = "tensor"
    vo: Level | None = "tensor"
    mlp: Level | None = None
    lora: Level | None = "tensor"
    norm: Norm = "l1"
    covariant: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"wisca every is {self.every}; expected 0 (never) or more steps")
        _check_levels({"qk": self.qk, "vo": self.vo, "mlp": self.mlp, "lora": self.lora}, self.norm)
        self.last: Report | None = None

    def on_train_start(self, step: int, model: nn.Module, optimizer: AnyOptimizer) -> None:
        if step == 0 and self.at_init:
            self._rescale(model, optimizer)

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: AnyOptimizer, metrics: Metrics
    ) -> None:
        if self.every and step % self.every == 0:
            report = self._rescale(model, optimizer)
            for kind in get_args(Kind):
                imbalance = report.imbalance(kind)
                if imbalance is not None:
                    metrics[f"wisca_{kind}"] = imbalance

    def _rescale(self, model: nn.Module, optimizer: AnyOptimizer) -> Report:
        self.last = wisca_(
            model,
            self.qk,
            self.vo,
            mlp=self.mlp,
            lora=self.lora,
            norm=self.norm,
            optimizer=optimizer,
            covariant=self.covariant,
        )
        return self.last
