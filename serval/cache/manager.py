"""Block tables: which blocks hold which tokens of which sequence.

Layers that store their keys the same way share one table (a *group*). A sequence has one table per
group, so layers may differ in layout. The manager moves ids; a group's `copy_block` moves the data
when a shared block must be written to (copy-on-write).

A group may hold fewer entries of a sequence than the sequence has tokens: `evicted` counts those
that a policy dropped. Of the entries, the first `in_blocks(entries)` lie in the table's blocks, the
rest in the sequence's state (see `serval.cache.layouts.base`).

Life of a sequence: `create` -> `match_prefix` (optional) -> `begin` -> `append` before each step ->
`commit` after it -> `truncate` (speculation) / `fork` (several samples) -> `free`. Under a policy a
prompt may be *staged*: its tokens are computed outside the pool, which sets blocks aside for what
will be kept of them, and `settle` gives the sequence its blocks when the prompt is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serval.cache.integrity import check_books
from serval.cache.prefixes import Prefixes
from serval.cache.states import check_states, states_free, take_states
from serval.cache.tables import BlockTable, Group, SequenceCache
from serval.errors import CacheError

__all__ = ["BlockTable", "CacheManager", "Group", "SequenceCache"]


class CacheManager:
    """Tables of all live sequences over one or more groups.

    Args: groups: one per distinct layout; groups may share a pool. block_size: tokens per block,
        the same in every group. prefix_caching: publish finished blocks and look them up. With
        False every prompt is computed. staged_blocks: for a prompt of n tokens that is staged, the
        most blocks of each pool that will be kept of it (None: it is not staged).
        max_staged_tokens: of all sequences together, beyond the first.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        block_size: int,
        prefix_caching: bool = True,
        staged_blocks: Callable[[int], list[int] | None] | None = None,
        max_staged_tokens: int = 0,
    ) -> None:
        if not groups or block_size < 1:
            raise CacheError(
                "a cache needs at least one group and a positive block size, got "
                f"{len(groups)} groups and block_size={block_size}"
            )
        self.groups = list(groups)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._prefixes = Prefixes(self.groups, block_size)
        self.max_staged_tokens = max_staged_tokens
        self.staged_tokens = 0
        self._staged_blocks = staged_blocks
        self._live: dict[int, SequenceCache] = {}
        self._pools = list({id(group.pool): group.pool for group in groups}.values())
        self._groups_of_pool = [sum(g.pool is pool for g in groups) for pool in self._pools]
        self._pool_of = [
            next(i for i, pool in enumerate(self._pools) if pool is group.pool) for group in groups
        ]
        self._reserved = [0] * len(self._pools)

    @property
    def total_blocks(self) -> int:
        """Blocks of all pools."""
        return sum(pool.num_blocks for pool in self._pools)

    @property
    def used_blocks(self) -> int:
        """Blocks that live sequences hold, over all pools."""
        return sum(pool.num_used for pool in self._pools)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of one sequence that would fill the cache completely."""
        shares = zip(self._pools, self._groups_of_pool, strict=True)
        return min(pool.num_blocks // groups for pool, groups in shares) * self.block_size

    @property
    def stagings(self) -> list[Any]:
        """What holds the prompts that are being computed outside the pools."""
        return [cache.staging for cache in self._live.values() if cache.staging is not None]

    def create(self, root: bytes = b"") -> SequenceCache:
        """An empty sequence; it shares stored prefixes only with sequences of the same `root` (at
        most 15 bytes, so that no key can be taken for one)."""
        if len(root) > 15:
            raise CacheError(f"the root of a sequence's keys has {len(root)} bytes, at most 15 fit")
        groups = len(self.groups)
        cache = SequenceCache(
            [BlockTable() for _ in self.groups], [-1] * groups, [0] * groups, root=root
        )
        self._live[id(cache)] = cache
        return cache

    def entries(self, cache: SequenceCache, group: int) -> int:
        """Tokens of a sequence that a group still holds."""
        return cache.num_tokens - cache.evicted[group]

    def can_begin(self, cache: SequenceCache, length: int, reserve: int = 0) -> bool:
        """Whether a sequence whose first `length` tokens are known can be computed up to there,
        leaving `reserve` blocks per group free."""
        wanted = None if self._staged_blocks is None else self._staged_blocks(length)
        if wanted is None:
            return self.can_append(cache, length - cache.num_tokens, reserve)
        if self.staged_tokens and self.staged_tokens + length > self.max_staged_tokens:
            return False
        return self._blocks_free(wanted, reserve)

    def begin(self, cache: SequenceCache, length: int) -> None:
        """An empty sequence's first `length` tokens will be computed, in one or more steps. If they
        are staged, blocks are set aside for what will be kept of them. Raises `CacheError`, having
        changed nothing, when `can_begin` is false."""
        self._check_live(cache)
        if not self.can_begin(cache, length):
            raise CacheError(f"the cache has no room for a prompt of {length} tokens")
        wanted = None if self._staged_blocks is None else self._staged_blocks(length)
        if wanted is None:
            return
        if cache.num_tokens or cache.staged:
            raise CacheError("only an empty sequence can be staged; reset it first")
        cache.staged, cache.reserved = length, list(wanted)
        self.staged_tokens += length
        for pool, count in enumerate(wanted):
            self._reserved[pool] += count

    def settle(self, cache: SequenceCache, kept: Sequence[int]) -> None:
        """The staged prompt is computed and group g keeps kept[g] of its tokens: give it blocks for
        them. Raises `CacheError`, having changed nothing, when it is not complete."""
        self._check_live(cache)
        if not cache.staged or cache.num_tokens != cache.staged:
            raise CacheError(
                f"{cache.num_tokens} of {cache.staged} staged tokens are computed: nothing to "
                "settle yet"
            )
        if not all(0 < count <= cache.num_tokens for count in kept):
            raise CacheError(f"groups of {cache.num_tokens} tokens cannot keep {list(kept)}")
        self._unstage(cache)
        take_states(self.groups, cache)
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            cache.evicted[index] = cache.num_tokens - kept[index]
            for _ in range(-(-group.in_blocks(kept[index]) // self.block_size)):
                table.push(group.pool.allocate())

    def _unstage(self, cache: SequenceCache) -> None:
        """Give back what is set aside for a staged sequence."""
        self.staged_tokens -= cache.staged
        for pool, count in enumerate(cache.reserved):
            self._reserved[pool] -= count
        cache.staged, cache.reserved, cache.staging = 0, [], None

    def blocks_needed(self, cache: SequenceCache, count: int) -> list[int]:
        """Blocks that appending `count` tokens takes from each pool, copies included."""
        needed = [0] * len(self._pools)
        if cache.staged:
            return needed
        for index, (group, pool) in enumerate(zip(self.groups, self._pool_of, strict=True)):
            entries = cache.num_tokens - cache.evicted[index]
            place = self._victim(cache, index, entries, count)
            if place is not None:
                block = cache.tables[index][place // self.block_size]
                needed[pool] += group.pool.references(block) > 1
                continue
            before, after = group.in_blocks(entries), group.in_blocks(entries + count)
            size = self.block_size
            needed[pool] += -(-after // size) - -(-before // size)
            if after > before and self._last_is_shared(cache, index, before):
                needed[pool] += 1
        return needed

    @staticmethod
    def _victim(cache: SequenceCache, index: int, entries: int, count: int) -> int | None:
        """The entry that the next token of a step replaces; in a step of several tokens, which see
        each other in order, none is."""
        if cache.retention is None or count != 1:
            return None
        return cache.retention.victim(index, entries, cache.num_tokens + 1)

    def can_append(self, cache: SequenceCache, count: int, reserve: int = 0) -> bool:
        """Whether `append(cache, count)` would succeed and leave `reserve` blocks per group
        free."""
        if cache.staged:
            return cache.num_tokens + count <= cache.staged
        return self._blocks_free(self.blocks_needed(cache, count), reserve) and states_free(
            self.groups, [state < 0 for state in cache.states]
        )

    def _blocks_free(self, needed: Sequence[int], reserve: int = 0) -> bool:
        """Whether the pools have so many blocks that nobody reserved, and `reserve` per group."""
        for index, (pool, blocks) in enumerate(zip(self._pools, needed, strict=True)):
            wanted = blocks + reserve * self._groups_of_pool[index]
            if wanted and pool.num_free - self._reserved[index] < wanted:
                return False
        return True

    def append(self, cache: SequenceCache, count: int) -> None:
        """Make room for `count` more tokens and count them as stored.

        A block that is written to and shared is copied first; one that is published under a key is
        taken out of the index, since its contents change. Raises `CacheError`, having changed
        nothing, when the pools cannot supply the blocks.
        """
        self._check_live(cache)
        if count < 0:
            raise CacheError(f"Cannot append {count} tokens; use truncate to drop tokens.")
        if not self.can_append(cache, count):
            if cache.staged:
                raise CacheError(f"a prompt staged for {cache.staged} tokens grew beyond them")
            raise CacheError(
                f"{sum(self.blocks_needed(cache, count))} cache blocks are needed, "
                f"{min(pool.num_free for pool in self._pools)} are free."
            )
        if cache.staged:
            cache.num_tokens += count
            cache.evicted = [cache.num_tokens] * len(self.groups)
            return
        if cache.num_tokens + count:
            take_states(self.groups, cache)
        if cache.retention is not None:
            self._append_retained(cache, count)
        else:
            for index in range(len(self.groups)):
                self._grow(cache, index, cache.num_tokens - cache.evicted[index], count)
        cache.num_tokens += count

    def _append_retained(self, cache: SequenceCache, count: int) -> None:
        """Blocks for `count` more tokens, or in groups that hold their share the place of a token
        that is dropped."""
        retention, total = cache.retention, cache.num_tokens
        assert retention is not None
        cache.placed = [-1] * len(self.groups)
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            entries = total - cache.evicted[index]
            place = self._victim(cache, index, entries, count)
            if place is None:
                self._grow(cache, index, entries, count)
                retention.extend(index, entries, total, count)
            else:
                self._own(group, table, place // self.block_size)
                cache.evicted[index] += 1
                cache.placed[index] = place
                retention.turn(index, total + 1)

    def _grow(self, cache: SequenceCache, index: int, entries: int, count: int) -> None:
        """Blocks of one group for `count` tokens behind `entries` entries."""
        group, table = self.groups[index], cache.tables[index]
        before, after = group.in_blocks(entries), group.in_blocks(entries + count)
        if after > before and before % self.block_size:
            self._own(group, table, table.count - 1)
        wanted = -(-after // self.block_size)
        while table.count < wanted:
            table.push(group.pool.allocate())

    @staticmethod
    def _own(group: Group, table: BlockTable, index: int) -> None:
        """Make a block of the table writable: a shared one is copied, a published one is no longer
        found."""
        pool, block = group.pool, table[index]
        if pool.references(block) > 1:
            fresh = pool.allocate()
            group.copy_block(block, fresh)
            pool.release(block)
            table[index] = fresh
        elif pool.key(block) is not None:
            pool.unpublish(block)

    def commit(self, cache: SequenceCache, tokens: np.ndarray) -> None:
        """Publish the blocks that the step just finished filling.

        Args: `tokens` int64, at least the `num_tokens` stored ids from the sequence's start. Call
        it after the step has run, so that no other sequence reads a block before it is written.
        """
        self._check_live(cache)
        if not self.prefix_caching or any(cache.evicted):
            return  # after an eviction, what follows was computed from other keys
        self._prefixes.publish(cache, tokens)

    def match_prefix(self, cache: SequenceCache, tokens: np.ndarray) -> int:
        """Let an empty sequence share the stored blocks that hold the start of `tokens`.

        At least one token is left to compute, since the next token's logits come from it. Returns
        the number of tokens found (a multiple of `block_size`).
        """
        self._check_live(cache)
        if cache.num_tokens:
            raise CacheError("match_prefix needs an empty sequence; this one already holds tokens.")
        if not self.prefix_caching:
            return 0
        return self._prefixes.match(cache, tokens)

    def fork(self, cache: SequenceCache) -> SequenceCache:
        """A second sequence with the same contents; it shares every block until one of the two
        writes. Raises `CacheError` when there is no room for its state."""
        self._check_live(cache)
        if cache.staged:
            raise CacheError("a staged sequence cannot be forked before its prompt is complete")
        check_states(self.groups, [state >= 0 for state in cache.states])
        tables = [table.copy() for table in cache.tables]
        child = SequenceCache(
            tables,
            [-1] * len(tables),
            list(cache.evicted),
            cache.num_tokens,
            list(cache.keys),
            cache.published,
            cache.root,
            retention=None if cache.retention is None else cache.retention.copy(),
        )
        for index, group in enumerate(self.groups):
            if group.states is not None and cache.states[index] >= 0:
                child.states[index] = group.states.allocate()
                assert group.copy_state is not None
                group.copy_state(cache.states[index], child.states[index])
        for group, table in zip(self.groups, child.tables, strict=True):
            for block in table.ids:
                group.pool.acquire(int(block))
        self._live[id(child)] = child
        return child

    def truncate(self, cache: SequenceCache, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens and give back the blocks beyond them. Raises
        `CacheError`, having changed nothing, when tokens were evicted since, or when the last ones
        must wait in a state again and none is free."""
        self._check_live(cache)
        self._check_length(cache, num_tokens)
        if (any(cache.evicted) or cache.retention is not None) and num_tokens < cache.num_tokens:
            raise CacheError("a sequence whose tokens are evicted cannot be truncated; reset it")
        waiting = num_tokens and not self._prefixes.reusable(num_tokens)
        if waiting:
            take_states(self.groups, cache)
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            shorter = group.in_blocks(num_tokens) < group.in_blocks(cache.num_tokens)
            if waiting and group.delayed and shorter:
                assert group.restore is not None
                group.restore(table.ids, cache.states[index], cache.num_tokens, num_tokens)
        self._release_after(cache, num_tokens)
        del cache.keys[num_tokens // self.block_size :]  # other tokens may follow

    def reset(self, cache: SequenceCache) -> None:
        """Give back every block of a sequence that will be computed again; other tokens may
        follow."""
        self._release_after(cache, 0)
        cache.keys.clear()

    def free(self, cache: SequenceCache) -> None:
        """Give back every block. The sequence must not be used again; freeing twice is an error."""
        self._release_after(cache, 0)
        del self._live[id(cache)]

    def check_integrity(self) -> None:
        """Raise `CacheError` unless tables, reference counts, free lists and keys all agree."""
        check_books(self.groups, self._pools, self._reserved, self._live.values(), self.block_size)
        if self.staged_tokens != sum(cache.staged for cache in self._live.values()):
            raise CacheError(f"{self.staged_tokens} tokens count as staged; sequences disagree.")

    @staticmethod
    def _check_length(cache: SequenceCache, num_tokens: int) -> None:
        if not 0 <= num_tokens <= cache.num_tokens:
            raise CacheError(
                f"Cannot truncate a sequence of {cache.num_tokens} tokens to {num_tokens}."
            )

    def _release_after(self, cache: SequenceCache, num_tokens: int) -> None:
        self._check_live(cache)
        self._check_length(cache, num_tokens)
        if num_tokens == 0:
            cache.evicted = [0] * len(self.groups)
            cache.retention = cache.placed = None
            self._unstage(cache)
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            keep = -(-group.in_blocks(num_tokens - cache.evicted[index]) // self.block_size)
            while table.count > keep:  # from the end, so that the start of a prefix goes last
                group.pool.release(table.pop())
            if num_tokens == 0 and group.states is not None and cache.states[index] >= 0:
                group.states.release(cache.states[index])
                cache.states[index] = -1
        cache.num_tokens = num_tokens
        in_blocks = min(group.in_blocks(num_tokens) for group in self.groups)
        cache.published = min(cache.published, in_blocks // self.block_size)

    def _last_is_shared(self, cache: SequenceCache, index: int, stored: int) -> bool:
        if stored % self.block_size == 0:
            return False
        return self.groups[index].pool.references(cache.tables[index][-1]) > 1

    def _check_live(self, cache: SequenceCache) -> None:
        if id(cache) not in self._live:
            raise CacheError("This sequence's cache was freed; create a new one.")
