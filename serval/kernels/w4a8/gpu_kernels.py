"""The Triton kernels of quantised linear layers; gpu.py says how they work and launches them."""

# Triton kernels take many scalars and are not typed.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize(
    X, Codes, Scale, x_row, columns, width, static,
    STATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row -> int8 codes, zero up to `width`, and its scale. NaN and infinity make the scale NaN."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    # Magnitudes as integers: NaN compares above infinity, infinity above every number.
    top = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        k = start + j
        x = tl.load(X + row * x_row + k, mask=k < columns, other=0.0).to(tl.float32)
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    high = tl.max(top, 0)
    if STATIC:
        scale = static
    else:
        scale = high.to(tl.float32, bitcast=True) * (1.0 / 127.0)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
    for start in range(0, width, BLOCK):
        k = start + j
        x = tl.load(X + row * x_row + k, mask=k < columns, other=0.0).to(tl.float32)
        value = x * inverse
        value = tl.where(value == value, value, 0.0)
        value = tl.minimum(tl.maximum(value, -127.0), 127.0)
        value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
        tl.store(Codes + row * width + k, value.to(tl.int8), mask=k < width)
    tl.store(Scale + row, tl.where(high < 0x7F800000, scale, float("nan")))


@triton.jit
def _high_nibbles(raw, SECOND: tl.constexpr, PTX: tl.constexpr):
    """Bytes -> int8, 16 times the first or the second nibble; four bytes at a time where PTX."""
    if PTX:
        if SECOND:
            out = tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [raw], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            out = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
                "=r,r", [raw], dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        if SECOND:
            out = raw & -16
        else:
            out = raw << 4
    return out


