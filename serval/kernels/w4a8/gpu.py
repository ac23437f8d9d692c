"""Linear layers with quantised weights on GPUs in Triton: W4A8, W8A8, W4A16, W8A16; one matrix or
one per expert.

The product is computed as Y^T = W X^T: output channels fill the rows of the tensor cores' tiles
even when there is one token, and weights, unpacked in registers, are the operand that may come from
registers. A byte of two nibbles becomes two int8 operands by a mask and a shift, 16 times the code
(FastGEMM in OdysseyLLM, arXiv:2311.09550). The three kinds of scales share one loop:

    channel   int32 sums over all inputs; 1/16, the scale and the token's scale in the epilogue
    integer   per group P >> 4 (exact), times an int16, summed in int32; one conversion to float
              (Integer Scale, arXiv:2405.14597, section on the kernel)
    float     per group converted, times a float, summed in float32

Float32 rows are split in three for the tensor cores (codes are exact in any of their formats).
Integer sums are exact, so tile shapes and the number of parts change no bit of a result. Few tokens
cut the inputs into parts, whose sums a second kernel adds, so that every multiprocessor streams
weights. Floor of decode: `N K bits / 8` bytes read once; of prefill: `2 M N K` int8 operations.
Under `TRITON_INTERPRET=1` it runs on the CPU, which is how it is tested without a GPU.
"""

# Triton kernels take many scalars and are not typed.
# mypy: ignore-errors

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from serval.kernels.w4a8.gpu_layout import TILE, Layout, layout_of
from serval.kernels.w4a8.packing import PackedWeight

MODES = {"channel": 0, "integer": 1, "float": 2}


