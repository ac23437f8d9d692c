"""Attention over a key-value cache of 2 or 4 bits per number, and the quantiser that fills it.

Serves OScaR (arXiv:2605.19660), KIVI (arXiv:2402.02750) and plain per-token caches; see format.py
for the storage and reference.py for the equations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import pages
from serval.kernels.oscar import reference
from serval.kernels.oscar.format import GROUP, QuantizedKV, bytes_per_token, shapes

__all__ = [
    "GROUP",
    "QuantizedKV",
    "allocate",
    "attend",
    "bytes_per_token",
    "fetch",
    "shapes",
    "store",
]


def allocate(
    fmt: QuantizedKV,
    num_blocks: int,
    block_size: int,
    zeros: Callable[..., Tensor] = pages.zeros,
) -> list[Tensor]:
    """Zeroed storage of one layer: tensors whose first axis is the block.

    Records uint8 [B, Hkv, block_size / 32, bytes], exponents uint8 [B, Hkv, block_size / 32, 2]
    and, if the format has norms, float32 norms [B, block_size]. `zeros(*shape, dtype=...)` makes
    them; its shape includes B. Raises CacheError unless 32 divides block_size.
    """
    return [
        zeros(num_blocks, *shape, dtype=getattr(torch, dtype))
        for shape, dtype in shapes(fmt, block_size)
    ]


def _check_rows(fmt: QuantizedKV, k: Tensor, v: Tensor, block_ids: Tensor, size: int) -> None:
    heads = fmt.num_key_value_heads
    count = block_ids.shape[0] * size
    for name, rows, dim in (("keys", k, fmt.head_dim), ("values", v, fmt.v_head_dim)):
        if rows.shape != (count, heads, dim):
            raise ValueError(
                f"store got {name} {tuple(rows.shape)} for {block_ids.shape[0]} blocks of {size} "
                f"tokens; it expects [{count}, {heads}, {dim}]"
            )


def store(fmt: QuantizedKV, k: Tensor, v: Tensor, block_ids: Tensor, storage: list[Tensor]) -> None:
    """Quantise tokens into whole blocks.

    Args:
        k: [n, Hkv, D] keys, already rotated if the format's user rotates, not normalised;
            n = block_size * number of blocks.
        v: [n, Hkv, Dv].
        block_ids: int [n / block_size], blocks to fill, in order.
        storage: as `allocate` returns.

    Raises ValueError for shapes that do not fit, CacheError for blocks that do not exist.
    """
    size = storage[0].shape[2] * GROUP
    _check_rows(fmt, k, v, block_ids, size)
    _check_blocks(block_ids, storage)
    reference.store(fmt, k, v, block_ids, storage)


def _check_blocks(block_ids: Tensor, storage: list[Tensor]) -> None:
    blocks = storage[0].shape[0]
    if block_ids.numel() and not 0 <= int(block_ids.min()) <= int(block_ids.max()) < blocks:
        raise CacheError(
            f"block ids from {int(block_ids.min())} to {int(block_ids.max())}; the cache has "
            f"blocks 0 to {blocks - 1}"
        )


def fetch(
    fmt: QuantizedKV, storage: list[Tensor], block_ids: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The first `count` tokens of `block_ids`, dequantised: float32 k [count, Hkv, D] (rotated,
    with their norms) and v [count, Hkv, Dv].

    Raises CacheError when the blocks hold fewer or do not exist.
    """
    size = storage[0].shape[2] * GROUP
    used = -(-count // size)
    if used > block_ids.shape[0]:
        raise CacheError(
            f"fetch got {block_ids.shape[0]} blocks of {size} tokens for {count} tokens"
        )
    _check_blocks(block_ids[:used], storage)
    return reference.fetch(fmt, storage, block_ids, count)


def attend(
    fmt: QuantizedKV,
    q: Tensor,
    storage: list[Tensor],
    block_tables: Tensor,
    stored: Tensor,
    residual_k: Tensor | None,
    residual_v: Tensor | None,
    states: Tensor | None,
    lengths: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    query_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over every token of its sequence: packed blocks, then exact rows.

    Args:
        q: [T, H, D], rotated like the keys. One row per sequence unless query_starts says how many;
            nothing is masked, so with several rows new tokens are left to the caller, who merges
            the parts by their `lse`.
        block_tables: int32 [N, M]; the first stored / block_size blocks are read.
        stored: int32 [N], tokens in packed blocks, multiples of block_size.
        residual_k, residual_v: [S, R, Hkv, D] and [S, R, Hkv, Dv] float32, exact rows (rotated,
            not normalised); None when lengths equals stored.
        states: int32 [N], the slot in S of each sequence.
        lengths: int32 [N]; the tokens stored..lengths-1 lie at residual row position % R.
        scale: factor on the scores.
        sinks: [H] logits that only enlarge the softmax denominator (and count in `lse`).
        query_starts: int32 [N + 1], rows of each sequence.

    Returns: o [T, H, Dv] and lse [T, H], the log of the softmax denominator, in float32; without
    any token o is 0 and lse -inf. Raises CacheError when lengths or block ids do not fit.
    """
    return reference.attend(
        fmt, q, storage, block_tables, stored, residual_k, residual_v, states, lengths, scale,
        sinks, query_starts,
    )  # fmt: skip
