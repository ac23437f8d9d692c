"""What an optimizer is worth: AdamW, Muon, MONA and MONA-Lite train small language models.

A dense model and a mixture of experts on the text of the Python standard library. Each optimizer
takes the best of three learning rates (first seed; more where the best is at the edge), then trains
with two more seeds, which change weights and the order of the data. Reported per optimizer: final
validation loss, mean and spread over seeds; the share of AdamW's tokens after which it is first at
AdamW's mean final loss; the largest eigenvalue of the loss's Hessian at the end, by power
iteration.

Every finished run is kept (`SERVAL_BENCH_DIR`), so an interrupted benchmark continues with the
next. MONA's beta is 0.95 and not its default: a horizon of 20 steps in a run of 250.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serval.bench.harness import Case, Setup
from serval.bench.shapes import cache_directory
from serval.bench.training_runs import (
    Curve,
    Once,
    Shuffled,
    Text,
    best_rate,
    kept_path,
    of_seeds,
    trained,
)
from serval.data.options import DataOptions, build
from serval.models.config import ModelConfig, MoEConfig
from serval.models.decoder import Decoder
from serval.models.initialize import INITIALIZERS
from serval.optim import OptimizerOptions
from serval.optim import build as build_optimizer
from serval.optim.schedules import WarmupStableDecay
from serval.registry import resolve
from serval.train.cpu import fast_linears
from serval.train.loop import Settings, Trainer, best_dtype
from serval.train.stream import Row, Targets, next_token_targets

OPTIMIZERS = ("adamw", "muon", "mona", "mona-lite")
SEEDS = 3
MONA_BETA = 0.95
# AdamW's range lies lower; the others scale their updates to AdamW's size.
RATES = {"adamw": (1e-3, 2e-3, 4e-3)}
MATRIX_RATES = (4e-3, 8e-3, 1.6e-2)


@dataclass(frozen=True)
class Size:
    """Of the experiment. Rows are packed documents; a step trains on `batch_rows` of them."""

    steps: int = 250
    batch_rows: int = 16
    row_tokens: int = 256
    validation_rows: int = 32
    vocabulary: int = 1024
    hidden: int = 96
    layers: int = 3
    products: int = 10  # Hessian-vector products of the power iteration
    curvature_rows: int = 8

    def models(self) -> dict[str, ModelConfig]:
        """The dense model and the mixture, about equal in computation per token."""
        dense = ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=3 * self.hidden,
            max_position_embeddings=self.row_tokens,
            tie_word_embeddings=True,
        )
        moe = MoEConfig(num_experts=8, top_k=2, intermediate_size=self.hidden)
        return {"dense": dense, "moe": dataclasses.replace(dense, moe=moe)}


QUICK = Size(8, 2, 64, 2, 512, 32, 1, 3, 1)


@dataclass(frozen=True)
class Run:
    """One training run; its result is kept under a name made of all these."""

    size: Size
    model: str
    optimizer: str
    lr: float
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation. Small experts spend more in casts than bfloat16 products save."""
        return torch.float32 if self.model == "moe" else best_dtype("auto", torch.device("cpu"))

    def path(self) -> Path:
        facts = dataclasses.asdict(self) | {"mona_beta": MONA_BETA, "dtype": str(self.dtype)}
        return kept_path("optim-quality", f"{self.model}-{self.optimizer}", facts)

    def result(self, text: Callable[[], Text], note: Callable[[str], None]) -> dict[str, Any]:
        """The kept result, or that of training now."""
        title = f"{self.model} {self.optimizer} lr {self.lr:g} seed {self.seed}"
        return trained(self.path(), lambda: train(self, text()), title, note)


def make_text(size: Size) -> Text:
    """Rows of the standard library's sources."""
    options = DataOptions.model_validate(
        {
            "row_tokens": size.row_tokens,
            "tokenizer": {"vocab_size": size.vocabulary},
            "cache": str(cache_directory() / "optim-quality" / "text"),
        }
    )
    data = build(options, 0)
    count = size.steps * size.batch_rows
    return Text(
        [data.train.next() for _ in range(count)],
        [data.validation.next() for _ in range(size.validation_rows)],
    )


