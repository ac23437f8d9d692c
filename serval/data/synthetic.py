"""Generated long-context tasks, in the style of RULER (arXiv 2404.06654) and MQAR (2312.04927).

Each task writes a context that hides facts and asks for some of them. Evaluation takes one query of
a context as a prompt; training takes the whole context with many queries, the loss on answers only
where the rest cannot be predicted. Same seed, same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from serval.data.words import ADJECTIVES, NOUNS, key_names
from serval.errors import ConfigError

Encode = Callable[[str], list[int]]
_KEYS = key_names()


@dataclass(frozen=True)
class Query:
    """A question about the context, its answer, and where the fact lies (0 start, 1 end)."""

    question: str
    answer: str
    depth: float


@dataclass
class Sample:
    """context: (text, predictable) pieces; predictable pieces count in a training loss."""

    context: list[tuple[str, bool]]
    queries: list[Query] = field(default_factory=list)

    def prompt(self, query: Query) -> str:
        return "".join(text for text, _ in self.context) + query.question


class Filler:
    """Lines of real text that hide the facts.

    lines: non-empty lines without newline; `encode` gives their token counts.
    """

    def __init__(self, texts: Sequence[str], encode: Encode) -> None:
        lines = [line.rstrip() for text in texts for line in text.splitlines() if line.strip()]
        if not lines:
            raise ConfigError("filler text for generated tasks is empty; give some text")
        self.lines = lines
        self.encode = encode
        self._costs: list[int | None] = [None] * len(lines)

    def take(self, rng: Random, budget: int) -> list[str]:
        """Consecutive lines from a random place, about `budget` tokens, newlines kept."""
        taken: list[str] = []
        at, used = rng.randrange(len(self.lines)), 0
        while True:
            at = (at + 1) % len(self.lines)
            cost = self._cost(at)
            if used + cost > budget:
                return taken
            taken.append(self.lines[at] + "\n")
            used += cost

    def _cost(self, at: int) -> int:
        cost = self._costs[at]
        if cost is None:
            cost = self._costs[at] = len(self.encode(self.lines[at] + "\n"))
        return cost


def number(rng: Random) -> str:
    """A six-digit value, two tokens of three digits."""
    return f"{rng.randrange(100, 1000)}{rng.randrange(0, 1000):03d}"


def _hide(
    lines: list[str], facts: list[str], rng: Random
) -> tuple[list[tuple[str, bool]], list[float]]:
    """Insert facts at random places, in order; returns the pieces and each fact's depth."""
    places = sorted(rng.randrange(len(lines) + 1) for _ in facts)
    pieces: list[tuple[str, bool]] = []
    depths = []
    previous = 0
    for place, fact in zip(places, facts, strict=True):
        pieces += [(line, True) for line in lines[previous:place]]
        depths.append(place / max(1, len(lines)))
        pieces.append((fact, False))
        previous = place
    pieces += [(line, True) for line in lines[previous:]]
    return pieces, depths


def needles(rng: Random, filler: Filler, length: int, count: int) -> Sample:
    """`count` sentences with a code each, hidden in real text; each query asks for one code."""
    keys = rng.sample(_KEYS, count)
    values = [number(rng) for _ in keys]
    facts = [f"The code of {k} is {v}.\n" for k, v in zip(keys, values, strict=True)]
    fact_cost = sum(len(filler.encode(fact)) for fact in facts)
    pieces, depths = _hide(filler.take(rng, max(0, length - fact_cost - 16)), facts, rng)
    queries = [
        Query(f"The code of {k} is", f" {v}.", d)
        for k, v, d in zip(keys, values, depths, strict=True)
    ]
    rng.shuffle(queries)
    return Sample(pieces, queries)


def needle(rng: Random, filler: Filler, length: int) -> Sample:
    """One sentence with a code, hidden in real text."""
    return needles(rng, filler, length, 1)


