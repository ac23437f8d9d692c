"""What 4-bit weights and 8-bit inputs cost in quality, on the shipped models.

Every recipe compresses every model at every granularity, by what `serval compress` runs
(`serval.compress.compress_decoder`), and the result is measured with `quality.Yardstick`. Integer
Scale is measured from the same codes. Calibration text is drawn from the training split, with three
seeds per output channel, where calibration decides most, and two for groups; the measured text is
held out. Values are means over the seeds, `*_spread` their smallest and largest. No setting was
chosen by looking at the measured text.

"serval-tiny-outliers" is serval-tiny with a few channels made large without changing what it
computes (`serval.compress.outliers`): small models have no activation outliers of their own.

A case's metrics: `perplexity_change` is relative to the float model, `integer_change` to the
perplexity of the same codes with float scales, seed by seed.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serval.bench.harness import Case, Setup
from serval.bench.quality import Effort, Quality, Yardstick
from serval.compress.calibrate import Calibration
from serval.compress.expert_stack import QuantizedExperts
from serval.compress.integer_scale import IntegerScale
from serval.compress.method import Method
from serval.compress.modules import DequantizedLinear, QuantizedLinear
from serval.compress.outliers import inject_outliers
from serval.compress.pipeline import compress_decoder
from serval.compress.registry import RECIPES as METHODS
from serval.compress.scheme import QuantizedWeight
from serval.compress.storage import Storage
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.registry import resolve

GRANULARITIES: dict[str, int | None] = {"channel": None, "g128": 128, "g32": 32}
RECIPES = ("rtn", "gptq", "awq", "fptq", "odyssey")


@dataclass(frozen=True)
class Variant:
    """A recipe with a scheme. granularity: a key of `GRANULARITIES`. weights: "w4a8", "w4a16" or
    "w8a8"."""

    recipe: str
    granularity: str
    weights: str = "w4a8"

    @property
    def calibrated(self) -> bool:
        """Whether the result depends on calibration text."""
        kind = resolve(METHODS, self.recipe, "compression method")
        return bool(kind.statistics) or kind.wants_data

    @property
    def integer(self) -> bool:
        """Whether it is also measured with integer scales."""
        return self.weights == "w4a8" and GRANULARITIES[self.granularity] is not None

    def name(self, model: str, scales: str = "float") -> str:
        """The case's name."""
        suffix = "-integer" if scales == "integer" else ""
        return f"{model}-{self.recipe}-{self.weights}-{self.granularity}{suffix}"

    def method(self, config: ModelConfig) -> Method:
        """What `serval compress` would be asked. Groups that do not divide a width of
        `config`'s feed-forward layers are halved until they do."""
        group = GRANULARITIES[self.granularity]
        fitting = group
        while fitting is not None and config.intermediate_size % fitting:
            fitting //= 2
        return Method(
            weights=self.recipe,
            bits=int(self.weights[1]),
            group_size="channel" if group is None else group,
            activations="none" if self.weights.endswith("a16") else "token",
            overrides=[] if fitting == group else [f"*.down_proj:group_size={fitting}"],
        )


REFERENCES = (
    Variant("rtn", "channel", "w8a8"),
    Variant("rtn", "channel", "w4a16"),
    Variant("rtn", "g128", "w4a16"),
    Variant("rtn", "g32", "w4a16"),
)


@dataclass(frozen=True)
class Plan:
    """A model and what is measured of it. gains: of the outliers put into it (norm, up_proj)."""

    name: str
    asset: str
    variants: tuple[Variant, ...]
    gains: tuple[float, float] | None = None


def plans(quick: bool) -> list[Plan]:
    """The models, in order of the report."""
    if quick:
        small = [Variant(r, g) for r in RECIPES for g in ("channel", "g32")]
        return [Plan("serval-tiny", "assets/serval-tiny", (*REFERENCES[:1], *small))]
    full = (*REFERENCES, *(Variant(r, g) for r in RECIPES for g in GRANULARITIES))
    some = tuple(Variant(r, g) for r in ("rtn", "fptq", "odyssey") for g in GRANULARITIES)
    return [
        Plan("serval-tiny", "assets/serval-tiny", full),
        Plan("serval-tiny-moe", "assets/serval-tiny-moe", full),
        Plan("serval-tiny-mla", "assets/serval-tiny-mla", full),
        Plan("serval-tiny-outliers", "assets/serval-tiny", (*REFERENCES, *some), (32.0, 128.0)),
    ]


@dataclass(frozen=True)
class Budget:
    """How much a run does. seeds: of calibration; group_seeds: how many of them with groups;
    sequences, length: of its tokens."""

    effort: Effort
    seeds: tuple[int, ...]
    sequences: int
    length: int
    group_seeds: int = 2


FULL = Budget(Effort(), (0, 1, 2), 16, 512)
QUICK = Budget(Effort(256, 128, context_tokens=96, questions=2, layer_tokens=64), (0,), 2, 64)


def collect(setup: Setup) -> list[Case]:
    """All cases, model by model."""
    budget = QUICK if setup.quick else FULL
    cases: list[Case] = []
    for plan in plans(setup.quick):
        wanted = [v for v in plan.variants if _wants(setup, plan, v)]
        if wanted:
            setup.note(f"{plan.name}: {len(wanted)} recipes and granularities")
            with tempfile.TemporaryDirectory(prefix="serval-quality-") as scratch:
                source = shipped_model(plan.asset)
                if plan.gains is not None:
                    source = with_outliers(source, Path(scratch), *plan.gains)
                cases += _collect_model(plan.name, source, wanted, budget, setup.note)
    return cases


