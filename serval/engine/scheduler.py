"""Which sequences run in the next step, and how many of their tokens.

Continuous batching with chunked prefill (Orca, OSDI 2022; Sarathi-Serve, arXiv 2403.02310): a step
holds one token of every decoding sequence plus as much of the waiting prompts as the token budget
allows. Order of arrival is order of service. When the pool is full, the latest arrival gives its
blocks back and is computed again later (its finished blocks may still be found in the prefix
index). The oldest sequence always fits, so every request finishes.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from serval.cache.manager import CacheManager
from serval.engine.request import Sequence


@dataclass(slots=True)
class Work:
    """Run tokens [start, start + count) of a sequence; `samples` if its next token follows."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class Scheduler:
    """Queues of waiting and running sequences over one cache.

    Args:
        manager: the cache tables; the scheduler allocates, the engine commits and frees.
        max_batch_tokens: rows of a step, at least `max_sequences`.
        max_sequences: sequences that may run at once.
    """

    def __init__(self, manager: CacheManager, max_batch_tokens: int, max_sequences: int) -> None:
        self.manager = manager
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new or preempted sequence."""
        insort(self.waiting, sequence, key=_order)

    def add_running(self, sequence: Sequence) -> None:
        """A fork joins its parent; the parent reserved its slot."""
        insort(self.running, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and free its blocks."""
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        self.manager.free(sequence.cache)

    def schedule(self) -> list[Work]:
        """The next step's work; blocks for it are allocated. Empty only when idle."""
        planned: dict[Sequence, Work] = {}
        budget = self.max_batch_tokens
        preempted = self.preemptions
        decoding = [s for s in self.running if s.remaining == 1]
        prefilling = [s for s in self.running if s.remaining > 1]
        for sequence in decoding + prefilling:
            if budget == 0:
                break
            count = min(sequence.remaining, budget)
            before = self.preemptions
            if self._make_room(sequence, count, planned):
                self._plan(sequence, count, planned)
                budget -= count
            if self.preemptions != before:  # a planned latecomer may have given up its share
                budget = self.max_batch_tokens - sum(work.count for work in planned.values())
        if self.preemptions == preempted:
            self._admit(budget, planned)
        return list(planned.values())

    def _plan(self, sequence: Sequence, count: int, planned: dict[Sequence, Work]) -> None:
        start = sequence.cache.num_tokens
        samples = start + count == sequence.length
        self.manager.append(sequence.cache, count)
        planned[sequence] = Work(sequence, start, count, samples)

    def _make_room(self, sequence: Sequence, count: int, planned: dict[Sequence, Work]) -> bool:
        """Preempt latecomers until `count` tokens fit; False if `sequence` itself had to go."""
        while not self.manager.can_append(sequence.cache, count):
            if sequence not in self.running:
                return False
            self._preempt(self.running[-1], planned)
        return sequence in self.running

    def _preempt(self, victim: Sequence, planned: dict[Sequence, Work]) -> None:
        self.running.remove(victim)
        planned.pop(victim, None)
        self.manager.reset(victim.cache)
        self.preemptions += 1
        self.add(victim)

    def _admit(self, budget: int, planned: dict[Sequence, Work]) -> None:
        """Start waiting sequences, strictly in order, while slots, budget and blocks last.

        A prompt is admitted only if all of it fits now, although only a chunk may run; otherwise
        it would soon be preempted again.
        """
        slots = self.max_sequences - sum(sequence.width for sequence in self.running)
        while self.waiting and budget > 0 and self.waiting[0].width <= slots:
            sequence = self.waiting[0]
            cache = sequence.cache
            # Every prompt position must be computed when its logits are wanted.
            skip = sequence.wants_prompt_logprobs
            hits = 0 if skip else self.manager.match_prefix(cache, sequence.tokens)
            reserve = 1 if self.running else 0
            if not self.manager.can_begin(cache, sequence.length, reserve):
                self.manager.reset(cache)
                return
            self.manager.begin(cache, sequence.length)
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            self.prefix_hit_tokens += hits
            if sequence.num_output == 0:
                sequence.request.num_cached_tokens = hits
            slots -= sequence.width
            count = min(sequence.remaining, budget)
            self._plan(sequence, count, planned)
            budget -= count
