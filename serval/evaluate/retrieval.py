"""Retrieval from long contexts: generated tasks, greedy answers, exact match per length and depth.

The tasks are those of `serval.data.synthetic` (single and multi-key needle, key-value retrieval,
variable tracking, MQAR). A prompt is a context and one question; the answer is right when the
greedy text begins with it and does not go on with another letter or digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from serval.data.synthetic import TASKS, Filler, make_sample
from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
from serval.errors import ConfigError

DEPTHS = 5  # depth bands of a grid
_ATTEMPTS = 40  # samples drawn, at most, to find a query in the wanted depth band
_MARGIN = 24  # tokens left free for the question and the answer


@dataclass(frozen=True)
class Question:
    """A prompt of `length` tokens at most, its answer, and where in the context the fact lies."""

    task: str
    length: int
    band: int
    depth: float
    prompt: str
    answer: str


@dataclass
class Cell:
    """Exact matches of one task at one context length and depth band (depth: its middle)."""

    task: str
    length: int
    depth: float
    correct: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else float("nan")


def make_questions(
    tasks: Sequence[str],
    lengths: Sequence[int],
    filler: Filler,
    *,
    samples: int = 4,
    depths: int = DEPTHS,
    seed: int = 0,
) -> list[Question]:
    """`samples` questions for every task, length and depth band; the same for the same seed.

    Raises ConfigError for an unknown task or a length too short to hold anything.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}; choose one of: {', '.join(TASKS)}")
    for length in lengths:
        if length < 2 * _MARGIN:
            raise ConfigError(
                f"a context of {length} tokens is too short; give at least {2 * _MARGIN}"
            )
    return [
        _question(task, length, band, depths, filler, Random(f"{seed}/{task}/{length}/{band}/{i}"))
        for task in tasks
        for length in lengths
        for band in range(depths)
        for i in range(samples)
    ]


def _question(
    task: str, length: int, band: int, depths: int, filler: Filler, rng: Random
) -> Question:
    middle = (band + 0.5) / depths
    best = None
    for _ in range(_ATTEMPTS):
        sample = make_sample(task, rng, filler, length - _MARGIN)
        query = min(sample.queries, key=lambda q: abs(q.depth - middle))
        if best is None or abs(query.depth - middle) < abs(best[1].depth - middle):
            best = (sample, query)
        if abs(best[1].depth - middle) <= 0.5 / depths:
            break
    assert best is not None
    sample, query = best
    return Question(task, length, band, query.depth, sample.prompt(query), query.answer)


def ask(
    llm: LLM,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    depths: int = DEPTHS,
    batch: int = 16,
    tick: Callable[[int], None] | None = None,
) -> list[Cell]:
    """Answer every question greedily and count exact matches.

    batch: prompts handed to the engine at a time. `tick` is told how many more were answered.
    """
    cells: dict[tuple[str, int, int], Cell] = {}
    for start in range(0, len(questions), batch):
        chosen = questions[start : start + batch]
        prompts = [tokenizer(q.prompt, verbose=False)["input_ids"] for q in chosen]
        params = [_answer_params(tokenizer, q.answer) for q in chosen]
        for question, output in zip(chosen, llm.generate(prompts, params), strict=True):
            key = (question.task, question.length, question.band)
            cell = cells.setdefault(key, Cell(*key[:2], (question.band + 0.5) / depths))
            cell.total += 1
            cell.correct += matches(output.outputs[0].text, question.answer)
        if tick is not None:
            tick(len(chosen))
    return list(cells.values())


def matches(text: str, answer: str) -> bool:
    """Whether generated text gives the answer: begins with it, then ends or goes on otherwise."""
    given, wanted = text.strip(), answer.strip().rstrip(".")
    return given.startswith(wanted) and not given[len(wanted) : len(wanted) + 1].isalnum()


def accuracy(cells: Sequence[Cell]) -> float:
    """Share of exact matches over all cells (NaN without any)."""
    total = sum(cell.total for cell in cells)
    return sum(cell.correct for cell in cells) / total if total else float("nan")


def _answer_params(tokenizer: Any, answer: str) -> SamplingParams:
    length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return SamplingParams(temperature=0.0, max_tokens=length + 1)
