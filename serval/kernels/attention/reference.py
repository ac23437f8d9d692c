"""Attention over a paged key-value cache in plain PyTorch: the specification of the fast kernels.

Softmax over the visible keys, with an optional sink: a learned logit per head that only enlarges
the denominator (gpt-oss; StreamingLLM's "softmax off by one", arXiv:2309.17453, is the case sink =
0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    first: int,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one sequence: q [n, H, D] at positions first..first+n-1, k [L, Hkv, D], v [L,
    Hkv, Dv].

    A query at position p sees keys max(0, p - window + 1)..p. Computed in float32; returns [n, H,
    Dv].
    """
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * scale
    rows = torch.arange(first, first + q.shape[0], device=q.device)[:, None]
    columns = torch.arange(k.shape[0], device=q.device)[None]
    hidden = columns > rows
    if window is not None:
        hidden = hidden | (columns <= rows - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        weights = torch.softmax(torch.cat((scores, extra), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float().repeat_interleave(group, 1)).to(q.dtype)


def _rows(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """Gather one sequence's rows [length, Hkv, ...] from a cache [B, Hkv, S, ...]."""
    blocks = -(-length // cache.shape[2])
    return cache[table[:blocks].long()].transpose(1, 2).flatten(0, 1)[:length]


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
    """Causal attention of packed queries q [T, H, D] over caches [B, Hkv, S, D] and [B, Hkv, S,
    Dv].

    `block_tables` int32 [N, M], `context_lens` int32 [N], `query_starts` int32 [N+1]; query i of
    sequence n sits at position `context_lens[n] - count(n) + i`. Returns [T, H, Dv].
    """
    out = q.new_zeros(q.shape[0], q.shape[1], value_cache.shape[3])
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for n, length in enumerate(lengths):
        begin, end = starts[n], starts[n + 1]
        if end > begin:
            k, v = (
                _rows(key_cache, block_tables[n], length),
                _rows(value_cache, block_tables[n], length),
            )
            out[begin:end] = attend(
                q[begin:end], k, v, scale, length - (end - begin), window, sinks
            )
    return out


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
    """As `paged_attention` with int8 caches; `key_scales`, `value_scales` float32 [B, Hkv, S], one
    per token and head."""
    out = q.new_zeros(q.shape[0], q.shape[1], value_cache.shape[3])
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for n, length in enumerate(lengths):
        begin, end = starts[n], starts[n + 1]
        if end > begin:
            table = block_tables[n]
            k = (
                _rows(key_cache, table, length).float()
                * _rows(key_scales, table, length)[..., None]
            )
            v = (
                _rows(value_cache, table, length).float()
                * _rows(value_scales, table, length)[..., None]
            )
            out[begin:end] = attend(
                q[begin:end], k, v, scale, length - (end - begin), window, sinks
            )
    return out
