"""Compressing a decoder part by part: embedding, each block, output head, MTP head.

A `PartStore` brings a part's float weights in before it is worked on and takes the result away
afterwards, so that only one part need exist at a time. Recipes see blocks (`recipe.py`); this file
decides nothing about a method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from serval.compress.block import Block, BlockData, Matrix, Site, find_block, find_matrices
from serval.compress.expert_views import put_experts_together, take_experts_apart
from serval.compress.install import install
from serval.compress.integer_scale import IntegerScale, Reround
from serval.compress.recipe import Recipe, Rotation
from serval.compress.rtn import round_to_nearest
from serval.compress.running import BlockRunner, next_sites, rounded_inputs
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize, require_finite
from serval.compress.statistics import Wanted
from serval.compress.storage import Format
from serval.compress.targets import Target, forget, targets
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.decoder import Decoder
from serval.models.variants import require_plain

Progress = Callable[[int, int, str], None]  # parts done, parts in all, the one at work

_ROWS_AT_ONCE = 8192  # of a table of the vocabulary


class PartStore(Protocol):
    """Where parts of the decoder come from and go to."""

    def load(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Fill the decoder's module `path` with float weights; dtype None: the checkpoint's. An
        output head that a rotation has untied gets the embedding as it was."""
        ...

    def finish(self, part: Part, done: PartReport, samples: Samples) -> None:
        """The part is compressed; its weights are not needed here any more."""
        ...

    def resume(self, part: Part) -> tuple[PartReport, Samples | None] | None:
        """What an earlier run that was interrupted made of this part, and, for the last one of
        these, the samples after it."""
        ...


@dataclass(frozen=True)
class Part:
    """A piece of the work. paths: its modules in the decoder."""

    name: str
    paths: tuple[str, ...]


@dataclass
class Samples:
    """Calibration samples where the work stands: residual streams float32 [T, D], of the float
    model and of the model with the parts so far quantised (None: not needed)."""

    float: list[Tensor] | None = None
    quantized: list[Tensor] | None = None


