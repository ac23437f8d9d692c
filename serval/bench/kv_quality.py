"""What key-value caches of few bits cost in quality, on the shipped model.

Every layout is measured with the same text and the same questions:

* perplexity of held-out text, KL(exact || layout) of next-token distributions in nats, share of
  equal most likely tokens. Windows of 1024 tokens, several times the longest exact window, are
  computed in chunks of 32: attention inside a chunk is exact, so larger chunks would flatter every
  layout. `served_perplexity` is that in chunks of 256, as `serval eval` and serving compute a
  prompt.
* retrieval (needles, key-value pairs, associative recall) and variable tracking over several
  assignments, greedy, from contexts of 1500 tokens. The questions of a context reuse its cached
  prefix, so they are answered from what the layout stored. Contexts are drawn with several seeds;
  values are means, `*_spread` the smallest and largest seed.
* errors of keys whose norms differ between tokens (`norm_imbalance`), means over seeds.

A case without a window in its name has none. `perplexity_change` and `retrieval_change` (in points)
are relative to `full`; `retrieval_error` is the standard error of the latter over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from serval.bench.harness import Case, Setup
from serval.bench.norm_imbalance import REGIMES, KeyErrors, draw, errors
from serval.bench.quality import RememberedScorer
from serval.bench.recall import make_questions, shares
from serval.cache.layouts import layout_class
from serval.cache.memory import cache_bytes_per_token
from serval.data.synthetic import Filler
from serval.evaluate import perplexity
from serval.evaluate.pipeline import EvalOptions, Evaluator
from serval.evaluate.retrieval import Question
from serval.evaluate.scorer import Scorer
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.decoder import Decoder

WINDOWS = (32, 128)
PLAIN = ("full", "int8")
COMPARED = ("int4", "q4_0", "int2", "kivi", "oscar", "oscar:zero=min", "oscar:bits=4")
ABLATIONS = ("oscar:norms=false", "oscar:rotate=false", "int2:rotate=true")  # at window 32
SINKS_KEPT = "oscar:sinks=4"  # shares no prefixes, so its questions take longer
IMBALANCED = (
    "int4", "q4_0", "int2", "int2:rotate=true", "kivi", "oscar:rotate=false,norms=false",
    "oscar:norms=false", "oscar:rotate=false", "oscar", "oscar:bits=4",
)  # fmt: skip
RETRIEVAL = ("multi_needle", "key_value", "mqar")
VARIABLES = 3  # contexts of variable tracking per seed, of few questions each
CHUNK = 32
SERVED_CHUNK = 256


@dataclass(frozen=True)
class Budget:
    """text_tokens: scored; window: tokens of one window of text. context: tokens of a context;
    questions: of each, one context per retrieval task and seed. draws: seeds of keys."""

    text_tokens: int = 8192
    window: int = 1024
    context: int = 1500
    questions: int = 24
    seeds: tuple[int, ...] = tuple(range(8))
    draws: int = 5


QUICK = Budget(256, 128, 300, 3, (0,), 2)


@dataclass(frozen=True)
class Variant:
    """A layout of the report. kv: as on the command line; window: exact tokens, None: no window."""

    kv: str
    window: int | None = None

    @property
    def name(self) -> str:
        """The case's name."""
        return self.kv if self.window is None else f"{self.kv} window {self.window}"

    @property
    def layout(self) -> str:
        """What `--kv` takes."""
        if self.window is None:
            return self.kv
        return f"{self.kv}{',' if ':' in self.kv else ':'}residual={self.window}"


def variants(quick: bool) -> list[Variant]:
    """The layouts measured on the model, in order of the report."""
    if quick:
        return [Variant("full"), *(Variant(kv, 32) for kv in ("int2", "oscar"))]
    found = [Variant(kv) for kv in PLAIN]
    found += [Variant(kv, window) for window in WINDOWS for kv in COMPARED]
    found.append(Variant(SINKS_KEPT, WINDOWS[-1]))
    return found + [Variant(kv, WINDOWS[0]) for kv in ABLATIONS]


def collect(setup: Setup) -> list[Case]:
    """All cases; `full` is always measured, for comparison."""
    budget = QUICK if setup.quick else Budget()
    chosen = [v for v in variants(setup.quick) if setup.wants(v.name) or v.kv == "full"]
    cases = []
    if chosen[1:] or setup.wants("full"):
        cases = _model_cases(chosen, budget, setup)
    for regime in REGIMES:
        for kv in IMBALANCED:
            if setup.wants(f"norms {regime} {kv}"):
                cases.append(imbalance_case(regime, kv, budget.draws))
    return cases