def train(run: Run, text: Text) -> dict[str, Any]:
    """Train once; {"curve": [[step, validation loss], ...], "eigenvalue": float}."""
    size = run.size
    torch.manual_seed(run.seed)
    decoder = Decoder(size.models()[run.model])
    resolve(INITIALIZERS, "normal", "initializer")(decoder)
    options = OptimizerOptions(lr=run.lr, mona_beta=MONA_BETA)
    settings = Settings(
        steps=size.steps,
        batch_rows=size.batch_rows,
        micro_batch_rows=min(8, size.batch_rows),
        dtype=run.dtype,
        validate_every=max(1, size.steps // 15),
    )
    curve = Curve()
    trainer = Trainer(
        decoder,
        lambda model: build_optimizer(run.optimizer, model, options),
        WarmupStableDecay(size.steps, size.steps // 20, size.steps // 4),
        Shuffled(text.training, run.seed),
        settings,
        validation=text.validation,
        callbacks=[curve],
        note=lambda line: None,
    )
    trainer.fit(resume=False)
    eigenvalue = curvature(trainer, text.training[: size.curvature_rows], size.products)
    return {"curve": curve.points, "eigenvalue": eigenvalue}


def curvature(trainer: Trainer, rows: Sequence[Row], products: int) -> float:
    """Largest eigenvalue of the Hessian of the mean loss over `rows`, in float32."""
    parameters = [p for p in trainer.decoder.parameters() if p.requires_grad]
    batches = Targets.grouped([next_token_targets(row) for row in rows], min(8, len(rows)))
    total = sum(float(batch.weights.sum()) for batch in batches)

    def gradient() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        for batch in batches:
            trainer.loss(batch)[0].backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad / total for p in parameters]

    trainer.loss.train()
    with fast_linears(trainer.decoder):
        return largest_eigenvalue(gradient, parameters, products)


@torch.no_grad()
def largest_eigenvalue(
    gradient: Callable[[], list[Tensor]],
    parameters: Sequence[Tensor],
    products: int,
    step: float = 1e-2,
) -> float:
    """Most positive eigenvalue of the Hessian, by power iteration from a seeded direction.

    gradient: of the loss at the parameters' present values. Products H v are central differences of
    gradients, `step` apart on either side for a unit v: the kernels' gradients cannot be
    differentiated again. When the iteration finds a negative eigenvalue, it is repeated with H
    shifted by it. The parameters come back unchanged.
    """
    saved = [p.detach().clone() for p in parameters]

    def product(v: list[Tensor]) -> list[Tensor]:
        slopes = []
        for sign in (1.0, -1.0):
            for parameter, origin, direction in zip(parameters, saved, v, strict=True):
                parameter.copy_(origin + sign * step * direction)
            with torch.enable_grad():
                slopes.append(gradient())
        return [(high - low) / (2 * step) for high, low in zip(*slopes, strict=True)]

    def dominant(shift: float) -> float:
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        value = 0.0
        for _ in range(products):
            norm = math.sqrt(_dot(v, v))
            v = [x / norm for x in v]
            hv = [y - shift * x for x, y in zip(v, product(v), strict=True)]
            value, v = _dot(v, hv), hv
        return value + shift

    try:
        value = dominant(0.0)
        return value if value >= 0 else dominant(value)
    finally:
        for parameter, origin in zip(parameters, saved, strict=True):
            parameter.copy_(origin)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(left, right, strict=True))


def collect(setup: Setup) -> list[Case]:
    """One case per model and optimizer; at least 40 runs of half a minute to a minute each."""
    size = QUICK if setup.quick else Size()
    text = Once(lambda: make_text(size))
    cases: list[Case] = []
    for model in size.models():
        names = [f"{name}-{model}" for name in OPTIMIZERS]
        wanted = [name for name in names if setup.wants(name)]
        if not wanted:
            continue
        setup.note(model)
        final: dict[str, list[dict[str, Any]]] = {}
        rates: dict[str, dict[str, Any]] = {}
        for optimizer in OPTIMIZERS:
            # AdamW's loss is what the others are compared with
            if optimizer == "adamw" or f"{optimizer}-{model}" in wanted:
                rates[optimizer], final[optimizer] = _best(setup, size, model, optimizer, text)
        target = statistics.mean(run["curve"][-1][1] for run in final["adamw"])
        for optimizer, runs in final.items():
            if f"{optimizer}-{model}" in wanted:
                metrics = rates[optimizer] | summary(runs, target)
                cases.append(Case(f"{optimizer}-{model}", None, metrics=metrics))
    return cases


def _best(
    setup: Setup, size: Size, model: str, optimizer: str, text: Callable[[], Text]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best learning rate with the first seed, and the runs of all seeds with it."""
    rates = RATES.get(optimizer, MATRIX_RATES)

    def run(lr: float, seed: int) -> dict[str, Any]:
        return Run(size, model, optimizer, lr, seed).result(text, setup.note)

    quick = setup.quick
    best, edge = best_rate(rates[:1] if quick else rates, lambda lr: run(lr, 0)["curve"][-1][1])
    runs = [run(best, seed) for seed in range(1 if quick else SEEDS)]
    return {"lr": best, "lr_at_edge": edge}, runs


def summary(runs: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """Metrics of one optimizer's runs. target: AdamW's mean final loss."""
    losses = [run["curve"][-1][1] for run in runs]
    reached = [first_below(run["curve"], target) for run in runs]
    metrics = of_seeds(losses) | {
        "eigenvalue": statistics.mean(run["eigenvalue"] for run in runs),
        "seconds_per_run": statistics.mean(run["seconds"] for run in runs),
    }
    known = [share for share in reached if share is not None]
    metrics["reached_adamw"] = f"{len(known)}/{len(runs)}"
    if known:
        metrics["share_of_tokens_to_adamw"] = statistics.mean(known)
    return metrics


def first_below(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Share of the run after which the loss is first at or below `target`, interpolated between
    validations; None if never."""
    last = curve[-1][0]
    before: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return step / last
            part = (before[1] - target) / (before[1] - loss)
            return (before[0] + part * (step - before[0])) / last
        before = (step, loss)
    return None
