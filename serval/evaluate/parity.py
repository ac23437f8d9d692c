"""Generation parity: do two ways of running a model produce the same greedy tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Divergence:
    """Where prompt `index` first differs: generated token `at`, ours and the expected one (None:
    that side had already stopped)."""

    index: int
    at: int
    ours: int | None
    expected: int | None


@dataclass
class Parity:
    """sequences compared, tokens in the expected ones, tokens before the first difference."""

    sequences: int
    tokens: int
    agreed: int
    divergences: list[Divergence]

    @property
    def identical(self) -> bool:
        return not self.divergences

    def __str__(self) -> str:
        if self.identical:
            return f"{self.sequences} sequences, {self.tokens} tokens, all identical"
        first = self.divergences[0]
        return (
            f"{len(self.divergences)} of {self.sequences} sequences differ; sequence "
            f"{first.index} first at generated token {first.at}: {first.ours} instead of "
            f"{first.expected}"
        )


def compare(ours: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Parity:
    """Compare generated token ids, sequence by sequence. Raises ValueError when the counts differ.

    For example `compare([o.outputs[0].token_ids for o in llm.generate(prompts, greedy)], theirs)`.
    """
    if len(ours) != len(expected):
        raise ValueError(f"{len(ours)} sequences against {len(expected)}; they pair up one to one")
    found, agreed = [], 0
    for index, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
        if at is None and len(mine) != len(theirs):
            at = min(len(mine), len(theirs))
        agreed += len(theirs) if at is None else at
        if at is not None:
            found.append(Divergence(index, at, _get(mine, at), _get(theirs, at)))
    return Parity(len(expected), sum(map(len, expected)), agreed, found)


def _get(tokens: Sequence[int], at: int) -> int | None:
    return tokens[at] if at < len(tokens) else None
