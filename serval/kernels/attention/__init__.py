"""Grouped-query attention over a paged key-value cache, for prefill and decode, with float32,
16-bit and int8 caches.

Floor of a decode step: every visible key and value is read once, `4 (D + Dv)` bytes per token and
key-value head in float32, `2 (D + Dv)` in 16 bits, `D + Dv + 8` in int8, whatever the number of
query heads. Floor of prefill: `2 (D + Dv)` operations per visible (query head, key) pair. CPU: C++,
arithmetic in float32; GPU: Triton; the reference serves everything else.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import jit
from serval.kernels.attention import reference

_SIGNATURE = "plll l plll plll l lll pp pl pp ll f l p p i"
_FLOATS = {
    torch.float32: jit.Kernel("attention", "paged_attention_f32", _SIGNATURE),
    torch.bfloat16: jit.Kernel("attention", "paged_attention_bf16", _SIGNATURE),
    torch.float16: jit.Kernel("attention", "paged_attention_fp16", _SIGNATURE),
}
_INT8 = jit.Kernel("attention", "paged_attention_int8", _SIGNATURE)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The Triton implementations, or None without Triton; imported late, as Triton is slow to
    load."""
    try:
        from serval.kernels.attention import gpu
    except ImportError:
        return None
    return gpu


def check_status(status: int, block_tables: Tensor, context_lens: Tensor, blocks: int) -> None:
    """Turn a kernel's status into an error that says what was inconsistent."""
    if status == 1:
        raise CacheError(
            f"context_lens {context_lens.tolist()} do not fit query_starts or the block table of "
            f"width {block_tables.shape[1]}; each length must cover its queries and its table"
        )
    if status == 2:
        raise CacheError(
            f"block_tables name blocks from {int(block_tables.min())} to "
            f"{int(block_tables.max())}; the cache has blocks 0 to {blocks - 1}"
        )


def int32(x: Tensor) -> Tensor:
    """`x` as contiguous int32, without a copy when it is already."""
    return x.to(torch.int32).contiguous()


