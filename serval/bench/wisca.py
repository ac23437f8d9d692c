"""What WISCA is worth: small language models with and without rescaling, paired by seed.

Two models that differ in their key heads only: eight query heads with two (grouped, 4:1) and with
eight (multi-head). Arms, which share weights at the start and the order of the data:

- none: as drawn.
- init: rescaled once, before the first step.
- every-250: also after every 250th step, the paper's interval.
- rates: not rescaled; learning rates of q, k, v and o divided by what `init` would multiply them
  by. For AdamW without decay that is `init` itself but for its epsilon (a test shows it), so what
  it gains is a matter of learning rates.

AdamW without weight decay and without clipping, both of which would see the rescaling. The learning
rate is the best of three (more where the best is at the edge) for the arm `none` of the first seed.
Reported: final validation loss over five seeds, and the difference to `none` seed by seed.

Every finished run is kept (`SERVAL_BENCH_DIR`), so an interrupted benchmark continues with the
next.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serval.bench.harness import Case, Setup
from serval.bench.optim_quality import Size, make_text
from serval.bench.training_runs import (
    Curve,
    Once,
    Shuffled,
    Text,
    best_rate,
    kept_path,
    of_seeds,
    paired,
    trained,
)
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.models.initialize import INITIALIZERS
from serval.optim import MixedOptimizer, OptimizerOptions, build
from serval.optim.schedules import WarmupStableDecay
from serval.registry import resolve
from serval.train.loop import Settings, Trainer
from serval.train.reporting import Callback
from serval.train.wisca import WiscaCallback, wisca_

ARMS = ("none", "init", "every-250", "rates")
KEY_HEADS = {"gqa": 2, "mha": 8}
EVERY = 250
SEEDS = 5
RATES = (2e-3, 4e-3, 8e-3)
FULL = Size(
    steps=800, batch_rows=8, row_tokens=128, validation_rows=64, vocabulary=512, hidden=64, layers=2
)
QUICK = Size(
    steps=6, batch_rows=2, row_tokens=64, validation_rows=2, vocabulary=512, hidden=32, layers=1
)


def model(size: Size, name: str) -> ModelConfig:
    """A decoder of eight query heads of 16 and `KEY_HEADS[name]` key heads."""
    return ModelConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=KEY_HEADS[name],
        head_dim=16,
        intermediate_size=3 * size.hidden,
        max_position_embeddings=size.row_tokens,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Run:
    """One training run; its result is kept under a name made of all these."""

    size: Size
    model: str
    arm: str
    lr: float
    seed: int

    def path(self) -> Path:
        facts = dataclasses.asdict(self) | {"every": EVERY}
        return kept_path("wisca", f"{self.model}-{self.arm}", facts)

    def loss(self, text: Callable[[], Text], note: Callable[[str], None]) -> tuple[float, float]:
        """Final validation loss and seconds, from the kept result or from training now."""
        title = f"{self.model} {self.arm} lr {self.lr:g} seed {self.seed}"
        found = trained(self.path(), lambda: train(self, text()), title, note)
        return found["curve"][-1][1], found["seconds"]


def train(run: Run, text: Text) -> dict[str, Any]:
    """Train once; {"curve": [[step, validation loss], ...]}."""
    size = run.size
    torch.manual_seed(run.seed)
    decoder = Decoder(model(size, run.model))
    resolve(INITIALIZERS, "normal", "initializer")(decoder)
    options = OptimizerOptions(lr=run.lr, weight_decay=0.0)
    factors = rescaling(decoder) if run.arm == "rates" else {}

    def optimizer(module: nn.Module) -> MixedOptimizer:
        made = build("adamw", module, options)
        divide_rates(made, factors)
        return made

    curve = Curve()
    callbacks: list[Callback] = [curve]
    if run.arm in ("init", "every-250"):
        callbacks.append(WiscaCallback(every=EVERY if run.arm == "every-250" else 0))
    trainer = Trainer(
        decoder,
        optimizer,
        WarmupStableDecay(size.steps, size.steps // 20, size.steps // 4),
        Shuffled(text.training, run.seed),
        Settings(
            steps=size.steps,
            batch_rows=size.batch_rows,
            micro_batch_rows=size.batch_rows,
            clip_norm=0.0,
            validate_every=max(1, size.steps // 8),
        ),
        validation=text.validation,
        callbacks=callbacks,
        note=lambda line: None,
    )
    trainer.fit(resume=False)
    return {"curve": curve.points}


@torch.no_grad()
def rescaling(decoder: Decoder) -> dict[str, float]:
    """By what WISCA would multiply each of its weights: {parameter name: factor}."""
    rescaled = copy.deepcopy(decoder)
    wisca_(rescaled)
    after = dict(rescaled.named_parameters())
    sizes = {
        name: (float(before.abs().sum()), float(after[name].abs().sum()))
        for name, before in decoder.named_parameters()
        if not torch.equal(before, after[name])
    }
    return {name: then / now for name, (now, then) in sizes.items()}


def divide_rates(optimizer: MixedOptimizer, factors: dict[str, float]) -> None:
    """Give every parameter in `factors` a group of its own, its learning rate divided by it."""
    for each in optimizer.optimizers:
        for group in list(each.param_groups):
            members = list(zip(group["names"], group["params"], strict=True))
            stay = [(name, p) for name, p in members if name not in factors]
            group["names"] = [name for name, _ in stay]
            group["params"] = [p for _, p in stay]
            for name, parameter in members:
                if name in factors:
                    rates = {key: group[key] / factors[name] for key in ("lr", "base_lr")}
                    own = {**group, **rates, "names": [name], "params": [parameter]}
                    each.add_param_group(own)
        each.param_groups[:] = [group for group in each.param_groups if group["params"]]


def collect(setup: Setup) -> list[Case]:
    """One case per model and arm; at least 44 runs."""
    size = QUICK if setup.quick else FULL
    seeds = range(2 if setup.quick else SEEDS)
    text = Once(lambda: make_text(size))

    def run(name: str, arm: str, lr: float, seed: int) -> tuple[float, float]:
        return Run(size, name, arm, lr, seed).loss(text, setup.note)

    cases: list[Case] = []
    for name in KEY_HEADS:
        wanted = [arm for arm in ARMS if setup.wants(f"{arm}-{name}")]
        if not wanted:
            continue
        rates = RATES[:1] if setup.quick else RATES

        def plainly(lr: float, name: str = name) -> float:
            return run(name, "none", lr, 0)[0]

        best, edge = best_rate(rates, plainly)
        facts = {"lr": best, "lr_at_edge": edge}
        plain = [run(name, "none", best, seed)[0] for seed in seeds]
        for arm in wanted:
            results = [run(name, arm, best, seed) for seed in seeds]
            losses = [loss for loss, _ in results]
            metrics = facts | of_seeds(losses)
            if arm != "none":
                metrics |= paired(losses, plain, "none")
            metrics["seconds_per_run"] = statistics.mean(seconds for _, seconds in results)
            cases.append(Case(f"{arm}-{name}", None, metrics=metrics))
    return cases
