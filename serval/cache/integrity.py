"""The check that tables, reference counts, free lists, reservations and keys all agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from serval.cache.pool import BlockPool
from serval.cache.tables import BlockTable, Group, SequenceCache
from serval.errors import CacheError


def check_books(
    groups: Sequence[Group],
    pools: Sequence[BlockPool],
    reserved: Sequence[int],
    live: Iterable[SequenceCache],
    block_size: int,
) -> None:
    """Raise `CacheError` naming the first disagreement. reserved: blocks set aside per pool."""
    held: list[Counter[int]] = [Counter() for _ in pools]
    states: dict[int, Counter[int]] = {
        id(group.states): Counter() for group in groups if group.states is not None
    }
    promised = [0] * len(pools)
    for cache in live:
        if cache.published > min(len(cache.keys), cache.num_tokens // block_size):
            raise CacheError("A sequence has published more blocks than it has filled.")
        for place, count in enumerate(cache.reserved):
            promised[place] += count
        if bool(cache.reserved) != bool(cache.staged) or (
            cache.staged and cache.num_tokens > cache.staged
        ):
            raise CacheError(
                f"A sequence of {cache.num_tokens} tokens is staged for {cache.staged} and has "
                f"reserved {cache.reserved}."
            )
        for index, (group, table) in enumerate(zip(groups, cache.tables, strict=True)):
            _check_table(cache, index, group, table, block_size)
            if group.states is not None and cache.states[index] >= 0:
                states[id(group.states)][cache.states[index]] += 1
            held[pools.index(group.pool)].update(table.ids.tolist())
        _check_keys(groups, cache)
    for pool, counts in zip(pools, held, strict=True):
        pool.check_integrity(counts)
    if promised != list(reserved):
        raise CacheError(f"Blocks {reserved} are set aside, sequences reserved {promised}.")
    for pool, count in zip(pools, reserved, strict=True):
        if count > pool.num_free:
            raise CacheError(f"{count} blocks are set aside, {pool.num_free} are free.")
    for group in groups:
        if group.states is not None:
            group.states.check_integrity(states[id(group.states)])


def _check_table(
    cache: SequenceCache, index: int, group: Group, table: BlockTable, block_size: int
) -> None:
    entries = cache.num_tokens - cache.evicted[index]
    if entries < 0 or (cache.staged and entries):
        raise CacheError(
            f"A sequence of {cache.num_tokens} tokens has {cache.evicted[index]} evicted"
            f"{' while it is staged' if cache.staged else ''}."
        )
    blocks = -(-group.in_blocks(entries) // block_size)
    if table.count != blocks:
        raise CacheError(
            f"A table holds {table.count} blocks for {entries} tokens, expected {blocks}."
        )
    if group.states is not None:
        waiting = entries - group.in_blocks(entries)
        has_state = cache.states[index] >= 0
        if (waiting and not has_state) or (has_state and not cache.num_tokens):
            raise CacheError("A sequence has a state without tokens, or none with.")
    ids = table.ids.tolist()
    if len(set(ids)) != len(ids):
        raise CacheError(f"A table holds a block twice: {ids}.")
    queue = None if cache.retention is None else cache.retention.queues[index]
    if queue is not None and not (
        len(set(queue)) == len(queue) and all(0 <= place < entries for place in queue)
    ):
        raise CacheError(f"A queue of {entries} entries names the places {list(queue)}.")


def _check_keys(groups: Sequence[Group], cache: SequenceCache) -> None:
    """A published block must be published under the key of the tokens its holders stored in it."""
    for index, (group, table) in enumerate(zip(groups, cache.tables, strict=True)):
        for position, key in enumerate(cache.keys[: cache.published]):
            published = group.pool.key(table[position])
            if published is not None and published != (index, key):
                raise CacheError(
                    f"block {table[position]} is published under the key of other tokens"
                )
