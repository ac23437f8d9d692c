"""`serval eval MODEL`: perplexity, retrieval and, on request, lm-eval tasks of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from serval.data.synthetic import TASKS, Filler
from serval.data.tokenizer import load_tokenizer
from serval.engine.llm import LLM
from serval.errors import ConfigError
from serval.evaluate import perplexity, retrieval
from serval.evaluate.perplexity import TextScore
from serval.evaluate.retrieval import Cell
from serval.evaluate.scorer import Scorer
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint
from serval.models.checkpoint import locate
from serval.models.decoder import Decoder

Progress = Callable[[str, int, int], None]  # stage, work done, work in all

SHORTEST = 256  # tokens of the shortest default context


@dataclass
class EvalOptions:
    """What to measure.

    model: directory or hub name. kv: cache layout; text and tasks both pass through it. policy:
    what the cache keeps of prompts (None: everything); of a window of text the first half is then
    the prompt, and the rest is scored. text, text_field: see `evaluation_texts`. text_tokens: how
    many are scored (0: no perplexity). window: of the text, in tokens (None: the context, at most
    2048); stride: see `perplexity`. tasks: names of generated tasks (empty: none); lengths: their
    contexts in tokens (None: from 256 up to the model's context, doubling); samples per length and
    depth band. reference: a model to compare predictions on the text with, run with a full cache.
    lm_eval: task names of lm-evaluation-harness; lm_eval_limit: questions of each (None: all).

    Raises ConfigError for a value out of range, and when nothing would be measured.
    """

    model: str | Path
    kv: str = "full"
    policy: str | None = None
    text: str | None = None
    text_field: str = "text"
    text_tokens: int = 32768
    window: int | None = None
    stride: int | None = None
    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] | None = None
    samples: int = 4
    depths: int = retrieval.DEPTHS
    reference: str | Path | None = None
    lm_eval: Sequence[str] = ()
    lm_eval_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"text_tokens": 0, "window": 2, "stride": 1, "samples": 1, "depths": 1}
        for name, bound in {**least, "lm_eval_limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least {bound}, got {value}")
        if not self.text_tokens and self.reference is not None:
            raise ConfigError("--reference is compared on the text; give --text-tokens above 0")
        if self.policy is not None and self.lm_eval:
            raise ConfigError(
                "--policy drops tokens of prompts, but the log-likelihoods of --lm-eval are those "
                "of whole texts; leave one of the two out"
            )
        if not (self.text_tokens or self.tasks or self.lm_eval):
            raise ConfigError("nothing to measure: give --text-tokens, --tasks or --lm-eval")


@dataclass
class EvalResult:
    """What was measured; fields are None or empty where nothing was asked for."""

    model: str
    kv: str
    policy: str | None = None
    text: TextScore | None = None
    cells: list[Cell] = field(default_factory=list)
    lm_eval: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def retrieval(self) -> float:
        """Share of exact matches over all tasks, lengths and depths (NaN without any)."""
        return retrieval.accuracy(self.cells)

    def by_task(self) -> dict[str, float]:
        """Exact match per task, over lengths and depths."""
        tasks = dict.fromkeys(cell.task for cell in self.cells)
        return {t: retrieval.accuracy([c for c in self.cells if c.task == t]) for t in tasks}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["cells"] = [{**asdict(c), "accuracy": c.accuracy} for c in self.cells]
        if self.cells:
            values["retrieval"] = {"all": self.retrieval, **self.by_task()}
        return values


class Evaluator:
    """Text and questions made once, to be put to any number of models with one tokenizer.

    Raises ConfigError or DataError when the options do not fit the model's tokenizer or context.
    """

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        directory = locate(options.model)
        self.tokenizer: Any = load_tokenizer(directory)
        self.context = checkpoint.read_config(directory).max_position_embeddings
        if options.window is not None and options.window > self.context:
            raise ConfigError(
                f"a window of {options.window} tokens exceeds the model's {self.context}; choose a "
                "smaller --window"
            )
        self.window = min(options.window or 2048, self.context)
        self.texts: list[str] = []
        if options.text_tokens or options.tasks:
            self.texts = evaluation_texts(options.text, directory, field=options.text_field)
        self.windows: list[perplexity.Window] = []
        if options.text_tokens:
            texts = list(self.texts)
            Random(f"texts/{options.seed}").shuffle(texts)
            self.windows = perplexity.spread(
                perplexity.tokenize(texts, self.tokenizer),
                self.window,
                options.stride,
                options.text_tokens * (1 if options.policy is None else 2),
                options.seed,
            )
            if options.policy is not None:
                self.windows = perplexity.continuations(self.windows)
        self.questions = self._questions() if options.tasks else []

    def _questions(self) -> list[retrieval.Question]:
        options = self.options
        lengths = options.lengths or default_lengths(self.context)
        for length in lengths:
            if length > self.context:
                raise ConfigError(
                    f"a context of {length} tokens exceeds the model's {self.context} "
                    "(max_position_embeddings); choose shorter lengths"
                )

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        return retrieval.make_questions(
            options.tasks,
            lengths,
            Filler(self.texts, encode),
            samples=options.samples,
            depths=options.depths,
            seed=options.seed,
        )

    def measure(
        self,
        decoder: Decoder,
        *,
        name: str,
        kv: str = "full",
        policy: str | None = None,
        reference: Decoder | None = None,
        llm: LLM | None = None,
        progress: Progress | None = None,
    ) -> EvalResult:
        """Measure `decoder` with cache layout `kv` and a cache policy. llm: an engine of this
        decoder and cache to reuse. progress: called with (stage, done, total)."""
        start = perf_counter()
        result = EvalResult(name, kv, policy)
        report = progress or (lambda stage, done, total: None)
        if self.windows:
            total = sum(window.scored for window in self.windows)
            result.text = perplexity.score(
                Scorer(decoder, kv, policy=policy),
                self.windows,
                reference=None if reference is None else Scorer(reference),
                tick=_counter(report, "text", total),
            )
        if self.questions or self.options.lm_eval:
            llm = llm or LLM(decoder, tokenizer=self.tokenizer, kv=kv, policy=policy)
        if self.questions:
            assert llm is not None
            result.cells = retrieval.ask(
                llm,
                self.tokenizer,
                self.questions,
                depths=self.options.depths,
                tick=_counter(report, "retrieval", len(self.questions)),
            )
        if self.options.lm_eval:
            from serval.evaluate.lm_eval_adapter import evaluate_tasks

            assert llm is not None
            result.lm_eval = evaluate_tasks(
                llm,
                decoder,
                self.tokenizer,
                self.options.lm_eval,
                kv=kv,
                limit=self.options.lm_eval_limit,
            )
        result.seconds = perf_counter() - start
        return result


def run(options: EvalOptions, progress: Progress | None = None) -> EvalResult:
    """Evaluate one model as `options` say. Raises ServalError naming what does not fit."""
    evaluator = Evaluator(options)
    decoder = checkpoint.load(options.model)
    reference = checkpoint.load(options.reference) if options.reference is not None else None
    return evaluator.measure(
        decoder,
        name=str(options.model),
        kv=options.kv,
        policy=options.policy,
        reference=reference,
        progress=progress,
    )


def default_lengths(context: int) -> list[int]:
    """256, 512, 1024 ... up to the model's context, which is always included."""
    lengths, length = [], SHORTEST
    while length < context:
        lengths.append(length)
        length *= 2
    return [*lengths, context]


def _counter(report: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0
    report(stage, 0, total)

    def tick(more: int) -> None:
        nonlocal done
        done += more
        report(stage, done, total)

    return tick
