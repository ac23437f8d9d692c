"""Pruning a decoder in memory: masks, one training run with distillation, slicing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from serval.adapt.lora import LoraOptions, adapters
from serval.compress.maskprune.distill import DistillationLoss
from serval.compress.maskprune.masks import MaskedDecoder
from serval.compress.maskprune.minimax import MaskOptimizer
from serval.compress.maskprune.pruner import Pruner, Task
from serval.compress.maskprune.units import (
    Costs,
    Levels,
    Measure,
    Site,
    Widths,
    check_budget,
    find_sites,
)
from serval.compress.method import make
from serval.compress.registry import PRUNERS
from serval.errors import ConfigError
from serval.models.decoder import Decoder
from serval.models.variants import require_plain
from serval.optim import MixedOptimizer
from serval.optim.groups import Role
from serval.optim.schedules import WarmupStableDecay
from serval.registry import resolve
from serval.train.distributed import World
from serval.train.loop import Settings, Trainer, best_dtype
from serval.train.reporting import Callback, Metrics
from serval.train.stream import TokenStream, next_token_targets

DEFAULT_KEEP = 0.65
_DECAY = 0.25  # share of the recovery's steps over which learning rates fall


@dataclass(kw_only=True)
class Pruning:
    """What is asked of a pruning.

    method: a name of `PRUNERS`. keep: share of the cost that may stay (None: 0.65, or what the
    widths leave). budget: what the cost is, see `Costs.of`; context: tokens at which FLOPs are
    counted (None: half the model's context). multiple: channels stay in multiples of it.
    key_value_heads, intermediate_size: given widths, instead of `keep`; a kind without one is not
    pruned. steps: of training in all; 0 gives a method that needs none without recovery.
    batch_rows: packed rows of a step; micro_batch_rows: computed at a time. calibration_rows: rows
    that importance is measured on. lora_rank (0: none), lora_lr: of the low-rank updates.
    distillation: factor on KL(original || pruned). dtype: "auto", "float32" or "bfloat16" products.
    settings: fields of the method.
    """

    method: str = "maskprune"
    keep: float | None = None
    budget: Measure = "parameters"
    context: int | None = None
    multiple: int = 8
    key_value_heads: int | None = None
    intermediate_size: int | None = None
    steps: int = 300
    batch_rows: int = 4
    micro_batch_rows: int = 1
    calibration_rows: int = 32
    lora_rank: int = 16
    lora_lr: float = 1e-3
    distillation: float = 1.0
    dtype: str = "auto"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Pruner:
        """The pruner. Raises ConfigError for what can be told to be wrong without the model."""
        least = dict.fromkeys(("steps", "lora_rank", "lora_lr", "distillation", "seed"), 0)
        rows = ("batch_rows", "micro_batch_rows", "calibration_rows")
        least |= dict.fromkeys((*rows, "multiple", "context"), 1)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise ConfigError(f"{name} is {value}; expected at least {bound}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; expected auto, float32 or bfloat16")
        if self.context is not None and self.budget != "flops":
            raise ConfigError(
                f"context is {self.context}, but the budget counts {self.budget}, which do not "
                "depend on it; leave it out, or choose the budget flops"
            )
        given = self.key_value_heads is not None or self.intermediate_size is not None
        if given and self.keep is not None:
            raise ConfigError("give either keep or widths (key_value_heads, intermediate_size)")
        kind = resolve(PRUNERS, self.method, "pruning method")
        pruner: Pruner = make(kind, self.settings, f"method {self.method!r}")
        return pruner

    def widths(self, costs: Costs) -> Widths | None:
        """The given widths, checked; None when there are none."""
        wanted = {"heads": self.key_value_heads, "channels": self.intermediate_size}
        if not any(value is not None for value in wanted.values()):
            return None
        options = {"heads": "key_value_heads", "channels": "intermediate_size"}
        widths = dict(costs.units)
        for kind, value in wanted.items():
            if value is None:
                continue
            most = costs.units.get(kind, 0)  # type: ignore[call-overload]
            if not 0 < value <= most:
                raise ConfigError(f"{options[kind]} is {value}; expected 1 to {most}, the model's")
            widths[kind] = value  # type: ignore[index]
        return widths


@dataclass
class PruningReport:
    """What became of a decoder. widths: units per layer that stayed, by kind, of `units` before.
    fraction: share of the budget's cost that stayed. parameters_before, parameters_after: of the
    whole model. kept: the units by layer. loss: mean training loss of the first and last tenth of
    the steps. facts: the method's own."""

    method: str
    widths: dict[str, int]
    units: dict[str, int]
    fraction: float
    parameters_before: int
    parameters_after: int
    kept: dict[str, list[int]]
    loss: tuple[float, float] | None
    facts: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Losses(Callback):
    """Losses of all steps; tells `progress` how many are done."""

    def __init__(self, steps: int, progress: Callable[[int, int], None] | None) -> None:
        self.steps, self.progress = steps, progress
        self.losses: list[float] = []

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        self.losses.append(metrics["loss"])
        if self.progress is not None:
            self.progress(step, self.steps)

    def summary(self) -> tuple[float, float] | None:
        """Means over the first and the last tenth."""
        tenth = max(1, len(self.losses) // 10)
        if not self.losses:
            return None
        return sum(self.losses[:tenth]) / tenth, sum(self.losses[-tenth:]) / tenth

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]


def prune_decoder(
    decoder: Decoder,
    pruning: Pruning,
    stream: TokenStream,
    *,
    directory: Path | None = None,
    fingerprint: dict[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = print,
) -> tuple[Decoder, PruningReport]:
    """A narrower decoder made of `decoder`, which is spent, and what was done.

    decoder: float32, all parameters trainable. stream: packed rows to train on. directory,
    fingerprint: where an interrupted run is kept, and what must agree to go on with it. progress:
    told the steps done and all steps. note: lines for the user. Raises ConfigError for options that
    do not fit the model, KeyboardInterrupt when training was interrupted.
    """
    begin = perf_counter()
    require_plain(decoder.config, "pruning")
    pruner = pruning.check()
    sites = find_sites(decoder)
    decoder.requires_grad_(True)  # what can be trained is what costs are counted from
    most = decoder.config.max_position_embeddings
    context = pruning.context or most // 2
    if context > most:
        raise ConfigError(f"context is {context}; the model has {most} positions")
    costs = Costs.of(decoder, sites, pruning.budget, context)
    levels = Levels.of(costs, pruning.multiple)
    widths = pruning.widths(costs)
    if widths is not None:
        keep = costs.fraction(widths)
    else:
        keep = DEFAULT_KEEP if pruning.keep is None else pruning.keep
        check_budget(costs, levels, keep)
    before = sum(p.numel() for p in decoder.parameters())
    torch.manual_seed(pruning.seed)
    lora = LoraOptions(pruning.lora_rank, float(pruning.lora_rank)) if pruning.lora_rank else None
    masked = MaskedDecoder(decoder, sites, lora)
    device = decoder.norm.weight.device
    rows = [next_token_targets(stream.next()) for _ in range(pruning.calibration_rows)]
    batches = [row.to(device) for row in rows]
    task = Task(masked, costs, levels, keep, widths, batches, pruning.steps, pruning.seed)
    decoding = pruner.start(task)
    losses = _Losses(pruning.steps, progress)
    if pruning.steps:
        own = [] if decoding is None else [decoding]
        trainer = _trainer(masked, pruning, pruner, stream, directory, fingerprint, note)
        trainer.callbacks += [*own, losses, *callbacks]
        trainer.fit()
        if trainer.interrupted and trainer.step < pruning.steps:
            raise KeyboardInterrupt
    kept = masked.kept()
    final: Widths = {site.kind: len(kept[site.name]) for site in sites}
    pruned = masked.finish()
    report = PruningReport(
        method=pruning.method,
        widths={str(kind): width for kind, width in final.items()},
        units={str(kind): units for kind, units in costs.units.items()},
        fraction=costs.fraction(final),
        parameters_before=before,
        parameters_after=sum(p.numel() for p in pruned.parameters()),
        kept=kept,
        loss=losses.summary(),
        facts=pruner.facts(),
        seconds=perf_counter() - begin,
    )
    return pruned, report


def _trainer(
    masked: MaskedDecoder,
    pruning: Pruning,
    pruner: Pruner,
    stream: TokenStream,
    directory: Path | None,
    fingerprint: dict[str, Any] | None,
    note: Callable[[str], None],
) -> Trainer:
    steps = pruning.steps
    settings = Settings(
        steps=steps,
        batch_rows=pruning.batch_rows,
        micro_batch_rows=pruning.micro_batch_rows,
        dtype=best_dtype(pruning.dtype, masked.decoder.norm.weight.device),
        directory=directory,
        fingerprint=fingerprint,
    )
    return Trainer(
        masked.decoder,
        lambda _: _optimizer(masked, pruning, pruner.mask_rate),
        WarmupStableDecay(steps, min(10, steps // 10), round(_DECAY * pruner.recovery * steps)),
        stream,
        settings,
        loss=DistillationLoss(masked, pruning.distillation),
        world=World(device=masked.decoder.norm.weight.device),
        note=note,
    )


def _optimizer(masked: MaskedDecoder, pruning: Pruning, rate: float) -> MixedOptimizer:
    """Normalised momentum for the masks of each kind, AdamW without decay for the updates."""
    groups = [_mask_group(masked, site, rate) for site in _firsts(masked.sites)]
    optimizers: list[torch.optim.Optimizer] = [MaskOptimizer(groups)]
    updates = {
        f"{name}.{leaf}": parameter
        for name, module in adapters(masked.decoder).items()
        for leaf, parameter in (("lora_A", module.lora_A), ("lora_B", module.lora_B))
    }
    if updates:
        group = _group(updates, pruning.lora_lr, Role.LOW_RANK_FACTOR)
        optimizers.append(torch.optim.AdamW([group], weight_decay=0.0))
    return MixedOptimizer(optimizers)


def _firsts(sites: Sequence[Site]) -> list[Site]:
    """One site of each kind."""
    return list({site.kind: site for site in sites}.values())


def _mask_group(masked: MaskedDecoder, one: Site, rate: float) -> dict[str, Any]:
    masks = {s.name: masked.masks[s.name].mask for s in masked.sites if s.kind == one.kind}
    return _group({f"{name}.mask": mask for name, mask in masks.items()}, rate, Role.BIAS)


def _group(parameters: dict[str, nn.Parameter], rate: float, role: Role) -> dict[str, Any]:
    return {
        "params": list(parameters.values()),
        "names": list(parameters),
        "role": str(role),
        "lr": rate,
        "base_lr": rate,
    }
