"""Block tables: which blocks hold which tokens of which sequence.

Layers that store their keys the same way share one table (a *group*). A sequence has one table per
group, so layers may differ in layout. The manager moves ids; a group's `copy_block` moves the data
when a shared block must be written to (copy-on-write).

A group may hold fewer entries of a sequence than the sequence has tokens: `evicted` counts those
that a policy dropped. Of the entries, the first `in_blocks(entries)` lie in the table's blocks, the
rest in the sequence's state (see `serval.cache.layouts.base`).

Life of a sequence: `create` -> `match_prefix` (optional) -> `append` before each step ->
`commit` after it -> `truncate` (speculation) / `fork` (several samples) -> `free`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from serval.cache.pool import BlockPool, chain_key
from serval.errors import CacheError

_NO_STATE = "all sequence states are in use: free a sequence, or raise max_sequences"


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
class SequenceCache:
    """One sequence's tables, one per group, and how many of its tokens they hold.

    root: what its keys start from. Sequences share blocks only under the same root: equal tokens
    have equal keys and values only in the same model (an adapter is another one). states: per group
    the id of the sequence's state, -1 while it has none. evicted: per group, tokens dropped.
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


class CacheManager:
    """Tables of all live sequences over one or more groups.

    Args: groups: one per distinct layout; groups may share a pool. block_size: tokens per block,
        the same in every group. prefix_caching: publish finished blocks and look them up. With
        False every prompt is computed.
    """

    def __init__(
        self, groups: Sequence[Group], block_size: int, prefix_caching: bool = True
    ) -> None:
        if not groups or block_size < 1:
            raise CacheError(
                "a cache needs at least one group and a positive block size, got "
                f"{len(groups)} groups and block_size={block_size}"
            )
        self.groups = list(groups)
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._live: dict[int, SequenceCache] = {}
        self._pools = list({id(group.pool): group.pool for group in groups}.values())
        self._groups_of_pool = [sum(g.pool is pool for g in groups) for pool in self._pools]
        self._pool_of = [
            next(i for i, pool in enumerate(self._pools) if pool is group.pool) for group in groups
        ]

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

    def blocks_needed(self, cache: SequenceCache, count: int) -> list[int]:
        """Blocks that appending `count` tokens takes from each pool, copies included."""
        needed = [0] * len(self._pools)
        for index, (group, pool) in enumerate(zip(self.groups, self._pool_of, strict=True)):
            entries = cache.num_tokens - cache.evicted[index]
            before, after = group.in_blocks(entries), group.in_blocks(entries + count)
            size = self.block_size
            needed[pool] += -(-after // size) - -(-before // size)
            if after > before and self._last_is_shared(cache, index, before):
                needed[pool] += 1
        return needed

    def can_append(self, cache: SequenceCache, count: int, reserve: int = 0) -> bool:
        """Whether `append(cache, count)` would succeed and leave `reserve` blocks per group
        free."""
        needed = self.blocks_needed(cache, count)
        for pool, blocks, groups in zip(self._pools, needed, self._groups_of_pool, strict=True):
            wanted = blocks + reserve * groups
            if wanted and pool.num_free < wanted:
                return False
        return self._states_free([state < 0 for state in cache.states])

    def _states_free(self, wanted: Sequence[bool]) -> bool:
        """Whether a state can be had in each group for which one is wanted."""
        return all(
            not want or group.states is None or group.states.num_free > 0
            for want, group in zip(wanted, self.groups, strict=True)
        )

    def _take_states(self, cache: SequenceCache) -> None:
        """Give a sequence the states it lacks. Raises `CacheError`, having changed nothing."""
        if not self._states_free([state < 0 for state in cache.states]):
            raise CacheError(_NO_STATE)
        for index, group in enumerate(self.groups):
            if group.states is not None and cache.states[index] < 0:
                cache.states[index] = group.states.allocate()

    def append(self, cache: SequenceCache, count: int) -> None:
        """Make room for `count` more tokens and count them as stored.

        A partly filled last block that is shared is copied first; one that is published under a key
        is taken out of the index, since its contents change. Raises `CacheError`, having changed
        nothing, when the pools cannot supply the blocks.
        """
        self._check_live(cache)
        if count < 0:
            raise CacheError(f"Cannot append {count} tokens; use truncate to drop tokens.")
        if not self.can_append(cache, count):
            raise CacheError(
                f"{sum(self.blocks_needed(cache, count))} cache blocks are needed, "
                f"{min(pool.num_free for pool in self._pools)} are free."
            )
        if cache.num_tokens + count:
            self._take_states(cache)
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            entries = cache.num_tokens - cache.evicted[index]
            before, after = group.in_blocks(entries), group.in_blocks(entries + count)
            if after > before and before % self.block_size:
                self._own_last(group, table)
            wanted = -(-after // self.block_size)
            while table.count < wanted:
                table.push(group.pool.allocate())
        cache.num_tokens += count

    @staticmethod
    def _own_last(group: Group, table: BlockTable) -> None:
        """Make the last block writable: a shared one is copied, a published one is no longer
        found."""
        pool, last = group.pool, table[-1]
        if pool.references(last) > 1:
            fresh = pool.allocate()
            group.copy_block(last, fresh)
            pool.release(last)
            table[-1] = fresh
        elif pool.key(last) is not None:
            pool.unpublish(last)

    def commit(self, cache: SequenceCache, tokens: np.ndarray) -> None:
        """Publish the blocks that the step just finished filling.

        Args: `tokens` int64, at least the `num_tokens` stored ids from the sequence's start. Call
        it after the step has run, so that no other sequence reads a block before it is written.
        """
        self._check_live(cache)
        if not self.prefix_caching or any(cache.evicted):
            return  # after an eviction, what follows was computed from other keys
        stored = min(group.in_blocks(cache.num_tokens) for group in self.groups)
        full = stored // self.block_size
        if cache.published >= full:
            return
        self._extend_keys(cache, tokens, full)
        for index in range(cache.published, full):
            self._publish(cache, index)
        cache.published = full

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
        limit = (len(tokens) - 1) // self.block_size
        hits = 0
        while hits < limit:
            self._extend_keys(cache, tokens, hits + 1)
            if any(
                group.pool.find((index, cache.keys[hits])) is None
                for index, group in enumerate(self.groups)
            ):
                break
            hits += 1
        while hits and not self._reusable(hits * self.block_size):
            hits -= 1
        del cache.keys[hits:]  # what is stored next need not be these tokens
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            for key in cache.keys[:hits]:
                block = group.pool.find((index, key))
                assert block is not None
                group.pool.acquire(block)
                table.push(block)
        cache.num_tokens = hits * self.block_size
        cache.published = hits
        return cache.num_tokens

    def fork(self, cache: SequenceCache) -> SequenceCache:
        """A second sequence with the same contents; it shares every block until one of the two
        writes. Raises `CacheError` when there is no room for its state."""
        self._check_live(cache)
        if not self._states_free([state >= 0 for state in cache.states]):
            raise CacheError(_NO_STATE)
        tables = [table.copy() for table in cache.tables]
        child = SequenceCache(
            tables,
            [-1] * len(tables),
            list(cache.evicted),
            cache.num_tokens,
            list(cache.keys),
            cache.published,
            cache.root,
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
        if any(cache.evicted) and num_tokens < cache.num_tokens:
            raise CacheError("a sequence with evicted tokens cannot be truncated; reset it")
        self._check_length(cache, num_tokens)
        waiting = num_tokens and not self._reusable(num_tokens)
        if waiting:
            self._take_states(cache)
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
        held: list[Counter[int]] = [Counter() for _ in self._pools]
        states: dict[int, Counter[int]] = {
            id(group.states): Counter() for group in self.groups if group.states is not None
        }
        for cache in self._live.values():
            if cache.published > min(len(cache.keys), cache.num_tokens // self.block_size):
                raise CacheError("A sequence has published more blocks than it has filled.")
            for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
                entries = self.entries(cache, index)
                blocks = -(-group.in_blocks(entries) // self.block_size)
                if table.count != blocks:
                    raise CacheError(
                        f"A table holds {table.count} blocks for {entries} tokens, "
                        f"expected {blocks}."
                    )
                if group.states is not None:
                    waiting = entries - group.in_blocks(entries)
                    has_state = cache.states[index] >= 0
                    if (waiting and not has_state) or (has_state and not cache.num_tokens):
                        raise CacheError("A sequence has a state without tokens, or none with.")
                    if cache.states[index] >= 0:
                        states[id(group.states)][cache.states[index]] += 1
                ids = table.ids.tolist()
                if len(set(ids)) != len(ids):
                    raise CacheError(f"A table holds a block twice: {ids}.")
                held[self._pools.index(group.pool)].update(ids)
            self._check_keys(cache)
        for pool, counts in zip(self._pools, held, strict=True):
            pool.check_integrity(counts)
        for group in self.groups:
            if group.states is not None:
                group.states.check_integrity(states[id(group.states)])

    def _check_keys(self, cache: SequenceCache) -> None:
        """A published block must be published under the key of the tokens its holders stored in
        it."""
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            for position, key in enumerate(cache.keys[: cache.published]):
                published = group.pool.key(table[position])
                if published is not None and published != (index, key):
                    raise CacheError(
                        f"block {table[position]} is published under the key of other tokens"
                    )

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
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            keep = -(-group.in_blocks(num_tokens - cache.evicted[index]) // self.block_size)
            while table.count > keep:  # from the end, so that the start of a prefix goes last
                group.pool.release(table.pop())
            if num_tokens == 0 and group.states is not None and cache.states[index] >= 0:
                group.states.release(cache.states[index])
                cache.states[index] = -1
        cache.num_tokens = num_tokens
        cache.published = min(cache.published, num_tokens // self.block_size)

    def _last_is_shared(self, cache: SequenceCache, index: int, stored: int) -> bool:
        if stored % self.block_size == 0:
            return False
        return self.groups[index].pool.references(cache.tables[index][-1]) > 1

    def _reusable(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` has them all in blocks, which it can share."""
        return all(group.in_blocks(num_tokens) == num_tokens for group in self.groups)

    def _extend_keys(self, cache: SequenceCache, tokens: np.ndarray, count: int) -> None:
        size = self.block_size
        for index in range(len(cache.keys), count):
            parent = cache.keys[-1] if cache.keys else cache.root
            cache.keys.append(chain_key(parent, tokens[index * size : (index + 1) * size]))

    def _publish(self, cache: SequenceCache, position: int) -> None:
        for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
            group.pool.publish(table[position], (index, cache.keys[position]))

    def _check_live(self, cache: SequenceCache) -> None:
        if id(cache) not in self._live:
            raise CacheError("This sequence's cache was freed; create a new one.")
