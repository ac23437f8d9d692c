"""`serval profile-kv MODEL`: measure a cache policy's shares per layer on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from serval.cache.policies import make_policy
from serval.cache.policies.diagnostics import gini, retained
from serval.cache.policies.profile import Profile, calibrate
from serval.cache.staging import measure_importance
from serval.data.tokenizer import load_tokenizer
from serval.errors import ConfigError
from serval.evaluate.perplexity import tokenize
from serval.evaluate.pipeline import Progress
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint
from serval.models.decoder import Decoder


@dataclass
class ProfileOptions:
    """What to measure.

    model: directory or hub name. policy: with its options. text, text_field: see
    `evaluation_texts`. samples: texts, of `length` tokens each (None: the model's context, at most
    1024). Raises ConfigError for a value out of range.
    """

    model: str | Path
    policy: str = "prefixkv"
    text: str | None = None
    text_field: str = "text"
    samples: int = 10
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")


@dataclass
class LayerShares:
    """A profile beside what was seen of the first sample: per layer, the Gini coefficient of its
    importance and the share of it that the profile's fraction keeps."""

    profile: Profile
    gini: list[float]
    retained: list[float]


def run(options: ProfileOptions, progress: Progress | None = None) -> LayerShares:
    """Measure one model as `options` say. Raises ServalError naming what does not fit."""
    directory = checkpoint.locate(options.model)
    tokenizer = load_tokenizer(directory)
    limit = checkpoint.read_config(directory).max_position_embeddings
    length = options.length or min(1024, limit)
    if length > limit:
        raise ConfigError(f"--length {length} exceeds the model's context of {limit} tokens")
    texts = evaluation_texts(options.text, directory, field=options.text_field)
    samples = draw_samples(tokenize(texts, tokenizer), options.samples, length, options.seed)
    decoder = checkpoint.load(options.model)
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("profile", done, len(samples))

    return measure(decoder, options.policy, samples, str(options.model), tick)


def measure(
    decoder: Decoder,
    policy: str,
    samples: Sequence[Sequence[int]],
    model: str = "",
    tick: Callable[[int], None] | None = None,
) -> LayerShares:
    """The profile of a policy on token sequences, and what the first of them shows."""
    made = make_policy(policy)
    profile = calibrate(decoder, made, samples, model, tick)
    importance = measure_importance(decoder, samples[0], made.scorer)
    kept = [max(1, round(share * importance.shape[1])) for share in profile.fractions]
    return LayerShares(profile, gini(importance).tolist(), retained(importance, kept).tolist())


def draw_samples(
    documents: Iterable[list[int]], count: int, length: int, seed: int = 0
) -> list[list[int]]:
    """At most `count` pieces of `length` tokens, from different documents where there are enough.
    Raises ConfigError when no document is that long."""
    rng = Random(f"profile/{seed}")
    long_enough = [document for document in documents if len(document) >= length]
    if not long_enough:
        raise ConfigError(f"no text has {length} tokens: lower --length, or give longer --text")
    rng.shuffle(long_enough)
    samples = []
    for index in range(count):
        document = long_enough[index % len(long_enough)]
        start = rng.randrange(len(document) - length + 1)
        samples.append(document[start : start + length])
    return samples


def print_shares(found: LayerShares) -> None:
    """One line per layer."""
    table = Table("layer", "keeps", "Gini", "retained", box=None)
    rows = zip(found.profile.fractions, found.gini, found.retained, strict=True)
    for layer, (share, unequal, held) in enumerate(rows):
        table.add_row(str(layer), f"{share:.1%}", f"{unequal:.3f}", f"{held:.1%}")
    Console().print(table)