def _model_cases(chosen: Sequence[Variant], budget: Budget, setup: Setup) -> list[Case]:
    yardstick = Yardstick(budget)
    cases: list[Case] = []
    for variant in chosen:
        metrics = yardstick.measure(variant)
        base = cases[0].metrics if cases else metrics
        for name in ("", "served_"):
            change = metrics[f"{name}perplexity"] / base[f"{name}perplexity"] - 1
            metrics[f"{name}perplexity_change"] = change
        for task in ("retrieval", "variables"):
            pairs = zip(metrics[f"{task}_seeds"], base[f"{task}_seeds"], strict=True)
            gaps = [100 * (mine - exact) for mine, exact in pairs]
            metrics[f"{task}_change"] = statistics.mean(gaps)
            if len(gaps) > 1:
                metrics[f"{task}_error"] = statistics.stdev(gaps) / len(gaps) ** 0.5
        cases.append(Case(variant.name, None, metrics=metrics))
        setup.note(
            f"  {variant.name}: perplexity {metrics['perplexity']:.3f}, "
            f"KL {1e3 * metrics['kl']:.2f} mnats, retrieval {metrics['retrieval']:.1%}"
        )
    return cases


class Yardstick:
    """The text, the questions and the exact model's predictions."""

    def __init__(self, budget: Budget) -> None:
        self.source = shipped_model()
        evaluator = Evaluator(
            EvalOptions(self.source, text_tokens=budget.text_tokens, window=budget.window, tasks=())
        )
        self.windows = evaluator.windows
        self.tokenizer = tokenizer = evaluator.tokenizer

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        filler = Filler(evaluator.texts, encode)
        self.questions: list[list[list[Question]]] = [
            [
                context
                for tasks, contexts in ((RETRIEVAL, 1), (("variables",), VARIABLES))
                for context in make_questions(
                    tasks,
                    filler,
                    length=budget.context,
                    contexts=contexts,
                    questions=budget.questions,
                    seed=seed,
                )
            ]
            for seed in budget.seeds
        ]
        self.reference = RememberedScorer(self.decoder(), CHUNK)

    def decoder(self) -> Decoder:
        """The model as it is stored; layouts may turn its weights."""
        return checkpoint.load(self.source, dtype=torch.float32).eval()

    def measure(self, variant: Variant) -> dict[str, Any]:
        """The metrics of one case."""
        decoder, kv = self.decoder(), variant.layout
        text = perplexity.score(Scorer(decoder, kv, CHUNK), self.windows, reference=self.reference)
        served = perplexity.score(Scorer(decoder, kv, SERVED_CHUNK), self.windows)
        specs = decoder.trunk_attention_layers
        metrics: dict[str, Any] = {
            "kv": kv,
            "window": variant.window or 0,
            "bits": _bits(decoder, kv),
            "bytes_per_token": cache_bytes_per_token(specs, kv, torch.float32),
            "perplexity": text.perplexity,
            "served_perplexity": served.perplexity,
            "kl": text.kl,
            "same_top": text.same_top,
        }
        found = [shares(decoder, self.tokenizer, some, kv) for some in self.questions]
        groups = {"retrieval": RETRIEVAL, "variables": ("variables",)}
        for name, tasks in groups.items():
            values = [statistics.mean(seed[task] for task in tasks) for seed in found]
            metrics[name] = statistics.mean(values)
            metrics[f"{name}_spread"] = [min(values), max(values)]
            metrics[f"{name}_seeds"] = values
        return metrics


def _bits(decoder: Decoder, kv: str) -> float:
    """Bits per number in blocks, all parameters counted."""
    specs = decoder.trunk_attention_layers
    numbers = sum(s.num_key_value_heads * (s.head_dim + s.v_head_dim) for s in specs)
    return 8 * cache_bytes_per_token(specs, kv, torch.float32) / numbers


def imbalance_case(regime: str, kv: str, draws: int) -> Case:
    """Errors of keys of one regime under one layout."""
    found = [errors(kv, draw(regime, seed)) for seed in range(draws)]
    metrics: dict[str, Any] = {"kv": kv, "regime": regime, "bits": layout_class(kv).bits}  # type: ignore[attr-defined]
    for field in fields(KeyErrors):
        values = [getattr(one, field.name) for one in found]
        metrics[f"{field.name}_error"] = statistics.mean(values)
        metrics[f"{field.name}_error_spread"] = [min(values), max(values)]
    return Case(f"norms {regime} {kv}", None, metrics=metrics)
