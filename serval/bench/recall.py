"""Retrieval from context at little cost: many questions about each context.

The contexts, questions and rule of exact match are those of `serval eval`
(`serval.evaluate.retrieval`), which draws a new context for every question. Here the questions of a
context share its cached prefix: their prompts are computed from where they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from serval.data.synthetic import Filler, make_sample
from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
from serval.evaluate import retrieval
from serval.evaluate.retrieval import DEPTHS, Question
from serval.models.decoder import Decoder


def make_questions(
    tasks: Sequence[str],
    filler: Filler,
    *,
    length: int,
    contexts: int,
    questions: int,
    seed: int = 0,
) -> list[list[Question]]:
    """`contexts` contexts of about `length` tokens for every task, each with at most `questions`
    questions, at random depths. The same for the same seed."""
    made = []
    for task in tasks:
        for index in range(contexts):
            sample = make_sample(task, Random(f"{seed}/{task}/{length}/{index}"), filler, length)
            made.append(
                [
                    Question(
                        task,
                        length,
                        min(DEPTHS - 1, int(query.depth * DEPTHS)),
                        query.depth,
                        sample.prompt(query),
                        query.answer,
                    )
                    for query in sample.queries[:questions]
                ]
            )
    return made


def answer(decoder: Decoder, tokenizer: Any, contexts: Sequence[Sequence[Question]]) -> float:
    """The share of right answers: the mean over tasks of each task's share."""
    found = shares(decoder, tokenizer, contexts)
    return sum(found.values()) / len(found)


def shares(
    decoder: Decoder, tokenizer: Any, contexts: Sequence[Sequence[Question]], kv: str = "full"
) -> dict[str, float]:
    """The share of right answers of each task, read from a cache of layout `kv`."""
    llm = LLM(decoder, tokenizer=tokenizer, kv=kv)
    first = [tokenizer(some[0].prompt, verbose=False)["input_ids"] for some in contexts]
    llm.generate(first, SamplingParams(temperature=0.0, max_tokens=1))  # fills the cache
    questions = [question for some in contexts for question in some]
    cells = retrieval.ask(llm, tokenizer, questions, batch=64)
    tasks = dict.fromkeys(cell.task for cell in cells)
    return {task: retrieval.accuracy([c for c in cells if c.task == task]) for task in tasks}