@triton.jit
def _quantize(
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
def _product(
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
def _combine(
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


class Tiling(NamedTuple):
    """Shape of a launch."""

    rows: int  # BM
    channels: int  # BN
    warps: int
    stages: int


def tiling(rows: int, single: bool = False) -> Tiling:
    """Tiles for `rows` rows (of an expert, with experts). single: rows in float32."""
    if single:
        return Tiling(16 if rows <= 16 else 32, 64, 4, 2)
    if rows <= 16:
        return Tiling(16, 64, 4, 5)
    if rows <= 32:
        return Tiling(32, 64, 4, 5)
    if rows <= 64:
        return Tiling(64, 128, 4, 4)
    return Tiling(128, 128, 8, 3)


@functools.cache
def _speaks_ptx(device: torch.device) -> bool:
    """Whether inline assembly of compute capability 8 can be used."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_of(programs: int, blocks: int, device: torch.device) -> int:
    """Parts that the inputs of a small product are cut into: enough programs for twice the
    multiprocessors, at least four blocks for each."""
    return max(1, min(2 * _multiprocessors(device) // max(programs, 1), blocks // 4))


def quantize_activations(x: Tensor, width: int, input_scale: float | None) -> tuple[Tensor, Tensor]:
    """x [M, K], unit stride in K -> int8 [M, width], zero beyond K, and the scale float32 [M]."""
    rows, columns = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    block = min(8192, triton.next_power_of_2(max(columns, 16)))
    # Without fusion: a product that feeds an addition must round as the reference's does.
    _quantize[(rows,)](
        x, codes, scale, x.stride(0), columns, width, input_scale or 0.0,
        STATIC=input_scale is not None, BLOCK=block, num_warps=8 if block > 2048 else 4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale


class _Inputs:
    """Rows of one call as kernels want them; quantised once for all matrices that want the same."""

    def __init__(self, x: Tensor, int8: bool, input_scale: float | None) -> None:
        flat = x.reshape(-1, x.shape[-1])
        self.rows = flat if flat.stride(-1) == 1 else flat.contiguous()
        self.int8, self.input_scale = int8, input_scale
        self._made: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def get(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Rows [M, width] and their scales (any tensor for float rows)."""
        key = (layout.group, layout.padded_group, layout.width)
        if key not in self._made:
            rows = layout.pad_inputs(self.rows)
            if self.int8:
                self._made[key] = quantize_activations(rows, layout.width, self.input_scale)
            else:
                rows = functional.pad(rows, (0, layout.width - rows.shape[1]))
                self._made[key] = rows, rows
        return self._made[key]


def _launch(
    inputs: _Inputs, packed: PackedWeight, bias: Tensor | None, out: Tensor,
    spans: Sequence[tuple[int, int, int]] | None, most: int, parts: int | None,
) -> None:  # fmt: skip
    """Write out [M, N]. spans: (expert, first row, end) of each expert with rows; most: rows of the
    largest."""
    layout = layout_of(packed)
    rows, scale = inputs.get(layout)
    m, n = out.shape
    shape = tiling(most, rows.dtype == torch.float32)
    across = triton.cdiv(n, shape.channels)
    if spans is None:
        table, down = rows, triton.cdiv(m, shape.rows)
    else:
        tiles = [
            (expert, at, end)
            for expert, first, end in spans
            for at in range(first, end, shape.rows)
        ]
        table, down = torch.tensor(tiles, dtype=torch.int32).to(rows.device), len(tiles)
    if parts is None:
        small = shape.rows <= 64
        parts = parts_of(across * down, layout.blocks, rows.device) if small else 1
    part_blocks = triton.cdiv(layout.blocks, parts)
    parts = triton.cdiv(layout.blocks, part_blocks)
    integers = inputs.int8 and packed.mode != "float"
    sums = out
    if parts > 1:
        kind = torch.int32 if integers else torch.float32
        sums = torch.empty(parts, m, n, dtype=kind, device=out.device)
    flags = {
        "BITS": packed.bits,
        "MODE": MODES[packed.mode],
        "INT8": inputs.int8,
        "BIAS": bias is not None,
        "GROUPED": spans is not None,
    }
    fusion = not integers  # exact sums keep the reference's rounding in the epilogue
    bias = packed.factor if bias is None else bias.contiguous()
    scales = packed.factor if packed.group_scales is None else packed.group_scales
    _product[(across, down, parts)](
        rows, scale, packed.data, scales, packed.factor, bias, out, sums, table,
        m, n, layout.blocks, layout.groups, rows.stride(0), packed.data[0].numel(), part_blocks,
        **flags, SPLIT=parts > 1, PTX=_speaks_ptx(out.device),
        H=layout.unit, GROUP_UNITS=layout.group_units, STORED=TILE,
        BM=shape.rows, BN=shape.channels, num_warps=shape.warps, num_stages=shape.stages,
        enable_fp_fusion=fusion,
    )  # fmt: skip
    if parts > 1:
        _combine[(across, down)](
            sums, scale, packed.factor, bias, out, table, m, n, parts,
            **flags, BM=shape.rows, BN=shape.channels, num_warps=4, enable_fp_fusion=fusion,
        )  # fmt: skip


def quantized_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    activations: str = "token",
    input_scale: float | None = None,
    parts: int | None = None,
) -> Tensor:
    """As `serval.kernels.quantized_linear`, for a weight in the GPU's layout. parts: into how many
    parts the inputs are cut (None: chosen by shape); changes no bit of integer sums."""
    weights, biases = [packed], [bias]
    return quantized_linear_multi(x, weights, biases, activations, input_scale, parts)[0]


def quantized_linear_multi(
    x: Tensor,
    packed: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    activations: str = "token",
    input_scale: float | None = None,
    parts: int | None = None,
) -> list[Tensor]:
    """As `serval.kernels.quantized_linear_multi`: x is quantised once."""
    inputs = _Inputs(x, activations != "none", input_scale if activations == "static" else None)
    outs = []
    for weight, bias in zip(packed, biases, strict=True):
        out = x.new_empty(*x.shape[:-1], weight.outputs)
        if out.numel():
            flat = out.view(-1, weight.outputs)
            _launch(inputs, weight, bias, flat, None, flat.shape[0], parts)
        outs.append(out)
    return outs


def quantized_grouped_linear(
    x: Tensor,
    packed: PackedWeight,
    counts: Sequence[int],
    bias: Tensor | None = None,
    activations: str = "token",
    input_scale: float | None = None,
    parts: int | None = None,
) -> Tensor:
    """As `serval.kernels.quantized_grouped_linear`, for a stack of weights: one launch for all
    experts, tiles only for those that have rows."""
    out = x.new_empty(x.shape[0], packed.outputs)
    if out.numel() == 0:
        return out
    inputs = _Inputs(x, activations != "none", input_scale if activations == "static" else None)
    spans, at = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, at, at + count))
        at += count
    _launch(inputs, packed, bias, out, spans, max(counts), parts)
    return out
