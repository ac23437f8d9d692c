"""The variants of the model that the quickstart compares, and how one is made and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serval.compress import CompressOptions
from serval.compress import run as compress
from serval.engine.llm import LLM
from serval.evaluate import EvalResult, Evaluator
from serval.evaluate.pipeline import Progress
from serval.evaluate.speed import Speed, cache_bytes, measure_speeds, weight_bytes
from serval.models import checkpoint
from serval.models.decoder import Decoder

BATCHES = (1, 8)


@dataclass(frozen=True)
class Variant:
    """One way to run the model. weights: a method's name, None: as they are; settings: more fields
    of `compress.CompressOptions`; kv: a cache layout."""

    name: str
    weights: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    kv: str = "full"

    @property
    def slug(self) -> str:
        """A directory name for its checkpoint: equal for variants with equal weights."""
        chosen = [f"{key}-{value}" for key, value in sorted(self.settings.items())]
        return "-".join([self.weights or "original", *chosen]).lower()


# Four bits by GPTQ in groups of 32 inputs with integer scales, the rows of a small model being
# short; embedding and head in eight.
_W4A8: dict[str, Any] = {"bits": 4, "group_size": 32, "scales": "integer", "head": 8}

VARIANTS = (
    Variant("full precision"),
    Variant("int8 weights", weights="int8", settings={"head": 8}),
    Variant("W4A8 weights", weights="gptq", settings=_W4A8),
    Variant("W4A8 weights + int8 cache", weights="gptq", settings=_W4A8, kv="int8"),
)


@dataclass
class Outcome:
    """What one variant costs and achieves. directory: its checkpoint; the three sizes in bytes."""

    variant: Variant
    directory: Path
    file_bytes: int
    weight_bytes: int
    cache_bytes_per_token: float
    quality: EvalResult
    speed: list[Speed] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "variant": asdict(self.variant),
            "directory": str(self.directory),
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "quality": self.quality.to_dict(),
            "speed": [asdict(speed) for speed in self.speed],
        }


def make_checkpoint(variant: Variant, model: Path, folder: Path) -> Path:
    """The variant's checkpoint directory: `model` itself, or compressed below `folder`."""
    if variant.weights is None:
        return model
    out = folder / variant.slug
    compress(CompressOptions(model, out, weights=variant.weights, force=True, **variant.settings))
    return out


def make_engine(variant: Variant, directory: Path, tokenizer: Any) -> LLM:
    """An engine of the variant; without prefix reuse, which would skip what is measured."""
    decoder = checkpoint.load(directory)
    return LLM(decoder, tokenizer=tokenizer, kv=variant.kv, prefix_caching=False)


def measure(
    variant: Variant,
    directory: Path,
    llm: LLM,
    evaluator: Evaluator,
    *,
    reference: Decoder | None,
    progress: Progress,
) -> Outcome:
    """Sizes and quality of one variant; reference: the model it is compared with."""
    quality = evaluator.measure(
        llm.decoder,
        name=variant.name,
        kv=variant.kv,
        reference=reference,
        llm=llm,
        progress=progress,
    )
    return Outcome(
        variant=variant,
        directory=directory,
        file_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        weight_bytes=weight_bytes(llm.decoder),
        cache_bytes_per_token=cache_bytes(llm.decoder, variant.kv),
        quality=quality,
    )


def add_speeds(
    outcomes: Sequence[Outcome],
    llms: Sequence[LLM],
    *,
    prompt: int,
    output: int,
    progress: Progress,
) -> None:
    """Time all variants in turn. prompt, output: tokens per sequence."""
    for done, batch in enumerate(BATCHES):
        progress("speed", done, len(BATCHES))
        speeds = measure_speeds(llms, batch=batch, prompt=prompt, output=output)
        for outcome, speed in zip(outcomes, speeds, strict=True):
            outcome.speed.append(speed)
    progress("speed", len(BATCHES), len(BATCHES))