def _run(
    function: jit.Function,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    wide = q.float()
    if wide.stride(2) != 1:
        wide = wide.contiguous()
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    values = values if values.stride(3) == 1 else values.contiguous()
    block_tables, context_lens = int32(block_tables), int32(context_lens)
    query_starts = int32(query_starts)
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    key_scales, value_scales = (None, None) if scales is None else (s.contiguous() for s in scales)
    blocks, kv_heads, page, v_dim = values.shape
    rows, heads, dim = q.shape
    out = torch.zeros if query_starts.numel() < 2 else torch.empty
    result = out(rows, heads, v_dim, dtype=torch.float32)
    k_stride, v_stride = keys.stride(), values.stride()
    status = function(
        wide.data_ptr(), wide.stride(0), wide.stride(1), heads, dim,
        keys.data_ptr(), k_stride[0], k_stride[1], k_stride[2],
        values.data_ptr(), v_stride[0], v_stride[1], v_stride[2], v_dim,
        kv_heads, page, blocks,
        None if key_scales is None else key_scales.data_ptr(),
        None if value_scales is None else value_scales.data_ptr(),
        block_tables.data_ptr(), block_tables.shape[1],
        context_lens.data_ptr(), query_starts.data_ptr(), context_lens.shape[0],
        rows, scale, window or 0, None if sinks is None else sinks.data_ptr(),
        result.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        check_status(status, block_tables, context_lens, blocks)
    return result if q.dtype == torch.float32 else result.to(q.dtype)


def _paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    query_starts: Tensor, scale: float, window: int | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    rest = (block_tables, context_lens, query_starts, scale, window, sinks)
    gpu = triton_kernels() if q.is_cuda else None
    if gpu is not None:
        return gpu.paged_attention(q, key_cache, value_cache, *rest)
    kernel = _FLOATS.get(key_cache.dtype)
    if kernel is not None and q.device.type == "cpu" and key_cache.dtype == value_cache.dtype:
        function = kernel.get()
        if function is not None:
            return _run(function, q, key_cache, value_cache, None, *rest)
    return reference.paged_attention(q, key_cache, value_cache, *rest)


def _paged_attention_int8(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, key_scales: Tensor, value_scales: Tensor,
    block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, scale: float,
    window: int | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    rest = (block_tables, context_lens, query_starts, scale, window, sinks)
    gpu = triton_kernels() if q.is_cuda else None
    if gpu is not None:
        return gpu.paged_attention(
            q, key_cache, value_cache, *rest, key_scales=key_scales, value_scales=value_scales
        )
    if q.device.type == "cpu":
        function = _INT8.get()
        if function is not None:
            return _run(function, q, key_cache, value_cache, (key_scales, value_scales), *rest)
    return reference.paged_attention_int8(
        q, key_cache, value_cache, key_scales, value_scales, *rest
    )


jit.define(
    "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_tables,"
    " Tensor context_lens, Tensor query_starts, float scale, int? window, Tensor? sinks) -> Tensor",
    _paged_attention,
    lambda q, key_cache, value_cache, *rest: q.new_empty(*q.shape[:2], value_cache.shape[3]),
)
jit.define(
    "paged_attention_int8(Tensor q, Tensor key_cache, Tensor value_cache, Tensor key_scales,"
    " Tensor value_scales, Tensor block_tables, Tensor context_lens, Tensor query_starts,"
    " float scale, int? window, Tensor? sinks) -> Tensor",
    _paged_attention_int8,
    lambda q, key_cache, value_cache, *rest: q.new_empty(*q.shape[:2], value_cache.shape[3]),
)
_op = torch.ops.serval


def _check(q: Tensor, key_cache: Tensor, value_cache: Tensor, window: int | None) -> None:
    if q.shape[2] != key_cache.shape[3] or q.shape[1] % key_cache.shape[1]:
        raise ValueError(
            f"paged attention got q {tuple(q.shape)} and keys {tuple(key_cache.shape)}; it expects "
            "equal head dims and a number of query heads divisible by the number of key-value heads"
        )
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(
            f"paged attention got keys {tuple(key_cache.shape)} and values "
            f"{tuple(value_cache.shape)}; it expects equal blocks, heads and tokens"
        )
    if window is not None and window < 1:
        raise ValueError(f"paged attention got window {window}; it expects None or at least 1")


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries over a paged cache; no gradients.

    Args:
        q: [T, H, D]; sequence n owns rows query_starts[n]:query_starts[n+1].
        key_cache, value_cache: [B, Hkv, S, D] and [B, Hkv, S, Dv], blocks of S tokens, of one float
            dtype.
        block_tables: int32 [N, M], blocks of each sequence in order; entries that no query sees
            are not read.
        context_lens: int32 [N], tokens stored, this step's included; query i sits at
            `len - count + i`.
        query_starts: int32 [N + 1], from 0.
        scale: factor on the scores.
        window: a query at position p sees keys from `p - window + 1`; None for all.
        sinks: [H] logits that only enlarge the softmax denominator.

    Returns: [T, H, Dv] in q's dtype. Raises CacheError when lengths or block ids do not fit.
    """
    _check(q, key_cache, value_cache, window)
    call = _paged_attention if jit.plain(q, key_cache) else _op.paged_attention
    return call(
        q, key_cache, value_cache, block_tables, context_lens, query_starts, scale, window, sinks
    )


def paged_attention_int8(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `paged_attention` over int8 caches; key_scales, value_scales: float32 [B, Hkv, S].

    Codes are read as stored; a key's scale multiplies its score, a value's scale its softmax
    weight.
    """
    _check(q, key_cache, value_cache, window)
    call = _paged_attention_int8 if jit.plain(q, key_cache) else _op.paged_attention_int8
    return call(
        q, key_cache, value_cache, key_scales, value_scales,
        block_tables, context_lens, query_starts, scale, window, sinks,
    )  # fmt: skip