def multi_needle(rng: Random, filler: Filler, length: int) -> Sample:
    """Two to eight sentences with a code each, hidden in real text; each query asks for one."""
    return needles(rng, filler, length, max(2, min(8, length // 64)))


def _recall(
    rng: Random, filler: Filler, length: int, sign: str, value: Callable[[Random], str]
) -> Sample:
    """As many `key sign value` lines as fit into `length` tokens, every key asked again."""
    facts: list[tuple[str, str]] = []
    used = 16
    for key in rng.sample(_KEYS, min(len(_KEYS), length)):
        fact = (f"{key}{sign}", f" {value(rng)}")
        used += len(filler.encode("".join(fact) + "\n"))
        if used > length and facts:
            break
        facts.append(fact)
    last = max(1, len(facts) - 1)
    queries = [Query(question, answer, i / last) for i, (question, answer) in enumerate(facts)]
    rng.shuffle(queries)
    return Sample([(f"{question}{answer}\n", False) for question, answer in facts], queries)


def key_value(rng: Random, filler: Filler, length: int) -> Sample:
    """A context made only of `key: value` lines with six-digit values."""
    return _recall(rng, filler, length, ":", number)


def mqar(rng: Random, filler: Filler, length: int) -> Sample:
    """Multi-query associative recall: `key = word` lines."""
    return _recall(rng, filler, length, " =", lambda r: r.choice(NOUNS))


def variables(rng: Random, filler: Filler, length: int, hops: int | None = None) -> Sample:
    """Variable tracking: chains `a = 123456`, `b = a`, ... hidden in real text.

    A query asks for the value of a variable after `hops` assignments (None: 0 to 3); its depth is
    the place of the last assignment.
    """
    chains = max(1, min(5, length // 200))
    names = rng.sample(NOUNS, chains * 4)
    facts_by_chain: list[list[tuple[str, str, str]]] = []
    for c in range(chains):
        value, length_of_chain = number(rng), (rng.randrange(4) if hops is None else hops)
        chain = names[4 * c : 4 * c + 1 + length_of_chain]
        sources = [value, *chain[:-1]]
        facts_by_chain.append(
            [(n, f"let {n} = {s}\n", value) for n, s in zip(chain, sources, strict=True)]
        )
    ordered: list[tuple[str, str, str]] = []
    while any(facts_by_chain):
        ordered.append(rng.choice([chain for chain in facts_by_chain if chain]).pop(0))
    cost = sum(len(filler.encode(text)) for _, text, _ in ordered)
    lines = filler.take(rng, max(0, length - cost - 16))
    pieces, depths = _hide(lines, [text for _, text, _ in ordered], rng)
    by_name = {name: (value, d) for (name, _, value), d in zip(ordered, depths, strict=True)}
    if hops is not None:
        by_name = {n: by_name[n] for c in range(chains) for n in [names[4 * c + hops]]}
    queries = [Query(f"value of {n} =", f" {v}", d) for n, (v, d) in by_name.items()]
    rng.shuffle(queries)
    return Sample(pieces, queries)


@dataclass(frozen=True)
class Task:
    """make: draws a sample from (generator, filler, most tokens). context_share: of a training
    document that is context, drawn between the two; the rest is queries. A context made of facts
    alone has so many to ask for that it varies."""

    make: Callable[[Random, Filler, int], Sample]
    context_share: tuple[float, float] = (0.85, 0.85)


TASKS: dict[str, Task] = {
    "needle": Task(needle),
    "multi_needle": Task(multi_needle),
    "key_value": Task(key_value, (0.5, 0.9)),
    "variables": Task(variables),
    "mqar": Task(mqar, (0.5, 0.9)),
}


def copy(rng: Random, filler: Filler, length: int) -> Sample:
    """Training only: random words, then the same words again; the shortest road to retrieval."""
    words: list[str] = []
    used = 0
    while used < length // 2 or len(words) < 2:
        words.append(f" {rng.choice(NOUNS if len(words) % 2 else ADJECTIVES)}")
        used += len(filler.encode(words[-1]))
    text = "".join(words)
    return Sample([(f"List:{text}\n", False)], [Query("List:", text, 0.5)])


TRAINING_TASKS = {**TASKS, "copy": Task(copy)}


def make_sample(task: str, rng: Random, filler: Filler, length: int) -> Sample:
    """A sample of `task` whose context has about `length` tokens (never more)."""
    return _task(task).make(rng, filler, length)


def _task(name: str) -> Task:
    if name not in TRAINING_TASKS:
        raise ConfigError(f"unknown task {name!r}; choose one of: {', '.join(TRAINING_TASKS)}")
    return TRAINING_TASKS[name]


def training_document(
    task: str, rng: Random, filler: Filler, length: int, answer_weight: float = 1.0
) -> tuple[list[int], list[float]]:
    """Tokens and loss weights of one training document of at most `length` tokens.

    The context takes half to nearly all of it, queries the rest. Predictable text weighs 1, facts
    and questions (random words and digits) 0, answers `answer_weight`.
    """
    low, high = _task(task).context_share
    share = low if low == high else rng.uniform(low, high)
    sample = make_sample(task, rng, filler, max(16, int(length * share)))
    tokens: list[int] = []
    weights: list[float] = []

    def append(text: str, weight: float) -> None:
        ids = filler.encode(text)
        tokens.extend(ids)
        weights.extend([weight] * len(ids))

    for text, predictable in sample.context:
        append(text, 1.0 if predictable else 0.0)
    for query in sample.queries:
        append(query.question, 0.0)
        append(query.answer, answer_weight)
        append("\n", 0.0)
        if len(tokens) >= length:
            break
    return tokens[:length], weights[:length]
