"""Attention over a key-value cache of 2 or 4 bits per number, and the quantiser that fills it.

Serves OScaR (arXiv:2605.19660), KIVI (arXiv:2402.02750) and plain per-token caches; see format.py
for the storage and reference.py for the equations.

Floors of a decode step, per stored token: `bytes_per_token` bytes are read once (772.5 for 8 heads
of 128 at 2 bits, where 16 bits take 4096), and 2 H D integer multiply-adds are done for the two
products (8192 for 32 query heads). On CPUs the second counts as much as the first: float arithmetic
on unpacked codes would lose to a 16-bit cache, so codes meet 8-bit integers in `vpdpbusd` (AVX-512
VNNI, AVX-VNNI) or `vpmaddubsw` (AVX2). The group's scales are folded into the query (keys) or the
probabilities (values) before these are rounded to 8 bits; codes are taken relative to their middle,
and what middles contribute is computed in float. The rounding adds an error far below the cache's
own: tests/kernels/test_oscar_attend.py. `serval bench kv` reports the share of both floors reached.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import jit, pages
from serval.kernels.oscar import reference
from serval.kernels.oscar.format import GROUP, ZEROS, QuantizedKV, bytes_per_token, shapes

__all__ = [
    "GROUP",
    "QuantizedKV",
    "allocate",
    "attend",
    "bytes_per_token",
    "fetch",
    "hold",
    "shapes",
    "store",
]

FEW = 8  # query rows of a sequence up to which reading packed codes is the faster way
PIECE = 1024  # tokens dequantised at a time for more rows

_STORE = jit.Kernel("oscar", "oscar_store", "pppp ppp l i")
_FETCH = jit.Kernel("oscar", "oscar_fetch", "pppp pl pp i")
_HOLD = jit.Kernel("oscar", "oscar_hold", "pll pll pp l pp ll")
_ATTEND = jit.Kernel("oscar", "oscar_attend", "pppp pl pl ppp l pp p ll f p pp i")


@functools.lru_cache(maxsize=64)
def _format(fmt: QuantizedKV, per_block: int, blocks: int) -> ctypes.Array[ctypes.c_int64]:
    """`Format` of record.h."""
    numbers = (
        fmt.num_key_value_heads, fmt.head_dim, fmt.v_head_dim, fmt.key_bits, fmt.value_bits,
        ZEROS.index(fmt.zero), fmt.keys == "token", fmt.norms,
        *fmt.offsets, fmt.record_bytes, per_block, blocks,
    )  # fmt: skip
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _pointers(fmt: QuantizedKV, storage: list[Tensor]) -> tuple[int, int, int, int | None]:
    """The leading arguments of every C function."""
    made = _format(fmt, storage[0].shape[2], storage[0].shape[0])
    jit.keep(made)
    norms = storage[2].data_ptr() if fmt.norms else None
    return ctypes.addressof(made), storage[0].data_ptr(), storage[1].data_ptr(), norms


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The Triton implementations, or None without Triton; imported late, as Triton is slow to
    load."""
    try:
        from serval.kernels.oscar import gpu
    except ImportError:
        return None
    return gpu


def _function(
    kernel: jit.Kernel, fmt: QuantizedKV, storage: list[Tensor], *tensors: Tensor
) -> jit.Function | None:
    """The C function, None when it does not cover the format or where the tensors are."""
    if fmt.head_dim % 16 or fmt.v_head_dim % 16 or max(fmt.head_dim, fmt.v_head_dim) > 512:
        return None
    for x in storage:
        if not x.is_cpu or not x.is_contiguous():
            return None
    for x in tensors:
        if not x.is_cpu:
            return None
    return kernel.get()


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


@functools.lru_cache(maxsize=64)
def _single_rows(count: int, device: torch.device) -> Tensor:
    """`query_starts` of sequences of one row each."""
    return torch.arange(count + 1, dtype=torch.int32, device=device)


def hold(
    k: Tensor, v: Tensor, states: Tensor, lengths: Tensor, residual_k: Tensor, residual_v: Tensor
) -> None:
    """Put each sequence's last row into its window.

    Args:
        k, v: [n, Hkv, D] and [n, Hkv, Dv] float32, the row of each sequence.
        states, lengths: int32 [n]; the row goes to residual row (length - 1) % R of the state.
        residual_k, residual_v: [S, R, Hkv, D] and [S, R, Hkv, Dv] float32.

    Raises CacheError for a state that does not exist or a sequence without tokens.
    """
    tensors = (k, v, states, lengths, residual_k, residual_v)
    rows = [x.dtype == torch.float32 and x[0].is_contiguous() for x in (k, v)] if len(k) else []
    function = _HOLD.get() if rows and all(rows) and all(x.is_cpu for x in tensors) else None
    if function is None:
        at = states.long(), (lengths.long() - 1) % residual_k.shape[1]
        residual_k[at], residual_v[at] = k.to(residual_k), v.to(residual_v)
        return
    states, lengths = _dense(states, torch.int32), _dense(lengths, torch.int32)
    status = function(
        k.data_ptr(), k.stride(0), k[0].numel(), v.data_ptr(), v.stride(0), v[0].numel(),
        states.data_ptr(), lengths.data_ptr(), len(k), residual_k.data_ptr(),
        residual_v.data_ptr(), *residual_k.shape[:2],
    )  # fmt: skip
    if status:
        raise CacheError(
            f"states {states.tolist()} of sequences of {lengths.tolist()} tokens do not fit "
            f"{residual_k.shape[0]} states"
        )


