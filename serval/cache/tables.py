"""What the cache keeps of one sequence: its block tables, and what a policy lets them hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serval.cache.pool import BlockPool


@dataclass(eq=False)
class Group:
    """Layers that share one block table: the pool its ids come from, and how to copy one block's
    data.

    in_blocks: entries of a sequence that lie in blocks, as a function of how many it has; `delayed`
    says that it is not the identity. states: ids of per-sequence states (None: there are none).
    restore: `Layout.truncate`.
    """

    pool: BlockPool
    copy_block: Callable[[int, int], None]  # (source, destination)
    in_blocks: Callable[[int], int] = lambda entries: entries
    delayed: bool = False
    states: BlockPool | None = None
    copy_state: Callable[[int, int], None] | None = None  # (source, destination)
    restore: Callable[[np.ndarray, int, int, int], None] | None = None


class BlockTable:
    """A growing int32 vector of block ids."""

    __slots__ = ("_ids", "count")

    def __init__(self) -> None:
        self._ids = np.zeros(8, dtype=np.int32)
        self.count = 0

    @property
    def ids(self) -> np.ndarray:
        """int32 [count], a view."""
        return self._ids[: self.count]

    def push(self, block: int) -> None:
        """Append a block id."""
        if self.count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self.count] = block
        self.count += 1

    def pop(self) -> int:
        """Remove and return the last block id."""
        self.count -= 1
        return int(self._ids[self.count])

    def __getitem__(self, index: int) -> int:
        return int(self._ids[: self.count][index])

    def __setitem__(self, index: int, block: int) -> None:
        self._ids[: self.count][index] = block

    def copy(self) -> BlockTable:
        """An independent table with the same ids."""
        other = BlockTable()
        other._ids, other.count = self._ids.copy(), self.count
        return other


@dataclass(eq=False)
class Retention:
    """How many entries each group keeps of one sequence as it grows, and which it drops next.

    A group that would come to hold one entry or more above its share of the tokens seen so far
    drops one: the new token takes its place. Order among entries means nothing to the attention of
    one query, so nothing is moved.

    Args:
        rates, floors: group g's share of `total` tokens is max(rates[g] * total, floors[g]).
        queues: per group the entries (places) that may be dropped, oldest first; None: it drops
            none.
        positions: of the tokens in `queues`; only for groups with a window, else None.
        windows: per group, tokens that a query sees (None: all). What leaves it is dropped.
    """

    rates: list[float]
    floors: list[float]
    queues: list[deque[int] | None]
    positions: list[deque[int] | None]
    windows: list[int | None]

    def victim(self, group: int, entries: int, total: int) -> int | None:
        """The entry whose place the token that makes `total` takes in a group of `entries`, or None
        if the group grows."""
        queue = self.queues[group]
        if not queue:
            return None
        if entries >= max(self.rates[group] * total, self.floors[group]):
            return queue[0]
        seen, window = self.positions[group], self.windows[group]
        if seen is not None and window is not None and seen[0] < total - window:
            return queue[0]
        return None

    def turn(self, group: int, total: int) -> None:
        """The oldest entry of the queue is overwritten by the token that makes `total`."""
        queue, seen = self.queues[group], self.positions[group]
        assert queue is not None
        queue.rotate(-1)
        if seen is not None:
            seen.popleft()
            seen.append(total - 1)

    def extend(self, group: int, entries: int, total: int, count: int) -> None:
        """`count` tokens from position `total` on were stored behind `entries` entries."""
        queue, seen = self.queues[group], self.positions[group]
        if queue is not None:
            queue.extend(range(entries, entries + count))
        if seen is not None:
            seen.extend(range(total, total + count))

    def copy(self) -> Retention:
        """An independent copy, for a fork."""
        return Retention(
            self.rates,
            self.floors,
            [None if queue is None else queue.copy() for queue in self.queues],
            [None if seen is None else seen.copy() for seen in self.positions],
            self.windows,
        )


@dataclass(eq=False)
class SequenceCache:
    """One sequence's tables, one per group, and how many of its tokens they hold.

    root: what its keys start from. Sequences share blocks only under the same root: equal tokens
    have equal keys and values only in the same model (an adapter is another one). states: per group
    the id of the sequence's state, -1 while it has none. evicted: per group, tokens dropped.
    staged: tokens of the prompt that is computed outside the pool, 0 if it is not; `staging` holds
    them. reserved: blocks per pool that wait for what will be kept of it. retention: what decides
    about drops once the prompt is computed. placed: per group the entry that the last token
    replaced, -1 where it came last; None when all did.
    """

    tables: list[BlockTable]
    states: list[int]
    evicted: list[int]
    num_tokens: int = 0
    keys: list[bytes] = field(
        default_factory=list
    )  # chained keys of the leading full blocks, so far
    published: int = 0  # how many leading blocks were offered to the index
    root: bytes = b""
    staged: int = 0
    staging: Any = None
    reserved: list[int] = field(default_factory=list)
    retention: Retention | None = None
    placed: list[int] | None = None
