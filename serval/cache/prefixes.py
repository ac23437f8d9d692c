"""Prefix caching: finished blocks are published under keys of their tokens, and found again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serval.cache.pool import chain_key
from serval.cache.tables import Group, SequenceCache


class Prefixes:
    """Blocks of the groups' pools by the tokens they hold and all tokens before."""

    def __init__(self, groups: Sequence[Group], block_size: int) -> None:
        self.groups = groups
        self.block_size = block_size

    def reusable(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` has them all in blocks, which it can share."""
        return all(group.in_blocks(num_tokens) == num_tokens for group in self.groups)

    def publish(self, cache: SequenceCache, tokens: np.ndarray) -> None:
        """Let others find the blocks that `cache` filled. tokens: its ids, from the start."""
        stored = min(group.in_blocks(cache.num_tokens) for group in self.groups)
        full = stored // self.block_size
        if cache.published >= full:
            return
        self._extend_keys(cache, tokens, full)
        for position in range(cache.published, full):
            for index, (group, table) in enumerate(zip(self.groups, cache.tables, strict=True)):
                group.pool.publish(table[position], (index, cache.keys[position]))
        cache.published = full

    def match(self, cache: SequenceCache, tokens: np.ndarray) -> int:
        """Give an empty sequence the blocks that hold the start of `tokens`, all but the last token
        at most; returns how many tokens they hold."""
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
        while hits and not self.reusable(hits * self.block_size):
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

    def _extend_keys(self, cache: SequenceCache, tokens: np.ndarray, count: int) -> None:
        size = self.block_size
        for index in range(len(cache.keys), count):
            parent = cache.keys[-1] if cache.keys else cache.root
            cache.keys.append(chain_key(parent, tokens[index * size : (index + 1) * size]))