def _check_rows(fmt: QuantizedKV, k: Tensor, v: Tensor, block_ids: Tensor, size: int) -> None:
    heads = fmt.num_key_value_heads
    count = block_ids.shape[0] * size
    for name, rows, dim in (("keys", k, fmt.head_dim), ("values", v, fmt.v_head_dim)):
        if rows.shape != (count, heads, dim):
            raise ValueError(
                f"store got {name} {tuple(rows.shape)} for {block_ids.shape[0]} blocks of {size} "
                f"tokens; it expects [{count}, {heads}, {dim}]"
            )


def _dense(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`x` contiguous and of the dtype, without a copy when it is already."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return x.detach().to(dtype).contiguous()


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
    gpu = triton_kernels() if k.is_cuda else None
    if gpu is not None and gpu.covers(fmt):
        gpu.store(fmt, k, v, block_ids, storage)
        return
    function = _function(_STORE, fmt, storage, k, v, block_ids)
    if function is None:
        reference.store(fmt, k, v, block_ids, storage)
        return
    k, v, ids = _dense(k), _dense(v), _dense(block_ids, torch.int32)
    function(
        *_pointers(fmt, storage), k.data_ptr(), v.data_ptr(), ids.data_ptr(), ids.numel(),
        torch.get_num_threads(),
    )  # fmt: skip


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
    function = _function(_FETCH, fmt, storage, block_ids)
    if function is None:
        return reference.fetch(fmt, storage, block_ids, count)
    ids = _dense(block_ids, torch.int32)
    k = torch.empty(count, fmt.num_key_value_heads, fmt.head_dim)
    v = torch.empty(count, fmt.num_key_value_heads, fmt.v_head_dim)
    function(
        *_pointers(fmt, storage), ids.data_ptr(), count, k.data_ptr(), v.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return k, v


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
    if query_starts is None:
        query_starts = _single_rows(q.shape[0], q.device)
        jit.keep(query_starts)
        few = True
    else:
        few = int((query_starts[1:] - query_starts[:-1]).max()) <= FEW if len(stored) else True
    gpu = triton_kernels() if few and q.is_cuda else None
    if gpu is not None:
        return gpu.attend(
            fmt, q, storage, block_tables, stored, residual_k, residual_v, states, lengths, scale,
            sinks, query_starts,
        )  # fmt: skip
    tensors = [x for x in (q, residual_k, residual_v, states, block_tables) if x is not None]
    function = _function(_ATTEND, fmt, storage, *tensors) if few else None
    if function is None:
        return reference.attend(
            fmt, q, storage, block_tables, stored, residual_k, residual_v, states, lengths, scale,
            sinks, query_starts, piece=PIECE, fetch=fetch,
        )  # fmt: skip
    return _attend(
        function, fmt, q, storage, block_tables, stored, residual_k, residual_v, states, lengths,
        scale, sinks, query_starts,
    )  # fmt: skip


def _attend(
    function: jit.Function,
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
    sinks: Tensor | None,
    query_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    whole = torch.int32
    rows, heads, _ = q.shape
    q, tables = _dense(q), _dense(block_tables, whole)
    stored, lengths, starts = (_dense(x, whole) for x in (stored, lengths, query_starts))
    slots, capacity = (0, 0) if residual_k is None else residual_k.shape[:2]
    exact = [None if x is None else _dense(x) for x in (residual_k, residual_v)]
    states = None if states is None else _dense(states, whole)
    sinks = None if sinks is None else _dense(sinks)
    o = torch.empty(rows, heads, fmt.v_head_dim)
    lse = torch.empty(rows, heads)
    status = function(
        *_pointers(fmt, storage), q.data_ptr(), heads, tables.data_ptr(), tables.shape[1],
        stored.data_ptr(), lengths.data_ptr(), starts.data_ptr(), len(stored),
        *(None if x is None else x.data_ptr() for x in exact),
        None if states is None else states.data_ptr(), slots, capacity, scale,
        None if sinks is None else sinks.data_ptr(), o.data_ptr(), lse.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        blocks, per_block = storage[0].shape[0], storage[0].shape[2] * GROUP
        raise CacheError(
            {
                1: f"stored {stored.tolist()} and lengths {lengths.tolist()} do not fit blocks of "
                f"{per_block} tokens, tables of width {tables.shape[1]} and {capacity} exact rows",
                2: f"block_tables name blocks from {int(tables.min())} to {int(tables.max())}; "
                f"the cache has blocks 0 to {blocks - 1}",
                3: f"states are missing or beyond the {slots} slots of exact rows",
            }[status]
        )
    return o, lse
