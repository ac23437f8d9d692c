"""What PrefixKV is compared with: the same importance and other allocations, or none at all."""

from __future__ import annotations

from dataclasses import dataclass

from serval.cache.policies.allocators import Allocator, ProportionalAllocator, PyramidAllocator
from serval.cache.policies.base import Policy
from serval.cache.policies.scorers import Recency, Scorer


@dataclass
class Uniform(Policy):
    """The most attended tokens, equally many in every layer."""

    name = "uniform"

    @property
    def allocator(self) -> Allocator:
        return ProportionalAllocator()


@dataclass
class Pyramid(Policy):
    """The most attended tokens; fewer from layer to layer (PyramidKV, arXiv 2406.02069)."""

    name = "pyramid"

    @property
    def allocator(self) -> Allocator:
        return PyramidAllocator()


@dataclass
class H2O(Uniform):
    """H2O (arXiv 2306.14048): half of every layer's entries are the most attended tokens, half the
    last ones, a window that moves on while decoding. Heavy hitters are chosen once, when the prompt
    is complete."""

    name = "h2o"
    recent: float = 0.5


@dataclass
class Local(Uniform):
    """The first `start` and the last tokens, equally many in every layer: the selection of
    StreamingLLM (arXiv 2309.17453) at true positions; start=0 is a plain local window."""

    name = "local"
    # all but the first tokens are the last ones, and decoding drops the oldest of them
    unused = ("last", "recent", "distance", "queries")
    start: int = 4

    @property
    def scorer(self) -> Scorer:
        return Recency()

    def first_to_drop(self, kept: int) -> int:
        return min(self.start, kept - 1)
