"""What annealing an adapter's activation is worth: AFA-LoRA beside LoRA, rsLoRA, DoRA, all weights.

Expressiveness. A frozen matrix W0 [32, 32] and the target y = W0 x + B* relu(A* x), B* and A* of
the adapter's rank 4, Gaussian x. Reported per method: the share of the target's energy that is left
after training, |y - y'|^2 / |y - W0 x|^2, beside that of the best linear map (`linear_floor`).
"non-linear" keeps beta = 1, fits, and cannot be merged; AFA-LoRA ends as a plain LoRA.

Adaptation. serval-tiny, trained on Python, learns another register that every machine with Serval
has: the C++ headers that PyTorch brings. Files go to training, validation or test by a hash of
their text. Methods at rank 2, 8 and 32 on all linear layers of the blocks, and all weights. Each
takes the best of three learning rates on validation rows (first seed; more where the best is at the
edge); reported is the loss on test rows over five seeds, which draw the adapters and the training
rows, the differences to LoRA's seed by seed, and how much of the gap from LoRA to all weights is
closed.

LoRA, rsLoRA and AFA-LoRA run in Serval's layer, which gives PEFT's bits
(`tests/adapt/test_peft.py`); DoRA is PEFT's, put into the same decoder.

Every finished run is kept (`SERVAL_BENCH_DIR`), so an interrupted benchmark continues with the
next.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from serval.adapt.annealing import Anneal, Annealing
from serval.adapt.lora import LoraLinear, LoraOptions, adaptable, add_adapters, set_beta
from serval.bench.harness import Case, MissingPeerError, Setup
from serval.bench.training_runs import (
    Curve,
    Once,
    Shuffled,
    Text,
    best_rate,
    kept,
    kept_path,
    of_seeds,
    paired,
    trained,
)
from serval.data.sources import split_of
from serval.data.tokenizer import load_tokenizer
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.decoder import Decoder
from serval.optim import OptimizerOptions, build
from serval.optim.schedules import Cosine
from serval.train.cpu import fast_linears
from serval.train.loop import Settings, Trainer
from serval.train.reporting import Callback
from serval.train.stream import Row, next_token_targets

ADAPTERS = ("lora", "rslora", "dora", "afa-lora")
RANKS = (2, 8, 32)
SEEDS = 5
ALPHA = 16.0
RATES = (5e-3, 1e-2, 2e-2)
FULL_RATES = (5e-4, 1e-3, 2e-3)
HEADERS = ("c10", "torch/csrc", "ATen/native", "ATen/cpu", "ATen/core", "ATen/cuda")


@dataclass(frozen=True)
class Size:
    """Of the adaptation. Rows are windows of one file each; `pool` of them are drawn from by the
    seeds, each of which trains on steps x batch_rows."""

    steps: int = 80
    batch_rows: int = 2
    row_tokens: int = 128
    pool: int = 640
    validation_rows: int = 48
    test_rows: int = 128
    warmup: int = 5


FULL = Size()
QUICK = Size(steps=4, row_tokens=64, pool=16, validation_rows=2, test_rows=2, warmup=1)


@dataclass(frozen=True)
class Run:
    """One adaptation; its result is kept under a name made of all these. rank: 0 for full."""

    size: Size
    method: str
    rank: int
    lr: float
    seed: int

    def result(self, base: Base, note: Callable[[str], None]) -> dict[str, Any]:
        """{"curve": [[step, validation loss]], "test": loss, "trained": parameters, ...}."""
        title = f"{self.method} rank {self.rank} lr {self.lr:g} seed {self.seed}"
        return trained(self.path(base), lambda: adapt(self, base), title, note)

    def path(self, base: Base) -> Path:
        facts = dataclasses.asdict(self) | {"alpha": ALPHA, "model": base.digest}
        return kept_path("afa-lora", f"{self.method}-r{self.rank}", facts)


class Base:
    """The model that is adapted and the text it is adapted to, each read when first needed."""

    def __init__(self, size: Size) -> None:
        source = shipped_model()
        stat = (source / "model.safetensors").stat()
        self.digest = f"{stat.st_size}, torch {torch.__version__}"
        self.decoder = Once(lambda: checkpoint.load(source, dtype=torch.float32))
        self.text = Once(lambda: make_text(load_tokenizer(source), headers(), size))

    def untuned(self) -> float:
        """Test loss of the model as it is."""
        trainer = _trainer(self.decoder(), self.text(), FULL, 1.0, 0, [])
        return loss_on(trainer, self.text().test)


def headers() -> list[str]:
    """The C++ headers that PyTorch installs, sorted by path; generated ones left out."""
    root = Path(torch.__file__).parent / "include"
    files = [file for name in HEADERS for file in sorted((root / name).rglob("*.h"))]
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def make_text(tokenizer: Any, texts: list[str], size: Size) -> Text:
    """Windows of `row_tokens` tokens: of a tenth of the texts for validation, another for test."""
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        part = split_of(text, 0.2)
        if part == "validation" and split_of("half " + text, 0.5) == "train":
            part = "test"
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= size.row_tokens:
            parts[part].append(torch.tensor(ids))

    def windows(part: str, count: int) -> list[Row]:
        draw = Random(part)
        rows: list[Row] = []
        for _ in range(count):
            ids = draw.choice(parts[part])
            start = draw.randrange(len(ids) - size.row_tokens + 1)
            rows.append((ids[start : start + size.row_tokens], [size.row_tokens], None))
        return rows

    return Text(
        windows("train", size.pool),
        windows("validation", size.validation_rows),
        windows("test", size.test_rows),
    )


def adapt(run: Run, base: Base) -> dict[str, Any]:
    """Adapt once; see `Run.result`."""
    torch.manual_seed(run.seed)
    decoder = copy.deepcopy(base.decoder())
    decoder, callbacks = prepare(decoder, run.method, run.rank, run.size.steps)
    curve = Curve()
    trainer = _trainer(decoder, base.text(), run.size, run.lr, run.seed, [*callbacks, curve])
    trainer.fit(resume=False)
    count = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    return {"curve": curve.points, "test": loss_on(trainer, base.text().test), "trained": count}


def prepare(decoder: Decoder, method: str, rank: int, steps: int) -> tuple[Decoder, list[Callback]]:
    """Put adapters into `decoder`; raises MissingPeerError for DoRA without PEFT."""
    if method == "full":
        return decoder, []
    if method == "dora":
        return _with_dora(decoder, rank), []
    activation = "relu" if method == "afa-lora" else None
    rslora = method == "rslora"
    add_adapters(decoder, LoraOptions(rank, ALPHA, rslora=rslora, activation=activation))
    return decoder, [Anneal(Annealing(steps))] if activation else []


def _with_dora(decoder: Decoder, rank: int) -> Decoder:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingPeerError("PEFT", "pip install 'serval-llm[adapt]'") from error
    decoder.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=int(ALPHA), use_dora=True, target_modules=list(adaptable(decoder))
    )
    inject_adapter_in_model(config, decoder)
    return decoder


def _trainer(
    decoder: Decoder, text: Text, size: Size, lr: float, seed: int, callbacks: list[Callback]
) -> Trainer:
    return Trainer(
        decoder,
        lambda model: build("adamw", model, OptimizerOptions(lr=lr, weight_decay=0.0)),
        Cosine(size.steps, size.warmup),
        Shuffled(text.training, seed),
        Settings(size.steps, size.batch_rows, size.batch_rows),
        validation=text.validation,
        callbacks=callbacks,
        note=lambda line: None,
    )


def loss_on(trainer: Trainer, rows: Sequence[Row]) -> float:
    """Mean loss over rows that the training did not see."""
    trainer.validation, trainer.callbacks = [next_token_targets(row) for row in rows], []
    with fast_linears(trainer.decoder):
        return trainer.validate()


# -- expressiveness -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """The layer of the expressiveness experiment. Adam, its rate falling over the last half."""

    width: int = 32
    rank: int = 4
    steps: int = 1500
    batch: int = 256
    lr: float = 1e-2


TOYS = {"lora": None, "afa-lora": 0.3, "non-linear": 1.0}  # method -> end of the annealing


def fit_layer(toy: Toy, method: str, seed: int) -> dict[str, float]:
    """Train one layer; {"left": share of the target's energy, "floor": that of the best linear
    map}."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    torch.manual_seed(seed)
    base = nn.Linear(toy.width, toy.width, bias=False)
    a, b = draw(toy.rank, toy.width) / toy.width**0.5, draw(toy.width, toy.rank)
    activation = None if method == "lora" else "relu"
    layer = LoraLinear(base, LoraOptions(toy.rank, 2.0 * toy.rank, activation=activation))
    optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=toy.lr)
    end = TOYS[method]
    annealing = Annealing(toy.steps, end=end) if method == "afa-lora" and end else None

    def target(x: Tensor) -> Tensor:
        return (x @ a.T).relu() @ b.T

    for step in range(toy.steps):
        if annealing is not None:
            set_beta(layer, annealing.beta(step))
        for group in optimizer.param_groups:
            group["lr"] = toy.lr * min(1.0, 2 * (1 - step / toy.steps))
        x = draw(toy.batch, toy.width)
        loss = (layer(x) - base(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if annealing is not None:
        set_beta(layer, annealing.beta(toy.steps))
    x = draw(8192, toy.width)
    with torch.no_grad():
        left = (layer(x) - base(x) - target(x)).square().sum() / target(x).square().sum()
    return {"left": float(left), "floor": linear_floor(a, b)}


def linear_floor(a: Tensor, b: Tensor) -> float:
    """The share of E|B relu(A x)|^2 that no linear map of a Gaussian x explains.

    a [r, d], b [d, r]. The best map is E[relu(A x) x^T] = A / 2; the energy follows from the
    arc-cosine kernel E[relu(u) relu(v)] = |u||v| (sin t + (pi - t) cos t) / 2 pi.
    """
    a, b = a.double(), b.double()
    norms = a.norm(dim=1)
    cosine = (a @ a.T / norms.outer(norms)).clamp(-1, 1)
    angle = cosine.arccos()
    second = norms.outer(norms) * (angle.sin() + (torch.pi - angle) * cosine) / (2 * torch.pi)
    energy = float((b.T @ b * second).sum())
    return 1 - float((0.5 * b @ a).square().sum()) / energy


def _expressiveness(setup: Setup, seeds: range) -> list[Case]:
    toy = Toy(steps=20) if setup.quick else Toy()
    cases = []
    for method in TOYS:
        name = f"expressiveness-{method}"
        if not setup.wants(name):
            continue
        found = [_fitted(toy, method, seed) for seed in seeds]
        metrics = of_seeds([run["left"] for run in found], "energy_left")
        metrics["linear_floor"] = statistics.mean(run["floor"] for run in found)
        metrics["rank"] = toy.rank
        cases.append(Case(name, None, metrics=metrics))
        setup.note(f"  {name}: {metrics['energy_left']:.3f} of the energy left")
    return cases


def _fitted(toy: Toy, method: str, seed: int) -> dict[str, Any]:
    path = kept_path("afa-lora", method, [dataclasses.asdict(toy), seed])
    return kept(path, lambda: dict(fit_layer(toy, method, seed)))


# -- the benchmark --------------------------------------------------------------------------------


def collect(setup: Setup) -> list[Case]:
    """One case per method of the layer; one per method and rank of the model, beside all weights
    and the untuned model. At least 91 adaptations of five to ten seconds on two cores."""
    size = QUICK if setup.quick else FULL
    ranks = RANKS[:1] if setup.quick else RANKS
    seeds = range(2 if setup.quick else SEEDS)
    cases = _expressiveness(setup, seeds)
    base = Base(size)
    if setup.wants("untuned"):
        path = kept_path("afa-lora", "untuned", [dataclasses.asdict(size), base.digest])
        loss = kept(path, lambda: {"loss": base.untuned()})["loss"]
        cases.append(Case("untuned", None, metrics={"test_loss": loss}))
    wanted = {
        rank: [method for method in ADAPTERS if setup.wants(f"{method}-r{rank}")] for rank in ranks
    }
    if not (setup.wants("full") or any(wanted.values())):
        return cases
    full = _method(setup, base, size, "full", 0, seeds)  # what every gap is measured to
    if setup.wants("full"):
        cases.append(Case("full", None, metrics=full))
    for rank, methods in wanted.items():
        if not methods:
            continue
        plain = _method(setup, base, size, "lora", rank, seeds)
        for method in methods:
            case = Case(f"{method}-r{rank}", None)
            cases.append(case)
            try:
                case.metrics = _method(setup, base, size, method, rank, seeds)
            except MissingPeerError as error:
                case.peer, case.missing = error.peer, error.install
                continue
            if method != "lora":
                case.metrics |= paired(case.metrics["losses"], plain["losses"], "lora")
            gap = plain["test_loss"] - full["test_loss"]
            closed = plain["test_loss"] - case.metrics["test_loss"]
            case.metrics["gap_closed"] = closed / gap
    return cases


def _method(
    setup: Setup, base: Base, size: Size, method: str, rank: int, seeds: range
) -> dict[str, Any]:
    """Metrics of one method at its best rate; a finished one is read again from what is kept."""
    rates = FULL_RATES if method == "full" else RATES

    def run(lr: float, seed: int) -> dict[str, Any]:
        return Run(size, method, rank, lr, seed).result(base, setup.note)

    chosen = rates[:1] if setup.quick else rates
    best, edge = best_rate(chosen, lambda lr: run(lr, 0)["curve"][-1][1])
    found = [run(best, seed) for seed in seeds]
    facts: dict[str, Any] = {"method": method, "lr": best, "lr_at_edge": edge}
    if rank:
        facts["rank"] = rank
    return (
        facts
        | of_seeds([each["test"] for each in found], "test_loss")
        | {
            "validation_loss": statistics.mean(each["curve"][-1][1] for each in found),
            "trained_parameters": found[0]["trained"],
        }
    )