@dataclass
class PartReport:
    """What became of one part. quantised: scheme by checkpoint name. errors: |W - Q| / |W| by name.
    kept: why others stayed in float. fell_back: why some were not done as asked. plan: the recipe's
    entries. seconds: it took."""

    quantised: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    fell_back: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Blockwise:
    """The work on one decoder, which may be on the meta device.

    schemes: by checkpoint name of every matrix; a string instead says why it stays in float. dtype:
    of the checkpoint's floats and scales. tokens: calibration samples, called when they are needed.
    """

    decoder: Decoder
    recipe: Recipe
    schemes: dict[str, WeightScheme | str]
    dtype: torch.dtype
    tokens: Callable[[], list[Tensor]] | None = None
    integer_scale: IntegerScale = field(default_factory=IntegerScale)
    rotation: Rotation | None = None
    format: Format | None = None

    def __post_init__(self) -> None:
        require_plain(self.decoder.config, "compression")
        self.samples = Samples()
        self.targets = list(targets(self.decoder))
        self.wanted: frozenset[Wanted] = self.recipe.statistics
        if any(isinstance(s, WeightScheme) and s.activations == "static" for s in self._chosen()):
            self.wanted |= {"range"}

    def _chosen(self) -> Sequence[WeightScheme | str]:
        return list(self.schemes.values())

    @property
    def calibrates(self) -> bool:
        """Whether samples are run at all."""
        return bool(self.wanted) or self.recipe.wants_data

    def parts(self) -> list[Part]:
        """All of the decoder, in order of work."""
        layers = [f"layers.{index}" for index in range(len(self.decoder.layers))]
        mtp = [f"mtp.{index}" for index in range(len(self.decoder.mtp or []))]
        head = ("norm",) if self.decoder.lm_head is None else ("norm", "lm_head")
        single = [Part(path, (path,)) for path in ["embed_tokens", *layers]]
        return [*single, Part("head", head), *(Part(path, (path,)) for path in mtp)]

    @torch.no_grad()
    def run(self, store: PartStore, progress: Progress | None = None) -> dict[str, PartReport]:
        """Compress every part; returns the reports by the part's name."""
        parts = self.parts()
        reports: dict[str, PartReport] = {}
        for done, part in enumerate(parts):
            if progress is not None:
                progress(done, len(parts), part.name)
            earlier = store.resume(part)
            if earlier is not None:
                reports[part.name], samples = earlier
                self.samples = samples or self.samples
                continue
            start = time.perf_counter()
            self.report = reports[part.name] = PartReport()
            self._compress(part, store)
            self.report.seconds = time.perf_counter() - start
            store.finish(part, self.report, self.samples)
        if progress is not None:
            progress(len(parts), len(parts), "")
        return reports

    def _compress(self, part: Part, store: PartStore) -> None:
        for target in (target for path in part.paths for target in self._targets_in(path)):
            for name in target.checkpoint_modules():
                scheme = self.schemes[name]
                if isinstance(scheme, str):
                    self.report.kept[name] = scheme
        if part.name == "embed_tokens":
            self._embedding(store)
        elif part.name == "head":
            self._head(part, store)
        else:
            store.load(part.name, torch.float32)
            if part.name.startswith("layers."):
                self._layer(part.name)
            else:
                self._uncalibrated(part.name)

    # -- embedding and head ------------------------------------------------------------------------

    def _embedding(self, store: PartStore) -> None:
        path = "embed_tokens"
        tokens = self.tokens() if self.calibrates and self.tokens is not None else []
        store.load(path, torch.float32 if self.rotation is not None else None)
        table = self.decoder.embed_tokens
        if self.rotation is not None:
            self.rotation.embedding(table)
        started = [table.weight[sample].float() for sample in tokens]
        if self.recipe.inputs == "float" or self.recipe.wants_data:
            self.samples.float = started
        if self.recipe.inputs == "quantized" or self.recipe.wants_data:
            self.samples.quantized = started
        self._table(path)

    def _head(self, part: Part, store: PartStore) -> None:
        for path in part.paths:
            store.load(path, torch.float32 if self.rotation is not None else None)
        if self.rotation is not None:
            assert isinstance(self.decoder.lm_head, nn.Linear)
            self.rotation.head(self.decoder.norm, self.decoder.lm_head)
        self._table("lm_head")

    def _table(self, path: str) -> None:
        """An embedding or output head, by rows."""
        for target in self._targets_in(path):
            scheme = self.schemes[target.name]
            if isinstance(scheme, str):
                continue
            weight = target.module.weight
            assert isinstance(weight, Tensor)
            require_finite(weight, f"{target.name}.weight")
            parts = [quantize(part, scheme, self.dtype) for part in weight.split(_ROWS_AT_ONCE)]
            made = replace(
                parts[0],
                codes=torch.cat([part.codes for part in parts]),
                scales=torch.cat([part.scales for part in parts]),
            )
            if scheme.scales == "integer":
                made = self._integer(target.name, made, None)
            install(self.decoder, target, made, format=self.format)
            forget(target.module)
            self.report.quantised[target.name] = describe(scheme)

    # -- blocks ------------------------------------------------------------------------------------

    def _layer(self, path: str) -> None:
        index = int(path.partition(".")[2])
        module = self.decoder.layers[index]
        for name, parameter in module.named_parameters():
            require_finite(parameter, self._name(f"{path}.{name}"))
        block = find_block(module, index, self._name)
        for site in block.sites:
            site.dtype = self.dtype
        self._assign(block.matrices)
        if self.rotation is not None:
            self.rotation.block(block)
        made = self._quantise_block(block)
        put_experts_together(module)
        self._install(path, made)

    def _uncalibrated(self, path: str) -> None:
        """The MTP head, which no calibration sample is run through."""
        module = self.decoder.get_submodule(path)
        take_experts_apart(module)
        matrices = list(find_matrices(module, path, self._name).values())
        self._assign(matrices)
        made = {m.name: self._quantise(m, None) for m in matrices if m.scheme is not None}
        put_experts_together(module)
        self._install(path, made)

    def _assign(self, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            scheme = self.schemes[matrix.name]
            if isinstance(scheme, str):
                matrix.why_kept = scheme
            else:
                matrix.scheme = scheme
                integer = scheme.scales == "integer"
                matrix.scale_dtype = torch.float32 if integer else self.dtype

    def _quantise_block(self, block: Block) -> dict[str, QuantizedWeight]:
        recipe, samples = self.recipe, self.samples
        runner = BlockRunner(block, self.decoder.rotary(torch.device("cpu")))
        inputs = samples.float if recipe.inputs == "float" else samples.quantized
        outputs: list[Tensor] | None = None
        if recipe.wants_data:
            assert samples.float is not None
            assert samples.quantized is not None
            outputs = runner.outputs(samples.float)
            block.data = BlockData(samples.quantized, outputs, runner.run)
        if self.wanted and inputs is not None and not recipe.stepwise:
            with block.observe(self.wanted):
                seen = runner.outputs(inputs)
            outputs = seen if recipe.inputs == "float" else outputs
        self.report.plan = recipe.prepare_block(block)
        made: dict[str, QuantizedWeight] = {}
        rounding: list[tuple[nn.Linear, WeightScheme, float | None]] = []
        for stage, after in next_sites(block):
            if self.wanted and inputs is not None and recipe.stepwise:
                with rounded_inputs(rounding), block.observe(self.wanted, stage):
                    runner.observe(inputs, after)
            for site in stage:
                for matrix in site.matrices:
                    if matrix.scheme is not None:
                        weight = self._quantise(matrix, site)
                        made[matrix.name] = weight
                        if samples.quantized is not None:
                            matrix.linear.weight.copy_(weight.dequantize())
                            rounding.append((matrix.linear, weight.scheme, weight.input_scale))
            for site in stage:
                for part in site.inputs:
                    part.statistics = None
        unread = [m for m in block.matrices if m.scheme is not None and m.name not in made]
        made |= {matrix.name: self._quantise(matrix, None) for matrix in unread}
        block.data = None
        if samples.quantized is not None:
            with rounded_inputs(rounding):
                quantized = runner.outputs(samples.quantized)
            self.samples = Samples(outputs if recipe.wants_data else None, quantized)
        elif samples.float is not None:
            self.samples = Samples(outputs)
        return made

    def _quantise(self, matrix: Matrix, site: Site | None) -> QuantizedWeight:
        """One matrix, as the recipe and its scheme ask. site: where it reads."""
        scale = self._static_scale(matrix, site)
        if self.recipe.statistics and matrix.statistics is None:
            made = round_to_nearest(matrix)
            self.report.fell_back[matrix.name] = (
                "rounded to nearest: no calibration token reached it"
            )
        else:
            made = self.recipe.quantize(matrix)
        if made.scheme.activations == "static":
            made.input_scale = scale
        if made.scheme.scales == "integer":
            made = self._integer(matrix.name, made, partial(self.recipe.reround, matrix))
        difference = (made.dequantize() - matrix.weight).norm()
        error = float(difference / matrix.weight.norm().clamp(min=1e-30))
        self.report.errors[matrix.name] = round(error, 5)
        self.report.quantised[matrix.name] = describe(made.scheme)
        return made

    def _integer(
        self, name: str, made: QuantizedWeight, reround: Reround | None
    ) -> QuantizedWeight:
        """Group scales as integers, or unchanged with the reason reported."""
        made, report = self.integer_scale.apply(made, reround)
        if report.kept_float:
            self.report.fell_back[name] = f"float scales: {report.kept_float}"
        elif report.lifted:
            self.report.fell_back[name] = (
                f"{report.lifted} group scales are under half an integer step and became one "
                "(a larger scales.alpha or scales.mode=row_normalized keeps them)"
            )
        return made

    def _static_scale(self, matrix: Matrix, site: Site | None) -> float | None:
        """amax / 127 of a static input, as it is after folds. What a norm produces has one scale
        for all who read it; an expert's inner activations have their own. An input that was never
        seen becomes dynamic."""
        assert matrix.scheme is not None
        if matrix.scheme.activations != "static":
            return None
        shared = None if site is None else site.abs_max
        if shared is None:
            matrix.scheme = replace(matrix.scheme, activations="token")
            self.report.fell_back[matrix.name] = "activations per token: calibration saw none"
            return None
        own = matrix.statistics
        inner = site is not None and site.place.norm is None and own is not None
        largest = own.abs_max if inner and own is not None else shared
        return max(float(largest.max()), 1e-8) / 127

    def _install(self, path: str, made: dict[str, QuantizedWeight]) -> None:
        for target in self._targets_in(path):
            names = target.checkpoint_modules()
            if all(name in made for name in names):
                weights = [made[name] for name in names]
                install(self.decoder, target, weights, format=self.format)
                forget(target.module)  # which nothing but this list of targets holds now
            elif any(name in made for name in names):
                kept = next(name for name in names if name not in made)
                raise ConfigError(
                    f"{kept} would stay in float, but not the other experts of its layer; Serval "
                    f"needs all or none: ignore {target.name}.* or nothing of it"
                )

    def _targets_in(self, path: str) -> list[Target]:
        return [t for t in self.targets if t.path == path or t.path.startswith(f"{path}.")]

    def _name(self, path: str) -> str:
        return checkpoint.module_name(self.decoder.config, path)


def describe(scheme: WeightScheme) -> str:
    """A scheme in a word, for example "W4A8 g128 integer"."""
    inputs = {"token": "A8", "static": "A8 static", "none": "A16"}[scheme.activations]
    group = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
    return f"W{scheme.bits}{inputs} {group}" + (" integer" if scheme.scales == "integer" else "")
