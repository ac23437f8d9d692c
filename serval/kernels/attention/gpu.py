"""Paged attention on GPUs in Triton: grouped-query (any float or int8 cache) and multi-head latent.

One program holds a block of query rows (queries times the heads of one key-value head, so a key
block is read once for the whole group) and walks its keys in blocks with an online softmax
(FlashAttention-2, arXiv:2307.08691). Decode steps cut long contexts into parts whose partial
results are merged, as flash-decoding does, so that few sequences still fill the GPU. Under
`TRITON_INTERPRET=1` it runs on the CPU, which is how it is tested without a GPU.
"""

# Triton kernels take many scalars and are not typed.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 1024  # keys per part of a decode step


@triton.jit
def _attention(
    Q, Q2, K, V, KScale, VScale, Tables, Lens, Starts, Out, Max, Mass,
    q_row, q_head, q2_row, q2_head, k_block, k_head, k_slot, v_block, v_head, v_slot,
    s_block, s_head, table_width, heads, total_rows, scale, window,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BD2: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    KV_HEADS: tl.constexpr, PART_KEYS: tl.constexpr, INT8: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One (row block, sequence and head, part): unnormalised output, running max and mass."""
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    part = tl.program_id(2)
    start = tl.load(Starts + sequence)
    queries = tl.load(Starts + sequence + 1) - start
    length = tl.load(Lens + sequence)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP
    alive = query < queries
    if tl.program_id(0) * BM < queries * GROUP:
        position = length - queries + query
        token = (start + query).to(tl.int64)
        d = tl.arange(0, BD)
        q_at = Q + token[:, None] * q_row + head[:, None] * q_head + d[None, :]
        q = tl.load(q_at, mask=alive[:, None] & (d < D)[None, :], other=0.0)
        if D2 > 0:
            d2 = tl.arange(0, BD2)
            q2_at = Q2 + token[:, None] * q2_row + head[:, None] * q2_head + d2[None, :]
            q2 = tl.load(q2_at, mask=alive[:, None] & (d2 < D2)[None, :], other=0.0)
        dv = tl.arange(0, BDV)
        acc = tl.zeros([BM, BDV], dtype=tl.float32)
        high = tl.full([BM], float("-inf"), dtype=tl.float32)
        mass = tl.zeros([BM], dtype=tl.float32)

        first = length - queries + (tl.program_id(0) * BM) // GROUP  # position of the first row
        last = tl.minimum(length, length - queries + (tl.program_id(0) * BM + BM - 1) // GROUP + 1)
        begin = tl.maximum(part * PART_KEYS, tl.maximum(first - window + 1, 0) // BN * BN)
        end = tl.minimum(last, (part + 1) * PART_KEYS)
        for key_from in range(begin, end, BN):
            key = key_from + tl.arange(0, BN)
            known = key < end
            block = tl.load(Tables + sequence * table_width + key // PAGE, mask=known, other=0)
            block = tl.where(block < 0, 0, block).to(tl.int64)  # outside the window: masked below
            slot = key % PAGE
            k_at = K + block * k_block + kv_head * k_head + slot * k_slot
            k = tl.load(k_at[:, None] + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0)
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            if D2 > 0:
                k2_at = k_at[:, None] + D + d2[None, :]
                k2 = tl.load(k2_at, mask=known[:, None] & (d2 < D2)[None, :], other=0)
                score += tl.dot(q2, tl.trans(k2.to(q2.dtype)), input_precision="ieee")
            score *= scale
            if INT8:
                s_at = block * s_block + kv_head * s_head + slot
                score *= tl.load(KScale + s_at, mask=known, other=0.0)[None, :]
            seen = known[None, :] & (key[None, :] <= position[:, None])
            seen &= key[None, :] > position[:, None] - window
            score = tl.where(seen, score, float("-inf"))
            top = tl.maximum(high, tl.max(score, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp(score - base[:, None])
            past = tl.exp(high - base)
            mass = mass * past + tl.sum(weight, 1)
            if INT8:
                weight *= tl.load(VScale + s_at, mask=known, other=0.0)[None, :]
            if SHARED:
                v = k
            else:
                v_at = V + block * v_block + kv_head * v_head + slot * v_slot
                v_mask = known[:, None] & (dv < DV)[None, :]
                v = tl.load(v_at[:, None] + dv[None, :], mask=v_mask, other=0)
            fresh = tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="ieee")
            acc = acc * past[:, None] + fresh
            high = top
        at = (part * total_rows + token) * heads + head
        tl.store(Max + at, high, mask=alive)
        tl.store(Mass + at, mass, mask=alive)
        out_mask = alive[:, None] & (dv < DV)[None, :]
        tl.store(Out + at[:, None] * DV + dv[None, :], acc, mask=out_mask)


def _power(n: int) -> int:
    """Block size for a dim: a power of two that tensor cores accept."""
    return max(16, triton.next_power_of_2(n))


def _launch(
    q: Tensor, q2: Tensor | None, keys: Tensor, values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, scale: float,
    window: int | None, sinks: Tensor | None, shared: bool,
) -> Tensor:  # fmt: skip
    rows, heads, dim = q.shape
    kv_heads, page = keys.shape[1], keys.shape[2]
    v_dim, group, sequences = values.shape[3], heads // keys.shape[1], context_lens.shape[0]
    if rows == 0:
        return q.new_empty(0, heads, v_dim)
    # One host round trip for the grid; a step's lengths were on the host a moment ago.
    longest = int(context_lens.max())
    most = int((query_starts[1:] - query_starts[:-1]).max())
    wide = dim > 128
    single = q.dtype == torch.float32
    block_m = min((16 if single else 64) if wide else 64 if single else 128, _power(most * group))
    block_n = 32 if wide or keys.dtype == torch.float32 else 64
    parts = -(-longest // PART) if most * group <= block_m else 1
    part_keys = PART if parts > 1 else max(block_n, triton.next_power_of_2(longest))
    out = torch.zeros(parts, rows, heads, v_dim, dtype=torch.float32, device=q.device)
    high = torch.full((parts, rows, heads), float("-inf"), device=q.device)
    mass = torch.zeros(parts, rows, heads, device=q.device)
    second = q if q2 is None else q2
    key_scales, value_scales = scales if scales is not None else (mass, mass)
    stride = key_scales.stride() if scales is not None else (0, 0, 0)
    d2 = 0 if q2 is None else q2.shape[2]
    _attention[(triton.cdiv(most * group, block_m), sequences * kv_heads, parts)](
        q, second, keys, values, key_scales, value_scales, block_tables, context_lens, query_starts,
        out, high, mass,
        q.stride(0), q.stride(1), second.stride(0), second.stride(1),
        keys.stride(0), keys.stride(1), keys.stride(2),
        values.stride(0), values.stride(1), values.stride(2),
        stride[0], stride[1], block_tables.stride(0), heads, rows, scale, window or 2**30,
        GROUP=group, PAGE=page, D=dim, D2=d2, DV=v_dim,
        BD=_power(dim), BD2=_power(max(d2, 1)), BDV=_power(v_dim), BM=block_m, BN=block_n,
        KV_HEADS=kv_heads, PART_KEYS=part_keys, INT8=scales is not None, SHARED=shared,
        num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip
    top = high.amax(0)
    if sinks is not None:
        top = torch.maximum(top, sinks.float())
    factor = torch.exp(high - top)
    total = (mass * factor).sum(0)
    if sinks is not None:
        total = total + torch.exp(sinks.float() - top)
    return ((out * factor[..., None]).sum(0) / total[..., None]).to(q.dtype)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    query_starts: Tensor, scale: float, window: int | None = None, sinks: Tensor | None = None,
    key_scales: Tensor | None = None, value_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `serval.kernels.paged_attention`, and with both scales as `paged_attention_int8`."""
    scales = None
    if key_scales is not None and value_scales is not None:
        scales = (_dense(key_scales), _dense(value_scales))
    return _launch(
        _dense(q), None, _dense(key_cache), _dense(value_cache), scales, block_tables, context_lens,
        query_starts, scale, window, sinks, False,
    )  # fmt: skip


def paged_latent_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    query_starts: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """As `serval.kernels.paged_latent_attention`."""
    keys = _dense(cache)[:, None]
    values = keys[..., : q_latent.shape[2]]
    return _launch(
        _dense(q_latent), _dense(q_rope), keys, values, None, block_tables, context_lens,
        query_starts, scale, None, None, True,
    )  # fmt: skip
