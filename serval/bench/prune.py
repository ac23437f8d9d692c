"""What pruning costs in quality and gains in speed: MaskPrune against one-shot rankings.

serval-tiny keeps 80, 65 and 50 % of its parameters. Every method has the same recovery budget after
its units are gone: as many steps on rows of the model's own recipe, with the same low-rank updates,
masks and distillation. MaskPrune trains before that too, while it learns its masks; "taylor-long"
is Taylor's ranking that recovers for as many steps as MaskPrune trains in all, the fair peer at
equal compute. The one-shot rankings get the widths that MaskPrune learnt; "taylor-even" keeps the
same share of heads and of channels instead, which shows what the learnt split is worth. Three seeds
change the order of the rows (those that rank the units among them), the updates and the lots; every
ranking has the widths that MaskPrune learnt with its seed. Quality is
measured with `quality.Yardstick` on held-out text and questions of half the context.

tokens/s of the narrower models and the whole one are measured in turn; the ratio is of decoding.
Every finished run is kept (`SERVAL_BENCH_DIR`), so an interrupted benchmark continues with the
next.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import serval
from serval.bench.harness import Case, Setup
from serval.bench.quality import Effort, Quality, Yardstick
from serval.bench.shapes import cache_directory
from serval.bench.training_runs import Shuffled, kept, kept_path, paired
from serval.compress.maskprune import Pruning, prune_decoder
from serval.compress.maskprune.rows import RECIPE, RowStream, make_stream
from serval.engine.llm import LLM
from serval.evaluate.shipped import shipped_model
from serval.evaluate.speed import measure_speeds
from serval.models import checkpoint
from serval.models.decoder import Decoder
from serval.train.stream import Row

EVEN, LONG = "taylor-even", "taylor-long"
ONE_SHOT = ("taylor", LONG, "wanda", "magnitude", "uniform", "random")
METHODS = ("maskprune", *ONE_SHOT, EVEN)
PHASES = {"warmup": 0.1, "ramp": 0.3, "kill": 0.2}
SEEDS = 3
REVISION = 2  # of the methods: results kept by an earlier one are computed again
RECOVERY = 1 - sum(PHASES.values())  # share of MaskPrune's steps


@dataclass(frozen=True)
class Size:
    """Of the experiment. keeps: shares of the parameters; steps: of MaskPrune, recovery included;
    length: tokens of a row; prompt, output: tokens of the speed measurement, repeated `repeats`
    times."""

    keeps: tuple[float, ...] = (0.8, 0.65, 0.5)
    steps: int = 125
    batch_rows: int = 2
    length: int = 1024
    calibration_rows: int = 16
    prompt: int = 512
    output: int = 64
    repeats: int = 5


FULL, FULL_EFFORT = Size(), Effort(context_tokens=1024)
QUICK = Size((0.65,), 20, 1, 64, 2, 32, 4, 1)
QUICK_EFFORT = Effort(256, 128, context_tokens=96, questions=2, layer_tokens=64)


class Bench:
    """The model, its text and its measure, each made when it is first needed."""

    def __init__(self, size: Size, effort: Effort, seeds: int, note: Callable[[str], None]) -> None:
        self.size, self.effort, self.seeds, self.note = size, effort, range(seeds), note
        self.source = shipped_model()
        self.folder = cache_directory() / "prune"

    @cached_property
    def yardstick(self) -> Yardstick:
        return Yardstick(self.source, self.effort)

    @cached_property
    def rows(self) -> list[Row]:
        """All rows that one run reads, in order."""
        size = self.size
        count = size.calibration_rows + size.steps * size.batch_rows
        decoder = self.load()
        stream = make_stream(
            RECIPE,
            self.source,
            decoder.config,
            lambda: decoder,
            rows=count,
            length=size.length,
            cache=self.folder / "text",
        )
        return [stream.next() for _ in range(count)]

    def load(self) -> Decoder:
        return checkpoint.load(self.source, dtype=torch.float32)

    def pruning(
        self, method: str, keep: float, widths: dict[str, int] | None, seed: int
    ) -> Pruning:
        """What `serval prune` would be asked; widths: those of heads and channels, not `keep`."""
        given = widths or {}
        whole, learns = self.size.steps, method == "maskprune"
        return Pruning(
            method=method.partition("-")[0],
            keep=None if widths else keep,
            key_value_heads=given.get("heads"),
            intermediate_size=given.get("channels"),
            steps=whole if learns or method == LONG else round(RECOVERY * whole),
            batch_rows=self.size.batch_rows,
            calibration_rows=self.size.calibration_rows,
            seed=seed,
            settings=dict(PHASES) if learns else {},
        )

    def result(
        self, method: str, keep: float, widths: dict[str, int] | None, seed: int
    ) -> dict[str, Any]:
        """The kept result of a run, or that of pruning and measuring now."""
        pruning = self.pruning(method, keep, widths, seed)
        path = self._path(method, asdict(pruning))
        new = not path.exists()

        def run() -> dict[str, Any]:
            stream = Shuffled(self.rows, seed or None)
            pruned, report = prune_decoder(self.load(), pruning, stream, note=lambda line: None)
            quality = _quality(self.yardstick.measure(pruned))
            return {**quality, **report.to_dict(), "steps": pruning.steps}

        found = kept(path, run)
        if new:
            self.note(
                f"  {keep:.0%} {method} seed {seed}: perplexity {found['perplexity']:.3f}, "
                f"retrieval {found['retrieval']:.0%}, {found['seconds']:.0f} s"
            )
        return found

    def results(self, method: str, keep: float) -> list[dict[str, Any]]:
        """Of every seed; rankings have the widths that MaskPrune learnt with the same seed."""
        found = []
        for seed in self.seeds:
            widths = self.learnt(keep, seed) if method in ONE_SHOT else None
            found.append(self.result(method, keep, widths, seed))
        return found

    def learnt(self, keep: float, seed: int) -> dict[str, int]:
        """Heads and channels that MaskPrune leaves."""
        widths: dict[str, int] = self.result("maskprune", keep, None, seed)["widths"]
        return widths

    def whole(self) -> dict[str, Any]:
        """The measures of the unpruned model."""
        path = self._path("whole", {})
        found = kept(path, lambda: _quality(self.yardstick.measure(self.yardstick.decoder)))
        return {field.name: found[field.name] for field in fields(Quality)}

    def sliced(self, widths: dict[str, int]) -> Decoder:
        """The model at these widths, without recovery: its speed does not depend on which units
        stay."""
        pruning = Pruning(
            method="uniform",
            key_value_heads=widths["heads"],
            intermediate_size=widths["channels"],
            steps=0,
            calibration_rows=1,
        )
        rows = RowStream([torch.arange(8)], 0)
        return prune_decoder(self.load(), pruning, rows)[0]

    def _path(self, name: str, pruning: dict[str, Any]) -> Path:
        weights = (self.source / "model.safetensors").stat()
        facts = [pruning, asdict(self.size), asdict(self.effort), weights.st_size]
        facts += [serval.__version__, torch.get_num_threads(), REVISION]
        return kept_path("prune", name, facts)


def _quality(quality: Quality) -> dict[str, Any]:
    return {field.name: getattr(quality, field.name) for field in fields(Quality)}


def collect(setup: Setup) -> list[Case]:
    """The unpruned model, every method at every size, and the speed of each size."""
    size, effort = (QUICK, QUICK_EFFORT) if setup.quick else (FULL, FULL_EFFORT)
    bench = Bench(size, effort, 1 if setup.quick else SEEDS, setup.note)
    wanted = {keep: _wanted(setup, keep) for keep in size.keeps}
    cases = []
    if setup.wants("serval-tiny-100"):
        cases.append(Case("serval-tiny-100", None, metrics=bench.whole()))
    shapes: dict[float, dict[str, int]] = {}
    for keep, methods in wanted.items():
        if not methods:
            continue
        setup.note(f"{keep:.0%} of the parameters: {', '.join(methods)}")
        for method in methods:
            if method != "speed":
                cases.append(_case(bench, method, keep))
            else:
                shapes[keep] = bench.learnt(keep, 0)
    return [*cases, *_speeds(bench, shapes)]


def _name(keep: float, method: str) -> str:
    return f"serval-tiny-{round(100 * keep)}-{method}"


def _wanted(setup: Setup, keep: float) -> list[str]:
    return [method for method in (*METHODS, "speed") if setup.wants(_name(keep, method))]


def _case(bench: Bench, method: str, keep: float) -> Case:
    found = bench.results(method, keep)
    whole = bench.whole()["perplexity"]

    def mean(name: str) -> float:
        return statistics.mean(run[name] for run in found)

    perplexities = [run["perplexity"] for run in found]
    taught = [run["perplexity"] for run in bench.results("maskprune", keep)]
    metrics = {
        "method": method,
        "steps": found[0]["steps"],
        "parameters": mean("parameters_after"),
        "parameters_kept": mean("parameters_after") / found[0]["parameters_before"],
        "key_value_heads": [run["widths"]["heads"] for run in found],
        "intermediate_size": [run["widths"]["channels"] for run in found],
        **{field.name: mean(field.name) for field in fields(Quality)},
        "perplexities": perplexities,
        "retrievals": [run["retrieval"] for run in found],
        "perplexity_change": mean("perplexity") / whole - 1,
        "loss": statistics.mean(run["loss"][1] for run in found),
        "run_seconds": mean("seconds"),
    }
    if method != "maskprune":
        metrics |= paired(perplexities, taught, "maskprune")
    if found[0]["facts"]:
        metrics["residual"] = statistics.mean(run["facts"]["residual"] for run in found)
    return Case(_name(keep, method), None, metrics=metrics)


def _speeds(bench: Bench, shapes: dict[float, dict[str, int]]) -> list[Case]:
    """Decoding and prefill of one sequence, whole and narrower models in turn."""
    if not shapes:
        return []
    size, tokenizer = bench.size, bench.yardstick.tokenizer
    decoders = [bench.load(), *(bench.sliced(widths) for widths in shapes.values())]
    llms = [LLM(decoder, tokenizer=tokenizer) for decoder in decoders]
    whole, *narrow = measure_speeds(
        llms, batch=1, prompt=size.prompt, output=size.output, repeats=size.repeats
    )
    cases = []
    for (keep, widths), speed in zip(shapes.items(), narrow, strict=True):
        metrics = {
            "tokens_per_second": speed.decode,
            "peer_tokens_per_second": whole.decode,
            "prefill_tokens_per_second": speed.prefill,
            "peer_prefill_tokens_per_second": whole.prefill,
            **widths,
        }
        cases.append(
            Case(
                _name(keep, "speed"),
                1 / speed.decode,
                "serval-tiny, unpruned",
                1 / whole.decode,
                speed.decode / whole.decode,
                metrics=metrics,
            )
        )
    return cases
