"""SnapMLA on GPUs in Triton: FP8 latent attention for decode steps, and quantise-and-append.

Tuned for Hopper, whose tensor cores multiply E4M3 codes as stored: 16 of the 17 tiles of a score
(512 latent and 64 rotary dims, in tiles of 64) and all of the values take FP8 products, at twice
the rate of bfloat16. Floor: `C + 4 + 2R` bytes per token, read once for all heads of a block of
rows. A program holds a block of query rows and walks its keys in blocks of 64, in increasing order:
only the float32 accumulator is rescaled, never codes that were made (appendix C of the paper). Long
contexts are cut into parts, merged by their log-sum-exp. Under `TRITON_INTERPRET=1` it runs on the
CPU, which is how it is tested without a GPU.
"""

# Triton kernels take many scalars and are not typed.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from serval.kernels.snapmla.reference import BLOCK, combine

PART = 1024  # keys per part of a decode step
LN2 = 0.6931471805599453


@triton.jit
def _scale_of(largest):
    return tl.where(largest == 0.0, 1.0, tl.maximum(largest, 1e-26) / 448.0)


@triton.jit
def _to_e4m3(x):
    """E4M3 of x, ties to even, saturating. Rounded by hand, since not every conversion of Triton's
    (its interpreter's, for one) carries into the exponent: adding a power of two whose last place
    is the result's rounds to it; below 2^-6 that place stays 2^-9."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    base = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    power = (base + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = (magnitude + power) - power
    return tl.where(x < 0, -rounded, rounded).to(tl.float8e4nv)


@triton.jit
def _to_bf16(x):
    """bfloat16 of x, ties to even; by hand for the same reason."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _quantize(
    X, X2, Slots, Codes, Scales, Rope, x_row, x2_row,
    C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, ROPE8: tl.constexpr,
):  # fmt: skip
    """One row: codes, scale and aligned rotary part to place Slots[row]; skipped when negative."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slots + row)
    if slot >= 0:
        c, r = tl.arange(0, BC), tl.arange(0, BR)
        x = tl.load(X + row * x_row + c, mask=c < C, other=0.0).to(tl.float32)
        x2 = tl.load(X2 + row * x2_row + r, mask=r < R, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(x), 0)
        if ROPE8:
            largest = tl.maximum(largest, tl.max(tl.abs(x2), 0))
        scale = _scale_of(largest)
        code = _to_e4m3(x / scale)
        aligned = x2 / scale
        if ROPE8:
            aligned = _to_e4m3(aligned).to(tl.float32)
        tl.store(Codes + slot * C + c, code.to(tl.uint8, bitcast=True), mask=c < C)
        tl.store(Scales + slot, scale)
        tl.store(Rope + slot * R + r, _to_bf16(aligned), mask=r < R)


@triton.jit
def _attention(
    Q, QScales, QRope, Codes, Scales, Rope, Tables, Lens, Starts, Out, Lse,
    table_width, heads, total_rows, scale_log2,
    PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PART_KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One (row block, sequence, part): its own output and log-sum-exp. WIDE: rotary products in
    float32, since Triton's interpreter cannot multiply bfloat16."""
    sequence = tl.program_id(1)
    part = tl.program_id(2)
    start = tl.load(Starts + sequence)
    queries = tl.load(Starts + sequence + 1) - start
    length = tl.load(Lens + sequence)
    row = tl.program_id(0) * BM + tl.arange(0, BM)  # query * heads + head
    alive = row < queries * heads
    if tl.program_id(0) * BM < queries * heads:
        position = length - queries + row // heads
        at = start.to(tl.int64) * heads + row
        c, r = tl.arange(0, BC), tl.arange(0, BR)
        q_mask = alive[:, None] & (c < C)[None, :]
        q = tl.load(Q + at[:, None] * C + c[None, :], mask=q_mask, other=0)
        q = q.to(tl.float8e4nv, bitcast=True)
        r_mask = alive[:, None] & (r < R)[None, :]
        q_rope = tl.load(QRope + at[:, None] * R + r[None, :], mask=r_mask, other=0.0)
        factor = tl.load(QScales + at, mask=alive, other=0.0) * scale_log2
        acc = tl.zeros([BM, BC], dtype=tl.float32)
        high = tl.full([BM], float("-inf"), dtype=tl.float32)
        state = tl.full([BM], 1.0, dtype=tl.float32)
        mass = tl.zeros([BM], dtype=tl.float32)
        last = tl.minimum(length, length - queries + (tl.program_id(0) * BM + BM - 1) // heads + 1)
        end = tl.minimum(last, (part + 1) * PART_KEYS)
        for key_from in range(part * PART_KEYS, end, BN):
            key = key_from + tl.arange(0, BN)
            known = key < end
            block = tl.load(Tables + sequence * table_width + key // PAGE, mask=known, other=0)
            slot = block.to(tl.int64) * PAGE + key % PAGE
            k_mask = known[:, None] & (c < C)[None, :]
            k = tl.load(Codes + slot[:, None] * C + c[None, :], mask=k_mask, other=0)
            k = k.to(tl.float8e4nv, bitcast=True)
            kr_mask = known[:, None] & (r < R)[None, :]
            k_rope = tl.load(Rope + slot[:, None] * R + r[None, :], mask=kr_mask, other=0.0)
            scales = tl.load(Scales + slot, mask=known, other=0.0)
            z = tl.dot(q, tl.trans(k))
            if WIDE:
                z += tl.dot(q_rope.to(tl.float32), tl.trans(k_rope.to(tl.float32)))
            else:
                z += tl.dot(q_rope, tl.trans(k_rope))
            x = z * factor[:, None] * scales[None, :]
            x = tl.where(known[None, :] & (key[None, :] <= position[:, None]), x, float("-inf"))
            top = tl.maximum(high, tl.max(x, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            e = tl.exp2(x - base[:, None])
            f = e * scales[None, :]
            fresh = _scale_of(tl.max(f, 1))
            p = _to_e4m3(f / fresh[:, None])
            beta = tl.exp2(high - base) * state / fresh
            acc = acc * beta[:, None] + tl.dot(p, k)
            mass = mass * beta + tl.sum(e, 1) / fresh
            high, state = top, fresh
        empty = mass == 0.0
        o = acc / tl.where(empty, 1.0, mass)[:, None]
        lse = (high + tl.log2(tl.where(empty, 1.0, mass * state))) * 0.6931471805599453
        lse = tl.where(empty, float("-inf"), lse)
        to = part * total_rows + at
        tl.store(Lse + to, lse, mask=alive)
        tl.store(Out + to[:, None] * C + c[None, :], o, mask=q_mask)


def _power(n: int, least: int) -> int:
    """Block size for a dim: a power of two that tensor cores accept."""
    return max(least, triton.next_power_of_2(n))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def write(
    latent: Tensor, k_rope: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, rope: Tensor,
    rope8: bool = False,
) -> None:  # fmt: skip
    """As `reference.write`; the caches are contiguous."""
    latent, k_rope = _dense(latent), _dense(k_rope)
    width, rope_width = latent.shape[1], k_rope.shape[1]
    if latent.shape[0]:
        _quantize[(latent.shape[0],)](
            latent, k_rope, slots, codes, scales, rope, latent.stride(0), k_rope.stride(0),
            C=width, R=rope_width, BC=_power(width, 32), BR=_power(rope_width, 16), ROPE8=rope8,
            num_warps=2,
        )  # fmt: skip


def paged_attention(
    q_latent: Tensor, q_rope: Tensor, codes: Tensor, scales: Tensor, rope: Tensor,
    block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, scale: float,
    rope8: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `reference.paged_attention`; the caches are contiguous."""
    tokens, heads, width = q_latent.shape
    rope_width, device = q_rope.shape[2], q_latent.device
    sequences, page = context_lens.shape[0], codes.shape[1]
    if tokens == 0:
        none = torch.empty(0, heads, width, dtype=torch.float32, device=device)
        return none, none.new_empty(0, heads)
    q8 = torch.empty(tokens * heads, width, dtype=torch.uint8, device=device)
    q_scales = torch.empty(tokens * heads, dtype=torch.float32, device=device)
    q_aligned = torch.empty(tokens * heads, rope_width, dtype=torch.bfloat16, device=device)
    rows = torch.arange(tokens * heads, device=device)
    q, q2 = q_latent.reshape(-1, width), q_rope.reshape(-1, rope_width)
    write(q, q2, rows, q8, q_scales, q_aligned, rope8)
    # One host round trip for the grid; a step's lengths were on the host a moment ago.
    longest = int(context_lens.max())
    most = int((query_starts[1:] - query_starts[:-1]).max()) * heads
    block_m = min(64, _power(most, 16))
    # Parts only where there are few rows: else there is work enough, and partial results would
    # fill the memory.
    parts = -(-longest // PART) if most <= 256 else 1
    part_keys = PART if parts > 1 else max(BLOCK, triton.next_power_of_2(longest))
    out = torch.zeros(parts, tokens, heads, width, dtype=torch.float32, device=device)
    lse = torch.full((parts, tokens, heads), float("-inf"), device=device)
    _attention[(triton.cdiv(most, block_m), sequences, parts)](
        q8, q_scales, q_aligned, codes, scales, rope, block_tables, context_lens, query_starts,
        out, lse, block_tables.stride(0), heads, tokens * heads, scale / LN2,
        PAGE=page, C=width, R=rope_width, BC=_power(width, 32), BR=_power(rope_width, 16),
        BM=block_m, BN=BLOCK, PART_KEYS=part_keys, WIDE=not q_latent.is_cuda,
        num_warps=8 if width > 128 else 4, num_stages=2,
    )  # fmt: skip
    if parts == 1:
        return out[0], lse[0]
    return combine(out.unbind(0), lse.unbind(0))
