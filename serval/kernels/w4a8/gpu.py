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

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from serval.kernels.w4a8 import gpu_kernels
from serval.kernels.w4a8.gpu_layout import TILE, Layout, layout_of
from serval.kernels.w4a8.packing import PackedWeight

MODES = {"channel": 0, "integer": 1, "float": 2}


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
    gpu_kernels.quantize[(rows,)](
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
                if rows.shape[1] < layout.width:
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
    gpu_kernels.product[(across, down, parts)](
        rows, scale, packed.data, scales, packed.factor, bias, out, sums, table,
        m, n, layout.blocks, layout.groups, rows.stride(0), packed.data[0].numel(), part_blocks,
        **flags, SPLIT=parts > 1, PTX=_speaks_ptx(out.device),
        H=layout.unit, GROUP_UNITS=layout.group_units, STORED=TILE,
        BM=shape.rows, BN=shape.channels, num_warps=shape.warps, num_stages=shape.stages,
        enable_fp_fusion=fusion,
    )  # fmt: skip
    if parts > 1:
        gpu_kernels.combine[(across, down)](
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