def _wants(setup: Setup, plan: Plan, variant: Variant) -> bool:
    names = [variant.name(plan.name)]
    if variant.integer:
        names.append(variant.name(plan.name, "integer"))
    wanted = [setup.wants(name) for name in names]  # asks about every name
    return any(wanted)


def _collect_model(
    name: str,
    source: Path,
    variants: Sequence[Variant],
    budget: Budget,
    note: Callable[[str], None],
) -> list[Case]:
    yardstick = Yardstick(source, budget.effort)
    base = yardstick.measure(yardstick.decoder)
    cases = [_case(name, None, "float", [base], base)]
    note(f"  float: perplexity {base.perplexity:.3f}, retrieval {base.retrieval:.0%}")
    text = {
        seed: Calibration("stdlib", budget.sequences, budget.length, seed=seed).tokens(
            yardstick.decoder.config, source, lambda: yardstick.decoder
        )
        for seed in budget.seeds
    }
    for variant in variants:
        count = len(budget.seeds) if variant.granularity == "channel" else budget.group_seeds
        seeds = budget.seeds[: count if variant.calibrated else 1]
        found: dict[str, list[Quality]] = {}
        for seed in seeds:
            decoder = compressed(source, variant, text[seed])
            found.setdefault("float", []).append(yardstick.measure(decoder))
            if variant.integer:
                with_integer_scales(decoder)
                found.setdefault("integer", []).append(yardstick.measure(decoder))
        for scales, qualities in found.items():
            case = _case(name, variant, scales, qualities, base)
            if scales == "integer":
                pairs = zip(qualities, found["float"], strict=True)
                changes = [made.perplexity / same.perplexity - 1 for made, same in pairs]
                case.metrics["integer_change"] = statistics.mean(changes)
                if len(changes) > 1:
                    case.metrics["integer_change_spread"] = [min(changes), max(changes)]
            cases.append(case)
            note(
                f"  {case.case}: perplexity {case.metrics['perplexity']:.3f}, "
                f"KL {1e3 * case.metrics['kl']:.2f} mnats"
            )
    return cases


def compressed(source: Path, variant: Variant, tokens: Sequence[Tensor]) -> Decoder:
    """The model at `source` as `variant` compresses it; float parts and scales are rounded to the
    checkpoint's bfloat16 before it computes in float32."""
    decoder = checkpoint.load(source, dtype=torch.bfloat16)
    compress_decoder(decoder, variant.method(decoder.config), tokens)
    return decoder.float().eval()


def _case(
    model: str, variant: Variant | None, scales: str, qualities: Sequence[Quality], base: Quality
) -> Case:
    """One line of the report; variant None: the float model."""
    metrics: dict[str, Any] = {
        "model": model,
        "recipe": "none" if variant is None else variant.recipe,
        "weights": "float32" if variant is None else variant.weights,
        "granularity": "" if variant is None else variant.granularity,
        "scales": scales,
        "seeds": len(qualities),
    }
    for field in fields(Quality):
        values = [getattr(quality, field.name) for quality in qualities]
        metrics[field.name] = statistics.mean(values)
        if len(values) > 1:
            metrics[f"{field.name}_spread"] = [min(values), max(values)]
    metrics["perplexity_change"] = metrics["perplexity"] / base.perplexity - 1
    name = f"{model}-float32" if variant is None else variant.name(model, scales)
    return Case(name, None, metrics=metrics)


def with_outliers(source: Path, out: Path, norm_gain: float, up_gain: float) -> Path:
    """A copy of the checkpoint `source` with large channels, which computes the same."""
    decoder = checkpoint.load(source, dtype=torch.float32)
    inject_outliers(decoder, norm_gain, up_gain)
    checkpoint.save(decoder, out, tokenizer_dir=source)
    if (source / "recipe.yaml").is_file():  # tells which text is held out
        shutil.copy(source / "recipe.yaml", out)
    return out


def with_integer_scales(decoder: Decoder) -> None:
    """Convert the scales of every group-wise quantised matrix, in place; codes are kept."""
    for module in list(decoder.modules()):
        if isinstance(module, DequantizedLinear):
            module.take(_integer(module.stored), module.weight.device)
        elif isinstance(module, QuantizedLinear):
            weight = _integer(module.quantized())
            module.storage = Storage.of(weight, module.storage.format)
            module.take(weight, module.data.device)
        elif isinstance(module, QuantizedExperts):
            _convert_experts(module)


def _convert_experts(module: QuantizedExperts) -> None:
    weights = []
    for expert in range(len(module.down.input_scales)):
        both = _integer(module.gate_up.get(expert))
        weights += [_rows(both, slice(0, module.width)), _rows(both, slice(module.width, None))]
        weights.append(_integer(module.down.get(expert)))
    module.gate_up.storage = Storage.of(weights[0], module.gate_up.storage.format)
    module.down.storage = Storage.of(weights[2], module.down.storage.format)
    module.take(weights, module.down.data.device)


def _integer(weight: QuantizedWeight) -> QuantizedWeight:
    converted, _ = IntegerScale().apply(weight)
    return converted


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some output channels of a matrix."""
    some = replace(weight, codes=weight.codes[rows], scales=weight.scales[rows])
    if weight.integer is not None and weight.row_factor is not None:
        some.integer, some.row_factor = weight.integer[rows], weight.row_factor[rows]
    return some
