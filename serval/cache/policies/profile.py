"""Profiles: fractions per layer that were measured once, in a JSON file.

The fractions do not depend on a prompt's length. They belong to a model's attention layers (number,
kind, heads, widths, windows), of which a fingerprint is kept; fine-tuned, quantised and adapted
versions of a model may share a profile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serval.cache.policies.allocators import proportional
from serval.cache.staging import measure_importance
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.models.decoder import Decoder

if TYPE_CHECKING:
    from serval.cache.policies.base import Policy

FORMAT = "serval-cache-profile"


@dataclass
class Profile:
    """What share of its tokens each layer keeps.

    fractions: per attention layer, in (0, 1]; their mean is `keep`. model: a name, for messages.
    samples, tokens: what it was measured on.
    """

    method: str
    keep: float
    fractions: list[float]
    fingerprint: str
    model: str
    samples: int
    tokens: int

    def write(self, path: Path) -> None:
        """Save as JSON, whole or not at all. Raises `CacheError` where that is not possible."""
        check_target(path)
        temporary = path.with_name(path.name + ".writing")
        try:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CacheError(f"the cache profile {path} cannot be written: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Load from JSON. Raises `CacheError` naming what is wrong with the file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CacheError(
                f"there is no cache profile {path}: make one with `serval profile-kv MODEL --out "
                f"{path}`"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path} is not a cache profile: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CacheError(f"{path} is not a cache profile: its format is not {FORMAT!r}")
        try:
            found = cls(**values)
            found._check()
        except (TypeError, ValueError) as error:
            raise CacheError(f"{path} is a damaged cache profile: {error}") from None
        return found

    def _check(self) -> None:
        """Raise ValueError naming a field that holds something else than it should."""
        for name in ("method", "fingerprint", "model"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected text")
        for name in ("samples", "tokens"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number")
        if not _is_share(self.keep):
            raise ValueError(f"keep is {self.keep!r}, expected a number in (0, 1]")
        shares = self.fractions
        if not isinstance(shares, list) or not shares or not all(map(_is_share, shares)):
            raise ValueError(f"fractions is {shares!r}, expected a list of numbers in (0, 1]")


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def check_target(path: Path) -> None:
    """Make the folder of a profile to be written at `path`; raises `CacheError` where there can be
    no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"the cache profile {path} cannot be written: {error}") from None
    if path.is_dir():
        raise CacheError(
            f"the cache profile {path} cannot be written: it is a folder; name a file in it, such "
            f"as {path / 'profile.json'}"
        )
    if not os.access(path.parent, os.W_OK):
        raise CacheError(f"the cache profile {path} cannot be written: permission denied")


def fingerprint(specs: Sequence[AttentionSpec]) -> str:
    """A digest of a model's attention layers."""
    fields = (
        "kind", "num_heads", "num_key_value_heads", "head_dim", "v_head_dim", "kv_lora_rank",
        "qk_rope_head_dim", "window", "sinks",
    )  # fmt: skip
    text = json.dumps([[getattr(spec, field) for field in fields] for spec in specs])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def calibrate(
    decoder: Decoder,
    policy: Policy,
    samples: Sequence[Sequence[int]],
    model: str = "",
    tick: Callable[[int], None] | None = None,
) -> Profile:
    """Measure a policy's allocation on token sequences: fractions are averaged over them and scaled
    to a mean of `policy.keep`, none above 1. tick: told after each sample how many more are done.

    Raises `CacheError` without samples, or when they are too short for the policy to drop any.
    """
    specs = decoder.trunk_attention_layers
    windows = [spec.window for spec in specs]
    if not samples:
        raise CacheError("a cache profile needs at least one sample of text")
    total = [0.0] * len(specs)
    for sample in samples:
        if not policy.drops(len(sample), windows):
            raise CacheError(
                f"a sample of {len(sample)} tokens loses nothing at keep={policy.keep}: give "
                "longer samples (--length)"
            )
        importance = measure_importance(decoder, sample, policy.scorer)
        kept = policy.allocate(importance, windows)
        total = [sum_ + count / len(sample) for sum_, count in zip(total, kept, strict=True)]
        if tick is not None:
            tick(1)
    return Profile(
        method=policy.name,
        keep=policy.keep,
        fractions=_with_mean(total, policy.keep),
        fingerprint=fingerprint(specs),
        model=model,
        samples=len(samples),
        tokens=sum(map(len, samples)),
    )


def _with_mean(weights: Sequence[float], mean: float) -> list[float]:
    """`weights` scaled to this mean, none above 1."""
    unit = 10**6
    layers = len(weights)
    counts = proportional(weights, round(mean * layers * unit), [1] * layers, [unit] * layers)
    return [count / unit for count in counts]
