"""The block pool: who owns which block of the paged cache.

Storage is cut into blocks of `block_size` tokens. The pool knows nothing of tensors; it hands out
block ids, counts references, and remembers which blocks hold a finished, reusable piece of a
prompt.

A block is in exactly one of three states:

* *used*: its reference count is at least one;
* *cached*: nobody refers to it, but its contents are still known under a key, so a later request
  with the same prefix can take it back. The least recently released cached block is evicted when
  space is needed;
* *blank*: nobody refers to it and its contents mean nothing.

Source of the scheme: automatic prefix caching as in vLLM (Kwon et al. 2023, "Efficient Memory
Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180), keyed by a hash
chained over blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from hashlib import blake2b

import numpy as np

from serval.errors import CacheError


def chain_key(parent: bytes, tokens: np.ndarray) -> bytes:
    """The key of a full block: a 16-byte digest of the previous block's key and this block's
    tokens.

    Two blocks share a key only if every token from the start of the sequence agrees, so equal keys
    mean equal keys and values. Args: `parent` is the sequence's root (`b""` without an adapter) for
    the first block; `tokens` int64 [block_size].
    """
    return blake2b(tokens.tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Ids, reference counts and reuse of `num_blocks` blocks (ids `0 .. num_blocks - 1`)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise CacheError(f"A block pool needs at least one block, got num_blocks={num_blocks}.")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack; low ids come out first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first
        self._key_of: dict[int, Hashable] = {}
        self._block_of: dict[Hashable, int] = {}
        self.evictions = 0

    def grow(self, num_blocks: int) -> None:
        """Add blank blocks, up to `num_blocks` in all."""
        if num_blocks < self.num_blocks:
            raise CacheError(f"A pool of {self.num_blocks} blocks cannot shrink to {num_blocks}.")
        self._references += [0] * (num_blocks - self.num_blocks)
        self._blank[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)  # low ids come out first
        self.num_blocks = num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now (blank or cached)."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - self.num_free

    def references(self, block: int) -> int:
        """How many holders `block` has."""
        return self._references[block]

    def key(self, block: int) -> Hashable | None:
        """The key `block` is published under, or None."""
        return self._key_of.get(block)

    def allocate(self) -> int:
        """A block with one reference and no contents. Raises `CacheError` when none is free."""
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self.evictions += 1
        else:
            raise CacheError(
                f"all {self.num_blocks} cache blocks are in use: free a sequence, or give the "
                "engine a larger cache_bytes"
            )
        self._references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a used or cached block."""
        if self._references[block] == 0:
            if block not in self._cached:
                raise CacheError(
                    f"Block {block} is blank: only used or cached blocks can be shared."
                )
            del self._cached[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference. The last one makes the block cached (if published) or blank."""
        count = self._references[block]
        if count < 1:
            raise CacheError(f"Block {block} was released more often than it was acquired.")
        self._references[block] = count - 1
        if count == 1:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, key: Hashable) -> bool:
        """Make a used block findable under `key`.

        Returns False, and changes nothing, when another block already holds that content.
        """
        if self._references[block] < 1:
            raise CacheError(f"Block {block} is free and cannot be published.")
        if key in self._block_of:
            return self._block_of[key] == block
        self.unpublish(block)
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def unpublish(self, block: int) -> None:
        """Forget the key of a used block, because its contents are about to change."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            if self._references[block] == 0:
                del self._cached[block]
                self._blank.append(block)

    def find(self, key: Hashable) -> int | None:
        """The block published under `key`, or None. Takes no reference: call `acquire` next."""
        return self._block_of.get(key)

    def drop_cached(self) -> int:
        """Forget every cached block (for example after the weights changed). Returns how many."""
        dropped = len(self._cached)
        for block in self._cached:
            del self._block_of[self._key_of.pop(block)]
            self._blank.append(block)
        self._cached.clear()
        return dropped

    def check_integrity(self, expected_references: dict[int, int]) -> None:
        """Compare the books with the tables' references; raises `CacheError` on the first mismatch.

        Args: `expected_references` maps each block that some table holds to how often it is held.
        """
        for block, count in enumerate(self._references):
            expected = expected_references.get(block, 0)
            if count != expected:
                raise CacheError(
                    f"Block {block} counts {count} references, tables hold {expected}."
                )
        blank, cached = set(self._blank), set(self._cached)
        if len(blank) != len(self._blank):
            raise CacheError("A block is in the blank list twice.")
        if blank & cached:
            raise CacheError(f"Blocks {sorted(blank & cached)} are both blank and cached.")
        for block in blank | cached:
            if self._references[block]:
                raise CacheError(f"Block {block} is both free and used.")
        used = sum(1 for count in self._references if count)
        if used + len(blank) + len(cached) != self.num_blocks:
            raise CacheError(
                f"{used} used + {len(blank)} blank + {len(cached)} cached blocks, "
                f"but the pool has {self.num_blocks}."
            )
        for block in cached:
            if block not in self._key_of:
                raise CacheError(f"Cached block {block} has no key.")
        for block in blank:
            if block in self._key_of:
                raise CacheError(f"Blank block {block} still has a key.")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise CacheError("The two directions of the key index disagree.")
