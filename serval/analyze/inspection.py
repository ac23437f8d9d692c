"""`serval inspect MODEL`: where attention goes, whether it parks on sinks, and what follows.

Runs the model on text, gathers every metric, then changes it in a few ways and compares its
predictions: the first token's value or key taken away, its cache quantised with and without the
sinks, its cache cut down as StreamingLLM does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from serval.analyze import preserve
from serval.analyze.attention import Hook, Store
from serval.analyze.interpret import Divergence, divergence, hidden_states
from serval.analyze.metrics import EPSILON, LENGTH
from serval.analyze.redistribute import MaskKeys, ZeroValue
from serval.analyze.survey import Survey, Surveyor, sink_rate
from serval.data.tokenizer import load_tokenizer
from serval.errors import CacheError, ConfigError, DataError
from serval.evaluate.perplexity import spread, tokenize
from serval.evaluate.pipeline import Progress
from serval.evaluate.scorer import Scorer
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint
from serval.models.checkpoint import locate
from serval.models.decoder import Decoder

PRESENT, STRONG = 2.0, 20.0  # sink rate, percent
LONGEST = 512  # tokens of a sequence, unless told otherwise

# A name and, for a sequence's number, its hooks and its store.
Case = tuple[str, Callable[[int], Sequence[Hook]], Callable[[int], Store | None]]


@dataclass
class InspectOptions:
    """What to look at.

    model: directory or hub name. text, text_field: see `evaluation_texts`. sequences of `tokens`
    tokens each (None: 512, or what model and text allow); rate_sequences of 64 give the sink rate.
    epsilon: of the sink rate; tau: of received-mass sinks (None: tokens / 8). bits: of the
    quantised cache. Raises ConfigError for a value out of range.
    """

    model: str | Path
    text: str | None = None
    text_field: str = "text"
    sequences: int = 8
    tokens: int | None = None
    rate_sequences: int = 100
    epsilon: float = EPSILON
    tau: float | None = None
    bits: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sequences": 1, "tokens": 16, "rate_sequences": 1, "bits": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least {bound}, got {value}")
        if self.bits > preserve.MAX_BITS:
            raise ConfigError(f"--bits must be at most {preserve.MAX_BITS}, got {self.bits}")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"--epsilon must lie between 0 and 1, got {self.epsilon}")
        most = LONGEST if self.tokens is None else self.tokens
        if self.tau is not None and not 1 < self.tau < most:
            raise ConfigError(
                f"--tau must lie between 1 and --tokens ({most}), got {self.tau}: no key "
                "receives more than that many times the mean"
            )


@dataclass
class Change:
    """A change of the model or its cache, and how far predictions moved; failed: why it could not
    be tried."""

    name: str
    group: str
    result: Divergence | None = None
    failed: str | None = None


@dataclass
class Inspection:
    """Everything that the report shows."""

    model: str
    layers: int
    heads: int
    sequences: int
    tokens: int
    sink_rate: Tensor  # [layers, heads], percent
    survey: Survey
    changes: list[Change]
    kept: dict[str, list[list[int]]]  # selector -> positions per sequence
    channels: tuple[int, list[int]]  # where outliers emerge, and on which channels
    options: InspectOptions
    strings: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One sentence: is there a sink."""
        rate = self.sink_rate.mean().item()
        if rate >= STRONG:
            return "This model has a strong attention sink at the first token."
        if rate >= PRESENT:
            return "Some heads of this model use the first token as an attention sink."
        return "This model has no attention sink at the first token."

    def change(self, name: str) -> Divergence | None:
        """The result of one change, None when it was not possible."""
        return next(change.result for change in self.changes if change.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        survey = self.survey
        return {
            "model": self.model,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "verdict": self.verdict,
            "sink_rate": self.sink_rate.mean().item(),
            "sink_rate_by_head": self.sink_rate.tolist(),
            "epsilon": self.options.epsilon,
            "heads": survey.heads.to_dict(),
            "profile": survey.profile.tolist(),
            "tokens_by_weight": [
                {"token": self.strings.get(t, str(t)), "weight": w, "occurrences": n}
                for t, w, n in top_tokens(survey)
            ],
            "hidden": [
                {
                    "peak": max(s.peak for s in layer),
                    "median": sum(s.median for s in layer) / len(layer),
                    "kurtosis": sum(s.kurtosis for s in layer) / len(layer),
                    "massive": sum(s.massive for s in layer),
                }
                for layer in survey.layers
            ],
            "orthorank": survey.orthorank,
            "spikes": [asdict(spike) for _, spike in sorted(survey.circuits.spikes.items())],
            "super_experts": survey.circuits.super_experts(),
            "outliers": {"layer": self.channels[0], "channels": self.channels[1]},
            "kept": self.kept,
            "changes": [asdict(change) for change in self.changes],
            "seconds": self.seconds,
        }


def top_tokens(survey: Survey, count: int = 12) -> list[tuple[int, float, int]]:
    """The tokens that get most weight from some head, seen at least twice where enough are."""
    often = [row for row in survey.tokens if row[2] > 1]
    return (often if len(often) >= count else survey.tokens)[:count]


def run(options: InspectOptions, progress: Progress | None = None) -> Inspection:
    """Inspect a model. progress: called with (stage, done, total). Raises ServalError naming what
    does not fit."""
    directory = locate(options.model)
    tokenizer: Any = load_tokenizer(directory)
    context = checkpoint.read_config(directory).max_position_embeddings
    if options.tokens is not None and options.tokens > context:
        raise ConfigError(
            f"--tokens {options.tokens} exceeds the model's context of {context} "
            "(max_position_embeddings); choose less"
        )
    texts = evaluation_texts(options.text, directory, field=options.text_field)
    documents = list(tokenize(texts, tokenizer))
    longest = max((len(document) for document in documents), default=0)
    tokens = options.tokens or max(16, min(LONGEST, context, longest))
    long = windows(documents, tokens, options.sequences, options.seed)
    rate = windows(documents, min(LENGTH, tokens), options.rate_sequences, options.seed)
    decoder = checkpoint.load(options.model).eval()
    result = inspect_decoder(decoder, long, rate, options, progress)
    given = Path(options.model).expanduser()
    result.model = given.resolve().name if given.is_dir() else str(options.model)
    wanted = [token for token, _, _ in top_tokens(result.survey)]
    result.strings = {token: tokenizer.decode([token]) for token in wanted}
    return result


def windows(
    documents: Sequence[Sequence[int]], tokens: int, count: int, seed: int
) -> list[list[int]]:
    """`count` sequences of exactly `tokens` tokens from all over the documents. Raises DataError
    when the text is too short."""
    usable = [d for d in documents if len(d) >= tokens]
    found: list[list[int]] = []
    if usable:
        pieces = spread(usable, tokens, None, 4 * count * tokens, seed)
        found = [w.tokens for w in pieces if len(w.tokens) == tokens][:count]
    if not found:
        longest = max((len(d) for d in documents), default=0)
        raise DataError(
            f"no document has {tokens} tokens (the longest has {longest}); lower --tokens or give "
            "longer text with --text"
        )
    return found


def inspect_decoder(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    rate_sequences: Sequence[Sequence[int]],
    options: InspectOptions,
    progress: Progress | None = None,
) -> Inspection:
    """Inspect a loaded decoder on token sequences; `options.model` only names it."""
    start = perf_counter()
    report = progress or (lambda stage, done, total: None)
    report("sink rate", 0, 1)
    rates = sink_rate(decoder, rate_sequences, options.epsilon)
    report("sink rate", 1, 1)
    surveyor = Surveyor(decoder, options.tau)
    for tokens in _told(sequences, "metrics", report):
        surveyor.add(tokens)
    survey = surveyor.result()
    peaks = torch.stack(
        [torch.stack([s.channels for s in layer]).mean(0) for layer in survey.layers]
    )
    channels = preserve.outlier_channels(peaks)
    kept = {
        "first 4": [preserve.first_tokens(4, len(tokens)) for tokens in sequences],
        "outlier tokens (KVSink)": _outliers(decoder, sequences, channels),
        "attended tokens": [preserve.attended_tokens(a, options.epsilon) for a in survey.alpha],
    }
    changes = [
        *_interventions(decoder, sequences, survey, report),
        *_quantised(decoder, sequences, survey, kept, options.bits, report),
        *_streaming(decoder, sequences, survey, report),
    ]
    return Inspection(
        model=str(options.model),
        layers=rates.shape[0],
        heads=rates.shape[1],
        sequences=len(sequences),
        tokens=len(sequences[0]),
        sink_rate=rates,
        survey=survey,
        changes=changes,
        kept=kept,
        channels=channels,
        options=options,
        seconds=perf_counter() - start,
    )


def _told(items: Sequence[Any], stage: str, report: Progress) -> Iterable[Any]:
    report(stage, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        report(stage, done, len(items))


def _outliers(
    decoder: Decoder, sequences: Sequence[Sequence[int]], channels: tuple[int, list[int]]
) -> list[list[int]]:
    from serval.analyze.hidden import watch_layers

    found: list[list[int]] = []

    def see(layer: int, states: Tensor) -> None:
        if layer == channels[0]:
            found.append(preserve.outlier_tokens(states, channels[1]))

    with watch_layers(decoder, see):
        for tokens in sequences:
            hidden_states(decoder, tokens)
    return found


def _compare(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    survey: Survey,
    cases: Sequence[Case],
    group: str,
    report: Progress,
) -> list[Change]:
    """Position 0, which predicts from one
    token alone, is left out."""
    changes = [Change(name, group, Divergence()) for name, _, _ in cases]
    for n in _told(range(len(sequences)), group, report):
        for change, (_, hooks, store) in zip(changes, cases, strict=True):
            after = hidden_states(decoder, sequences[n], hooks(n), store(n))
            assert change.result is not None
            change.result.add(divergence(decoder, survey.final[n][1:], after[1:]))
    return changes


def _interventions(
    decoder: Decoder, sequences: Sequence[Sequence[int]], survey: Survey, report: Progress
) -> list[Change]:
    """The no-op test, and the same for an ordinary token as a control."""
    ordinary = [len(tokens) // 4 for tokens in sequences]
    cases: list[Case] = [
        ("first token's value set to 0", lambda n: [ZeroValue((0,))], lambda n: None),
        ("first token's key masked", lambda n: [MaskKeys((0,))], lambda n: None),
        ("ordinary token's value set to 0", lambda n: [ZeroValue((ordinary[n],))], lambda n: None),
        ("ordinary token's key masked", lambda n: [MaskKeys((ordinary[n],))], lambda n: None),
    ]
    return _compare(decoder, sequences, survey, cases, "no-op test", report)


def _quantised(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    survey: Survey,
    kept: dict[str, list[list[int]]],
    bits: int,
    report: Progress,
) -> list[Change]:
    def case(name: str, keep: list[list[int]] | None) -> Case:
        def store(n: int) -> Store:
            return preserve.SinkPreserving(bits, keep[n] if keep else ())

        return f"{bits}-bit cache, {name}", lambda n: [], store

    cases = [
        case("nothing kept", None),
        *(case(f"{name} kept", places) for name, places in kept.items() if any(places)),
    ]
    return _compare(decoder, sequences, survey, cases, "quantised cache", report)


def _streaming(
    decoder: Decoder, sequences: Sequence[Sequence[int]], survey: Survey, report: Progress
) -> list[Change]:
    """A cache of a quarter of the tokens: recent ones only, or four sinks and the others recent."""
    room = max(8, len(sequences[0]) // 4)
    changes = []
    for sinks in (0, 4):
        kv = f"streaming:sinks={sinks},recent={room - sinks},slack=0"
        what = (
            f"{sinks} first and {room - sinks} recent tokens" if sinks else f"{room} recent tokens"
        )
        change = Change(f"cache of {what}", "short cache", Divergence())
        changes.append(change)
        try:
            for n in _told(range(len(sequences)), change.name, report):
                after = [r for _, _, r in Scorer(decoder, kv, chunk=256).logits([sequences[n]])]
                assert change.result is not None
                change.result.add(_beyond(decoder, survey.final[n], torch.cat(after), room))
        except CacheError as error:
            change.result, change.failed = None, str(error)
    return changes


@torch.inference_mode()
def _beyond(decoder: Decoder, final: Tensor, logits: Tensor, room: int) -> Divergence:
    """KL of the positions that do not fit the cache."""
    log_p = decoder.logits(final[room:]).float().log_softmax(-1)
    log_q = logits[room:].float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    return Divergence(kl, same, log_p.shape[0])