@triton.jit
def _float_nibbles(raw, SECOND: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes -> the first or second nibble as float.

    bfloat16 where PTX: `0x4300 | u` is 128 + u for u = code + 8, so or-ing bytes together and
    subtracting 136 converts two codes per instruction, without the slow integer conversions.
    """
    if PTX and tl.bfloat16 == DTYPE:
        if SECOND:
            out = tl.inline_asm_elementwise(
                """{
                .reg .b32 t, one, offset;
                mov.b32 one, 0x3F803F80;
                mov.b32 offset, 0xC308C308;
                shr.b32 t, $2, 4;
                and.b32 t, t, 0x0F0F0F0F;
                xor.b32 t, t, 0x08080808;
                prmt.b32 $0, t, 0x43434343, 0x4140;
                prmt.b32 $1, t, 0x43434343, 0x4342;
                fma.rn.bf16x2 $0, $0, one, offset;
                fma.rn.bf16x2 $1, $1, one, offset;
                }""",
                "=&r,=&r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            out = tl.inline_asm_elementwise(
                """{
                .reg .b32 t, one, offset;
                mov.b32 one, 0x3F803F80;
                mov.b32 offset, 0xC308C308;
                and.b32 t, $2, 0x0F0F0F0F;
                xor.b32 t, t, 0x08080808;
                prmt.b32 $0, t, 0x43434343, 0x4140;
                prmt.b32 $1, t, 0x43434343, 0x4342;
                fma.rn.bf16x2 $0, $0, one, offset;
                fma.rn.bf16x2 $1, $1, one, offset;
                }""",
                "=&r,=&r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        if SECOND:
            out = (raw >> 4).to(DTYPE)
        else:
            out = ((raw << 4) >> 4).to(DTYPE)
    return out


@triton.jit
def _finish(
    acc, Out, XScale, Factor, Bias, m, n, m_ok, n_ok, N, expert,
    BITS: tl.constexpr, MODE: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Sums [BN, BM] -> outputs, stored."""
    y = acc.to(tl.float32)
    if INT8 and BITS == 4 and MODE == 0:
        y *= 0.0625
    factor = tl.load(Factor + expert * N + n, mask=n_ok, other=0.0)[:, None]
    if INT8:
        factor = tl.load(XScale + m, mask=m_ok, other=0.0)[None, :] * factor
    y *= factor
    if BIAS:
        y += tl.load(Bias + expert * N + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    at = Out + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(at, y.to(Out.dtype.element_ty), mask=m_ok[None, :] & n_ok[:, None])


@triton.jit
def _span(Rows, M, pid, BM: tl.constexpr, GROUPED: tl.constexpr):
    """Expert, first row and the end of the rows of a program."""
    if GROUPED:
        expert = tl.load(Rows + pid * 3).to(tl.int64)
        first = tl.load(Rows + pid * 3 + 1)
        end = tl.load(Rows + pid * 3 + 2)
    else:
        expert = tl.zeros([], tl.int64)
        first = pid * BM
        end = M
    return expert, first, end


@triton.jit
def product(
    X, XScale, Data, Scales, Factor, Bias, Out, Parts, Rows,
    M, N, blocks, groups, x_row, data_expert, part_blocks,
    BITS: tl.constexpr, MODE: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr,
    H: tl.constexpr, GROUP_UNITS: tl.constexpr, STORED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN output channels of BM rows over `part_blocks` blocks of 2 H inputs."""
    expert, first, end = _span(Rows, M, tl.program_id(1), BM, GROUPED)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = first + tl.arange(0, BM)
    n_ok, m_ok = n < N, m < end
    j = tl.arange(0, H)
    begin = tl.program_id(2) * part_blocks
    stop = tl.minimum(begin + part_blocks, blocks)

    # Channels of a program lie within one stored tile: channel, block, byte.
    ROW: tl.constexpr = H * BITS // 4
    tile = (tl.program_id(0) * BN // STORED).to(tl.int64)
    w_at = Data + expert * data_expert + tile * blocks * (STORED * ROW)
    w_at += begin.to(tl.int64) * (STORED * ROW)
    w_at = w_at + (n % STORED)[:, None] * ROW + j[None, :]
    x_at = X + m.to(tl.int64)[None, :] * x_row + begin * (2 * H) + j[:, None]
    s_at = Scales + expert * groups * N + n

    TOGETHER: tl.constexpr = GROUP_UNITS % 2 == 0  # both units of a block belong to one group
    if INT8 and MODE != 2:
        acc = tl.zeros([BN, BM], tl.int32)
    else:
        acc = tl.zeros([BN, BM], tl.float32)
    if MODE != 0:  # a block's scales are loaded while the block before it is multiplied
        g = tl.minimum(2 * begin // GROUP_UNITS, groups - 1)
        scale = tl.load(s_at + g * N, mask=n_ok, other=0)
        if not TOGETHER:
            g = tl.minimum((2 * begin + 1) // GROUP_UNITS, groups - 1)
            scale2 = tl.load(s_at + g * N, mask=n_ok, other=0)

    for block in range(begin, stop):
        raw = tl.load(w_at)
        x1 = tl.load(x_at, mask=m_ok[None, :], other=0)
        x2 = tl.load(x_at + H, mask=m_ok[None, :], other=0)
        if BITS == 8:
            w1 = raw
            w2 = tl.load(w_at + H)
            if not INT8:
                w1 = w1.to(X.dtype.element_ty)
                w2 = w2.to(X.dtype.element_ty)
        elif INT8:
            w1 = _high_nibbles(raw, False, PTX)
            w2 = _high_nibbles(raw, True, PTX)
        else:
            w1 = _float_nibbles(raw, False, PTX, X.dtype.element_ty)
            w2 = _float_nibbles(raw, True, PTX, X.dtype.element_ty)
        if MODE == 0:
            acc = tl.dot(w1, x1, acc=acc, input_precision="tf32x3", out_dtype=acc.dtype)
            acc = tl.dot(w2, x2, acc=acc, input_precision="tf32x3", out_dtype=acc.dtype)
        else:
            KIND: tl.constexpr = tl.int32 if INT8 else tl.float32
            part = tl.dot(w1, x1, input_precision="tf32x3", out_dtype=KIND)
            if TOGETHER:
                part = tl.dot(w2, x2, acc=part, input_precision="tf32x3", out_dtype=KIND)
            acc = _scaled(acc, part, scale, BITS, MODE, INT8)
            if not TOGETHER:
                part = tl.dot(w2, x2, input_precision="tf32x3", out_dtype=KIND)
                acc = _scaled(acc, part, scale2, BITS, MODE, INT8)
            g = tl.minimum((2 * block + 2) // GROUP_UNITS, groups - 1)
            scale = tl.load(s_at + g * N, mask=n_ok, other=0)
            if not TOGETHER:
                g = tl.minimum((2 * block + 3) // GROUP_UNITS, groups - 1)
                scale2 = tl.load(s_at + g * N, mask=n_ok, other=0)
        w_at += STORED * ROW
        x_at += 2 * H

    if SPLIT:
        at = (tl.program_id(2) * M + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(Parts + at, acc, mask=m_ok[None, :] & n_ok[:, None])
    else:
        _finish(acc, Out, XScale, Factor, Bias, m, n, m_ok, n_ok, N, expert, BITS, MODE, INT8, BIAS)


@triton.jit
def _scaled(acc, part, scale, BITS: tl.constexpr, MODE: tl.constexpr, INT8: tl.constexpr):
    """acc + part * scale of one group; `part` is 16 times the sum with four-bit codes in int8."""
    if INT8 and BITS == 4:
        if MODE == 1:
            part = part >> 4
        else:
            scale = scale * 0.0625
    if INT8 and MODE == 1:
        acc += part * scale.to(tl.int32)[:, None]
    else:
        acc += part.to(tl.float32) * scale.to(tl.float32)[:, None]
    return acc


@triton.jit
def combine(
    Parts, XScale, Factor, Bias, Out, Rows, M, N, parts,
    BITS: tl.constexpr, MODE: tl.constexpr, INT8: tl.constexpr, BIAS: tl.constexpr,
    GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the parts of a split product, in order, and finish it."""
    expert, first, end = _span(Rows, M, tl.program_id(1), BM, GROUPED)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = first + tl.arange(0, BM)
    n_ok, m_ok = n < N, m < end
    acc = tl.zeros([BN, BM], Parts.dtype.element_ty)
    for part in range(parts):
        at = (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
        acc += tl.load(Parts + at, mask=m_ok[None, :] & n_ok[:, None], other=0)
    _finish(acc, Out, XScale, Factor, Bias, m, n, m_ok, n_ok, N, expert, BITS, MODE, INT8, BIAS)
