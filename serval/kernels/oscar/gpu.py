"""Low-bit key-value caches on GPUs in Triton: quantise and pack, and decode attention.

The storage is that of format.py, byte for byte. Attention dequantises tiles of codes into the
operands of tensor-core products, cuts long contexts into parts whose results are merged (flash
decoding), and applies token norms to scores; its exact last rows are few and left to PyTorch. The
quantiser normalises, optionally rotates (one product with the Hadamard matrix), quantises and packs
in one pass. Under `TRITON_INTERPRET=1` this runs on the CPU, which is how it is tested without a
GPU.
"""

# Triton kernels take many scalars and are not typed.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serval.kernels.oscar.format import BIAS, GROUP, ZEROS, QuantizedKV
from serval.kernels.oscar.reference import merge, token_norms
from serval.kernels.walsh_hadamard.reference import largest_block, sylvester

PART = 1024  # tokens of a part of a decode step
TILE = 64  # tokens dequantised together


@triton.jit
def _unit(exponent):
    """2^(exponent - bias)."""
    return tl.exp2(exponent.to(tl.float32) - 120.0)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even."""
    near = (x + 12582912.0) - 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, near, tl.floor(x + 0.5))


@triton.jit
def _decode(
    Q, Bytes, Words, Halves, Exponents, Norms, Tables, Stored, Starts, Out, Max, Mass,
    record_bytes, k_codes, k_scale, k_mid, v_codes, v_scale, v_mid,
    per_block, table_width, heads, total_rows, scale,
    GROUP_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PART_KEYS: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, BY_TOKEN: tl.constexpr,
    NORMS: tl.constexpr,
):  # fmt: skip
    """One (row block, sequence and head, part): unnormalised output, running max and mass."""
    sequence = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    part = tl.program_id(2)
    start = tl.load(Starts + sequence)
    queries = tl.load(Starts + sequence + 1) - start
    stored = tl.load(Stored + sequence)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    query = row // GROUP_HEADS
    head = kv_head * GROUP_HEADS + row % GROUP_HEADS
    alive = query < queries
    begin = part * PART_KEYS
    end = tl.minimum(stored, begin + PART_KEYS)
    if (begin < end) & (tl.program_id(0) * BM < queries * GROUP_HEADS):
        token = (start + query).to(tl.int64)
        d = tl.arange(0, BD)
        q_at = Q + (token[:, None] * heads + head[:, None]) * D + d[None, :]
        q = tl.load(q_at, mask=alive[:, None] & (d < D)[None, :], other=0.0)
        dv = tl.arange(0, BDV)
        acc = tl.zeros([BM, BDV], dtype=tl.float32)
        high = tl.full([BM], float("-inf"), dtype=tl.float32)
        mass = tl.zeros([BM], dtype=tl.float32)
        for first in range(begin, end, BN):
            key = first + tl.arange(0, BN)
            known = key < end
            index = key // 32
            block = tl.load(
                Tables + sequence * table_width + index // per_block, mask=known, other=0
            )
            record = (block.to(tl.int64) * KV_HEADS + kv_head) * per_block + index % per_block
            base = record * record_bytes
            slot = key % 32
            lane, half = slot % 16, slot // 16
            if K_BITS == 2:
                line, shift = d // 8, (d % 8 // 4)[None, :] * 4 + half[:, None] * 2
            else:
                line, shift = d // 4, half[:, None] * 4 + d[None, :] * 0
            at = (base + k_codes)[:, None] + (line * 64 + d % 4)[None, :] + (lane * 4)[:, None]
            seen = known[:, None] & (d < D)[None, :]
            code = tl.load(Bytes + at, mask=seen, other=0).to(tl.int32)
            code = (code >> shift) & (2**K_BITS - 1)
            if BY_TOKEN:
                place = (d // 32 * 32)[None, :] + slot[:, None]
            else:
                place = d[None, :] + slot[:, None] * 0
            s_at, m_at = (
                (base + k_scale)[:, None] // 2 + place,
                (base + k_mid)[:, None] // 2 + place,
            )
            unit = _unit(tl.load(Exponents + record * 2, mask=known, other=0))
            s = tl.load(Words + s_at, mask=seen, other=0).to(tl.float32) * unit[:, None]
            m = tl.load(Halves + m_at, mask=seen, other=0.0).to(tl.float32)
            k = s * (code.to(tl.float32) - (2**K_BITS - 1) * 0.5) + m
            score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            if NORMS:
                n_at = block.to(tl.int64) * per_block * 32 + key % (per_block * 32)
                score *= tl.load(Norms + n_at, mask=known, other=0.0)[None, :]
            score = tl.where(known[None, :], score, float("-inf"))
            top = tl.maximum(high, tl.max(score, 1))
            weight = tl.exp(score - top[:, None])
            past = tl.exp(high - top)
            mass = mass * past + tl.sum(weight, 1)
            if V_BITS == 2:
                v_line = (dv // 32 * 4)[None, :] + (slot // 8)[:, None]
                v_shift = (slot % 8 // 4)[:, None] * 4 + (dv % 32 // 16)[None, :] * 2
            else:
                v_line = (dv // 32 * 8)[None, :] + (slot // 4)[:, None]
                v_shift = (dv % 32 // 16)[None, :] * 4 + slot[:, None] * 0
            at = (base + v_codes + slot % 4)[:, None] + v_line * 64 + (dv % 16 * 4)[None, :]
            seen = known[:, None] & (dv < DV)[None, :]
            code = tl.load(Bytes + at, mask=seen, other=0).to(tl.int32)
            code = (code >> v_shift) & (2**V_BITS - 1)
            place = (dv // 32 * 32)[None, :] + slot[:, None]
            s_at, m_at = (
                (base + v_scale)[:, None] // 2 + place,
                (base + v_mid)[:, None] // 2 + place,
            )
            unit = _unit(tl.load(Exponents + record * 2 + 1, mask=known, other=0))
            s = tl.load(Words + s_at, mask=seen, other=0).to(tl.float32) * unit[:, None]
            m = tl.load(Halves + m_at, mask=seen, other=0.0).to(tl.float32)
            v = s * (code.to(tl.float32) - (2**V_BITS - 1) * 0.5) + m
            fresh = tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="ieee")
            acc = acc * past[:, None] + fresh
            high = top
        to = (part * total_rows + token) * heads + head
        tl.store(Max + to, high, mask=alive)
        tl.store(Mass + to, mass, mask=alive)
        tl.store(
            Out + to[:, None] * DV + dv[None, :], acc, mask=alive[:, None] & (dv < DV)[None, :]
        )


def attend(
    fmt: QuantizedKV, q: Tensor, storage: list[Tensor], block_tables: Tensor, stored: Tensor,
    residual_k: Tensor | None, residual_v: Tensor | None, states: Tensor | None, lengths: Tensor,
    scale: float, sinks: Tensor | None = None, query_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `serval.kernels.oscar.attend`; products in q's dtype, sums in float32."""
    rows, heads, dim = q.shape
    starts = query_starts
    if starts is None:
        starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    sequences, kv_heads = len(stored), fmt.num_key_value_heads
    group, v_dim = heads // kv_heads, fmt.v_head_dim
    longest = int(stored.max()) if sequences else 0
    most = int((starts[1:] - starts[:-1]).max()) if sequences else 0
    o = torch.zeros(rows, heads, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.full((rows, heads), float("-inf"), device=q.device)
    if longest and most:
        parts = -(-longest // PART)
        block_m = min(64, max(16, triton.next_power_of_2(most * group)))
        out = torch.zeros(parts, rows, heads, v_dim, dtype=torch.float32, device=q.device)
        high = torch.full((parts, rows, heads), float("-inf"), device=q.device)
        mass = torch.zeros(parts, rows, heads, device=q.device)
        records, exponents = storage[:2]
        norms = storage[2] if fmt.norms else mass
        _decode[(triton.cdiv(most * group, block_m), sequences * kv_heads, parts)](
            q.contiguous(), records, records.view(torch.int16), records.view(torch.float16),
            exponents, norms, block_tables, stored, starts, out, high, mass,
            fmt.record_bytes, *fmt.offsets, records.shape[2], block_tables.stride(0), heads, rows,
            scale,
            GROUP_HEADS=group, KV_HEADS=kv_heads, D=dim, DV=v_dim,
            BD=max(16, triton.next_power_of_2(dim)), BDV=max(16, triton.next_power_of_2(v_dim)),
            BM=block_m, BN=TILE, PART_KEYS=PART, K_BITS=fmt.key_bits, V_BITS=fmt.value_bits,
            BY_TOKEN=fmt.keys == "token", NORMS=fmt.norms, num_warps=4, num_stages=2,
        )  # fmt: skip
        top = high.amax(0)
        base = top.where(top.isfinite(), torch.zeros_like(top))
        factor = torch.exp(high - base)
        total = (mass * factor).sum(0)
        lse = base + total.log()
        o = (out * factor[..., None]).sum(0) / total.clamp_min(1e-38)[..., None]
    if residual_k is not None and residual_v is not None and states is not None:
        exact = _exact_rows(q, residual_k, residual_v, states, stored, lengths, starts, scale)
        o, lse = merge(o, lse, *exact)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.float())
        o, lse = o * (lse - total).exp()[..., None], total
    return o, lse


def _exact_rows(
    q: Tensor, residual_k: Tensor, residual_v: Tensor, states: Tensor, stored: Tensor,
    lengths: Tensor, starts: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of every row over its sequence's exact rows, masked, all at once."""
    capacity, kv_heads = residual_k.shape[1], residual_k.shape[2]
    place = torch.arange(capacity, device=q.device)
    # Row r holds the token of position stored + (r - stored) mod capacity.
    seen = (place - stored[:, None]) % capacity < (lengths - stored)[:, None]  # [N, R]
    owner = torch.repeat_interleave(
        torch.arange(len(stored), device=q.device), starts[1:] - starts[:-1], output_size=len(q)
    )
    grouped = q.float().unflatten(1, (kv_heads, -1))
    slots = states.long()[owner]
    k, v = residual_k[slots].float(), residual_v[slots].float()  # [T, R, Hkv, D]
    scores = torch.einsum("tgrd,tlgd->tgrl", grouped, k) * scale
    scores = scores.masked_fill(~seen[owner][:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    base = lse.where(lse.isfinite(), torch.zeros_like(lse))
    weights = torch.exp(scores - base[..., None])
    o = torch.einsum("tgrl,tlgd->tgrd", weights, v)
    return o.flatten(1, 2), lse.flatten(1, 2)


@triton.jit
def _grid(high, low, scale, unit, LEVELS: tl.constexpr, MODE: tl.constexpr):
    """Scale integers, middles as stored, and what makes codes: lowest numbers, inverse scales."""
    n = _round(scale / unit)
    s = n * unit
    safe = tl.where(s > 0, s, 1.0)
    if MODE == 0:
        m = s * (LEVELS * 0.5 - _round(-low / safe))
    elif MODE == 1:
        m = low + s * (LEVELS * 0.5)
    else:
        m = tl.where(high >= -low, s * 0.5, s * -0.5)
    m = tl.where(s > 0, m, (high + low) * 0.5)
    m = tl.minimum(tl.maximum(m, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return n, m, m - s * (LEVELS * 0.5), tl.where(s > 0, 1.0 / safe, 0.0)


@triton.jit
def _ideal(high, low, LEVELS: tl.constexpr, MODE: tl.constexpr):
    """Scales before they are rounded."""
    if MODE == 2:
        return tl.maximum(tl.abs(high), tl.abs(low)) / (LEVELS // 2 + 1)
    return (high - low) / LEVELS


@triton.jit
def _exponent(most):
    """The exponent that a record's scales share, from the largest of them."""
    bits = most.to(tl.int32, bitcast=True)
    e = ((bits >> 23) & 255) - 140
    return tl.minimum(tl.maximum(e, -120), 135)


@triton.jit
def _codes(x, lowest, inverse, LEVELS: tl.constexpr):
    return tl.minimum(tl.maximum(_round((x - lowest) * inverse), 0.0), LEVELS * 1.0).to(tl.int32)


@triton.jit
def _store(
    K, V, Norms, H, Ids, Bytes, Words, Halves, Exponents,
    record_bytes, k_codes, k_scale, k_mid, v_codes, v_scale, v_mid, per_block,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, GROUPS: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, MODE: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One record: 32 tokens of one head. J: planes of a line that differ in channel (keys) or token
    (values)."""
    index, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(Ids + index // per_block).to(tl.int64)
    record = (block * HEADS + head) * per_block + index % per_block
    base = record * record_bytes
    lane = tl.arange(0, 16)

    J: tl.constexpr = 2 if K_BITS == 2 else 1
    LEVELS: tl.constexpr = 2**K_BITS - 1
    m = tl.arange(0, BD // J)
    d = tl.arange(0, BD)
    most = 0.0
    for turn in tl.static_range(2):  # first the record's exponent, then codes
        exponent = _exponent(most)
        unit = tl.exp2(exponent.to(tl.float32))
        packed = tl.zeros([16, BD // J], dtype=tl.int32)
        for j in tl.static_range(J):
            channel = m // 4 * (4 * J) + 4 * j + m % 4
            real = channel < D
            for_half = (index * 32 + lane)[:, None]
            if ROTATE:
                h = tl.load(
                    H + d[:, None] * D + channel[None, :],
                    mask=(d < D)[:, None] & real[None, :],
                    other=0.0,
                )
                at = K + (for_half * HEADS + head) * D + d[None, :]
                wide = (d < D)[None, :] & (for_half >= 0)
                x0 = tl.dot(tl.load(at, mask=wide, other=0.0), h, input_precision="ieee")
                x1 = tl.dot(
                    tl.load(at + 16 * HEADS * D, mask=wide, other=0.0), h, input_precision="ieee"
                )
            else:
                at = K + (for_half * HEADS + head) * D + channel[None, :]
                x0 = tl.load(at, mask=real[None, :], other=0.0)
                x1 = tl.load(at + 16 * HEADS * D, mask=real[None, :], other=0.0)
            x0 *= 1.0 / tl.load(Norms + index * 32 + lane)[:, None]
            x1 *= 1.0 / tl.load(Norms + index * 32 + 16 + lane)[:, None]
            high = tl.maximum(tl.max(x0, 0), tl.max(x1, 0))
            low = tl.minimum(tl.min(x0, 0), tl.min(x1, 0))
            scale = _ideal(high, low, LEVELS, MODE)
            if turn == 0:
                most = tl.maximum(most, tl.max(scale, 0))
            else:
                n, mid, lowest, inverse = _grid(high, low, scale, unit, LEVELS, MODE)
                tl.store(Words + (base + k_scale) // 2 + channel, n.to(tl.int16), mask=real)
                tl.store(Halves + (base + k_mid) // 2 + channel, mid.to(tl.float16), mask=real)
                first = _codes(x0, lowest[None, :], inverse[None, :], LEVELS)
                second = _codes(x1, lowest[None, :], inverse[None, :], LEVELS)
                packed += (first << (K_BITS * 2 * j)) + (second << (K_BITS * (2 * j + 1)))
        if turn == 1:
            at = base + k_codes + (m // 4 * 64 + m % 4)[None, :] + (lane * 4)[:, None]
            tl.store(
                Bytes + at, packed.to(tl.uint8), mask=(m < D // J)[None, :] & (lane >= 0)[:, None]
            )
            tl.store(Exponents + record * 2, tl.where(most > 0, exponent + 120, 0).to(tl.uint8))

    JV: tl.constexpr = 2 if V_BITS == 2 else 1
    V_LEVELS: tl.constexpr = 2**V_BITS - 1
    i = tl.arange(0, 32 // JV)
    most = 0.0
    for turn in tl.static_range(2):
        exponent = _exponent(most)
        unit = tl.exp2(exponent.to(tl.float32))
        for g in tl.static_range(GROUPS):
            packed = tl.zeros([32 // JV, 16], dtype=tl.int32)
            for j in tl.static_range(JV):
                slot = i // 4 * (4 * JV) + 4 * j + i % 4
                channel = 32 * g + lane
                at = V + ((index * 32 + slot)[:, None] * HEADS + head) * DV + channel[None, :]
                x0 = tl.load(at, mask=(channel < DV)[None, :] & (slot >= 0)[:, None], other=0.0)
                more = (channel + 16 < DV)[None, :] & (slot >= 0)[:, None]
                x1 = tl.load(at + 16, mask=more, other=0.0)
                has0, has1 = (channel < DV)[None, :], (channel + 16 < DV)[None, :]
                high = tl.maximum(
                    tl.max(tl.where(has0, x0, float("-inf")), 1),
                    tl.max(tl.where(has1, x1, float("-inf")), 1),
                )
                low = tl.minimum(
                    tl.min(tl.where(has0, x0, float("inf")), 1),
                    tl.min(tl.where(has1, x1, float("inf")), 1),
                )
                scale = _ideal(high, low, V_LEVELS, MODE)
                if turn == 0:
                    most = tl.maximum(most, tl.max(scale, 0))
                else:
                    n, mid, lowest, inverse = _grid(high, low, scale, unit, V_LEVELS, MODE)
                    tl.store(Words + (base + v_scale) // 2 + 32 * g + slot, n.to(tl.int16))
                    tl.store(Halves + (base + v_mid) // 2 + 32 * g + slot, mid.to(tl.float16))
                    first = _codes(x0, lowest[:, None], inverse[:, None], V_LEVELS)
                    second = _codes(x1, lowest[:, None], inverse[:, None], V_LEVELS)
                    first = tl.where(has0, first, 0)
                    second = tl.where(has1, second, 0)
                    packed += (first << (V_BITS * 2 * j)) + (second << (V_BITS * (2 * j + 1)))
            if turn == 1:
                at = base + v_codes + 128 * V_BITS * g + (i // 4 * 64 + i % 4)[:, None]
                tl.store(Bytes + at + (lane * 4)[None, :], packed.to(tl.uint8))
        if turn == 1:
            tl.store(Exponents + record * 2 + 1, tl.where(most > 0, exponent + 120, 0).to(tl.uint8))


def covers(fmt: QuantizedKV) -> bool:
    """Whether `store` serves this format; others are left to PyTorch."""
    return fmt.keys == "channel"


def store(
    fmt: QuantizedKV, k: Tensor, v: Tensor, block_ids: Tensor, storage: list[Tensor],
    rotate: bool = False,
) -> None:  # fmt: skip
    """As `serval.kernels.oscar.store`; rotate: k is not rotated yet (norms do not change by it)."""
    k, v = k.float().contiguous(), v.float().contiguous()
    records, exponents = storage[:2]
    per_block = records.shape[2]
    norms = token_norms(k) if fmt.norms else torch.ones(len(k), device=k.device)
    if fmt.norms:
        storage[2][block_ids.long()] = norms.view(-1, per_block * GROUP)
    h = k.new_zeros(1)
    if rotate:
        block = largest_block(fmt.head_dim)
        h = sylvester(block, torch.float32) * block**-0.5
        h = torch.block_diag(*[h] * (fmt.head_dim // block)).to(k.device)
    assert BIAS == 120  # as in `_unit` and `_exponent`
    _store[(len(k) // GROUP, fmt.num_key_value_heads)](
        k, v, norms, h, block_ids, records, records.view(torch.int16), records.view(torch.float16),
        exponents, fmt.record_bytes, *fmt.offsets, per_block,
        HEADS=fmt.num_key_value_heads, D=fmt.head_dim, DV=fmt.v_head_dim,
        BD=max(32, triton.next_power_of_2(fmt.head_dim)), GROUPS=fmt.value_groups,
        K_BITS=fmt.key_bits, V_BITS=fmt.value_bits,
        MODE=ZEROS.index(fmt.zero), ROTATE=rotate, num_warps=4,
    )  # fmt: skip
