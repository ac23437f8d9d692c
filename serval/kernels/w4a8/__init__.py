"""Linear layers with 4- or 8-bit weights: W4A8, W8A8, and W4A16, W8A16 with float activations.

Scales per output channel, per group as floats, or per group as integers (Integer Scale, arXiv
2405.14597), all from one micro-kernel; activations are quantised inside, per token or with one
static scale. Integer results are exact: the same on every CPU and for every number of threads.

Floors: few rows stream the weight once, `N K bits / 8` bytes and its group scales; many rows take
`2 M N K` integer operations. Weight layouts: packing.py on CPUs, gpu_layout.py on GPUs, where
Triton serves. Inference only, no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.w4a8 import reference
from serval.kernels.w4a8.gpu_layout import is_gpu_layout
from serval.kernels.w4a8.packing import (
    PackedWeight,
    empty_packed_weight,
    pack_weight,
    stack_weights,
    unpack_weight,
)

__all__ = [
    "PackedWeight",
    "empty_packed_weight",
    "pack_weight",
    "quantized_embedding",
    "quantized_grouped_linear",
    "quantized_linear",
    "quantized_linear_multi",
    "stack_weights",
    "unpack_weight",
]

_LINEAR = jit.Kernel("w4a8", "quantized_linear", "plll pl ii l iif i")
_EMBEDDING = jit.Kernel("w4a8", "quantized_embedding", "pl ppp ll i l i p i")
_ACTIVATIONS = {"token": 0, "static": 1, "none": 2}
_MODES = {"channel": 0, "integer": 1, "float": 2}


def _check(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    activations: str,
    input_scale: float | None,
) -> None:
    if packed.experts is not None:
        raise ValueError(
            f"quantized_linear got a stack of {packed.experts} weights; use "
            "quantized_grouped_linear, or one expert of the stack"
        )
    if bias is not None and tuple(bias.shape) != (packed.outputs,):
        raise ValueError(
            f"quantized_linear got a bias {tuple(bias.shape)} for {packed.outputs} outputs"
        )
    if x.shape[-1] != packed.inputs:
        raise ValueError(
            f"quantized_linear got inputs of {x.shape[-1]} features for a weight "
            f"[{packed.outputs}, {packed.inputs}]"
        )
    if activations not in _ACTIVATIONS:
        raise ValueError(f"activations={activations!r}: expected one of {', '.join(_ACTIVATIONS)}")
    if (activations == "static") != (input_scale is not None):
        raise ValueError(
            f"activations={activations!r} with input_scale={input_scale}: static activations need "
            "an input_scale, the others take none"
        )


def _rows(x: Tensor) -> Tensor:
    """Float32 rows [M, K] with contiguous features."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    flat = flat.float()
    return flat if flat.stride(1) == 1 else flat.contiguous()


@functools.cache
def _triton_kernels() -> ModuleType | None:
    """The Triton implementations, or None without Triton; imported late, as it is slow to load."""
    try:
        from serval.kernels.w4a8 import gpu
    except ImportError:
        return None
    return gpu


def _triton(x: Tensor, packed: PackedWeight) -> ModuleType | None:
    """The Triton implementations where they can take these tensors."""
    if x.is_cuda and packed.data.is_cuda and is_gpu_layout(packed) and packed.inputs > 0:
        return _triton_kernels()
    return None


def _usable(x: Tensor, packed: PackedWeight) -> bool:
    """Whether the C++ kernel can take these tensors."""
    return (
        x.device.type == "cpu"
        and packed.data.device.type == "cpu"
        and not is_gpu_layout(packed)
        and packed.inputs > 0
        and packed.outputs > 0
        and _LINEAR.get() is not None
    )


def _scheme(packed: PackedWeight) -> tuple[int, int | None, str]:
    """What layers of one kernel call must have in common."""
    return packed.bits, packed.group_size, packed.mode


def _record(
    packed: PackedWeight, bias: Tensor | None, out: int, first: int, rows: int
) -> list[int]:
    """The kernel's description of one layer, eight 64-bit fields (`Layer` in spec.h)."""
    scales = packed.group_scales
    return [
        packed.data.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        packed.factor.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out,
        packed.factor.shape[0],
        first,
        rows,
    ]


def _run(
    rows: Tensor,
    kind: PackedWeight,
    records: list[int],
    shared: bool,
    activations: str,
    input_scale: float | None,
) -> None:
    """Call the kernel on float32 rows [M, K]; `kind` gives the scheme of all layers."""
    function = _LINEAR.get()
    assert function is not None
    fields = (ctypes.c_int64 * len(records))(*records)
    jit.keep(fields)
    function(
        rows.data_ptr(), rows.stride(0), rows.shape[0], kind.inputs,
        ctypes.addressof(fields), len(records) // 8, shared, kind.bits,
        kind.group_size or kind.inputs, _MODES[kind.mode], _ACTIVATIONS[activations],
        input_scale or 0.0, torch.get_num_threads(),
    )  # fmt: skip


def _together(
    x: Tensor,
    packed: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    activations: str,
    input_scale: float | None,
) -> list[Tensor]:
    """Layers of one scheme that share x, in one kernel call."""
    rows = _rows(x)
    wide = [None if b is None else b.detach().float().contiguous() for b in biases]
    outs, records = [], []
    for layer, bias in zip(packed, wide, strict=True):
        out = torch.empty((*x.shape[:-1], layer.factor.shape[0]), dtype=torch.float32)
        outs.append(out)
        records += _record(layer, bias, out.data_ptr(), 0, rows.shape[0])
    _run(rows, packed[0], records, True, activations, input_scale)
    return outs if x.dtype == torch.float32 else [out.to(x.dtype) for out in outs]


def _one(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    activations: str,
    input_scale: float | None,
) -> Tensor:
    if _usable(x, packed):
        return _together(x, [packed], [bias], activations, input_scale)[0]
    gpu = _triton(x, packed)
    if gpu is not None:
        return gpu.quantized_linear(x, packed, bias, activations, input_scale)
    return reference.quantized_linear(x, packed, bias, activations, input_scale)


def _op(
    x: Tensor,
    data: Tensor,
    factor: Tensor,
    group_scales: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activations: str,
    input_scale: float,
) -> Tensor:
    packed = PackedWeight(data, factor, group_scales, bits, x.shape[-1], group_size or None)
    scale = input_scale if activations == "static" else None
    return _one(x, packed, bias, activations, scale)


jit.define(
    "quantized_linear(Tensor x, Tensor data, Tensor factor, Tensor? group_scales, Tensor? bias, "
    "int bits, int group_size, str activations, float input_scale) -> Tensor",
    _op,
    lambda x, data, factor, *_: x.new_empty(*x.shape[:-1], factor.shape[0]),
)


def quantized_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    activations: str = "token",
    input_scale: float | None = None,
) -> Tensor:
    """`x W^T + bias` with a quantised W; no gradients.

    x [..., K], `packed` from `pack_weight` of a matrix [N, K], bias [N]. activations: "token"
    rounds each row of x to int8 by its own scale, "static" by `input_scale`, "none" keeps x in
    float. Returns [..., N] in x's dtype. Raises ValueError for shapes and options that do not fit.
    """
    _check(x, packed, bias, activations, input_scale)
    if jit.plain(x, packed.data):
        return _one(x, packed, bias, activations, input_scale)
    return torch.ops.serval.quantized_linear(
        x, packed.data, packed.factor, packed.group_scales, bias, packed.bits,
        packed.group_size or 0, activations, input_scale or 0.0,
    )  # fmt: skip


def quantized_linear_multi(
    x: Tensor,
    packed: Sequence[PackedWeight],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: str = "token",
    input_scale: float | None = None,
) -> list[Tensor]:
    """Several `quantized_linear` of one input, for example q, k, v or gate, up: one quantisation of
    x and one parallel region when all weights have the same bits and groups."""
    biases = [None] * len(packed) if biases is None else list(biases)
    if len(biases) != len(packed):
        raise ValueError(
            f"quantized_linear_multi got {len(packed)} weights and {len(biases)} biases"
        )
    for layer, bias in zip(packed, biases, strict=True):
        _check(x, layer, bias, activations, input_scale)
    alike = len({_scheme(layer) for layer in packed}) == 1
    if alike and jit.plain(x, packed[0].data) and all(_usable(x, layer) for layer in packed):
        return _together(x, packed, biases, activations, input_scale)
    gpu = _triton(x, packed[0]) if all(_triton(x, layer) for layer in packed) else None
    if gpu is not None and jit.plain(x, packed[0].data):
        return gpu.quantized_linear_multi(x, packed, biases, activations, input_scale)
    return [
        quantized_linear(x, p, b, activations=activations, input_scale=input_scale)
        for p, b in zip(packed, biases, strict=True)
    ]


def quantized_grouped_linear(
    x: Tensor,
    packed: PackedWeight | Sequence[PackedWeight],
    counts: Sequence[int],
    biases: Tensor | None = None,
    *,
    activations: str = "token",
    input_scale: float | None = None,
) -> Tensor:
    """Multiply consecutive runs of rows by the weight of their expert, in one parallel region.

    x [R, K], rows sorted by expert; packed: a stack from `stack_weights`, or E weights; counts: E
    row counts that sum to R; biases [E, N]. Returns [R, N] in x's dtype. Experts without rows cost
    nothing.
    """
    stack: PackedWeight | None = None
    each: Sequence[PackedWeight] = ()
    if isinstance(packed, PackedWeight):
        stack, experts, outputs = packed, packed.experts or 0, packed.outputs
    else:
        each, experts, outputs = packed, len(packed), packed[0].outputs if packed else 0
    if experts != len(counts) or sum(counts) != x.shape[0] or min(counts, default=-1) < 0:
        raise ValueError(
            f"quantized_grouped_linear got {experts} experts, counts {list(counts)}, and "
            f"{x.shape[0]} rows; counts must name every expert and every row"
        )
    if biases is not None and tuple(biases.shape) != (experts, outputs):
        raise ValueError(
            f"quantized_grouped_linear got biases {tuple(biases.shape)} for {experts} experts of "
            f"{outputs} outputs"
        )
    hit = [index for index, count in enumerate(counts) if count]
    weights = {index: each[index] if stack is None else stack.expert(index) for index in hit}
    for weight in weights.values():
        _check(x, weight, None, activations, input_scale)
    plain = all(jit.plain(x, weight.data) for weight in weights.values())
    gpu = None if stack is None or not plain else _triton(x, stack)
    if gpu is not None:
        return gpu.quantized_grouped_linear(x, stack, counts, biases, activations, input_scale)
    alike = len({(_scheme(w), w.outputs) for w in weights.values()}) == 1
    if alike and plain and all(_usable(x, w) for w in weights.values()):
        return _grouped(x, weights, counts, biases, activations, input_scale)
    out = x.new_empty(x.shape[0], outputs)
    start = 0
    for index, weight in weights.items():
        rows = slice(start, start + counts[index])
        out[rows] = quantized_linear(
            x[rows], weight, None if biases is None else biases[index],
            activations=activations, input_scale=input_scale,
        )  # fmt: skip
        start = rows.stop
    return out


def _grouped(
    x: Tensor,
    weights: dict[int, PackedWeight],
    counts: Sequence[int],
    biases: Tensor | None,
    activations: str,
    input_scale: float | None,
) -> Tensor:
    """The experts that have rows, by index, in one kernel call."""
    rows = _rows(x)
    wide = None if biases is None else biases.detach().float().contiguous()
    kind = next(iter(weights.values()))
    out = torch.empty(rows.shape[0], kind.outputs)
    records: list[int] = []
    start, place, row_bytes = 0, out.data_ptr(), 4 * kind.outputs
    for index, weight in weights.items():
        bias = None if wide is None else wide[index]
        records += _record(weight, bias, place + start * row_bytes, start, counts[index])
        start += counts[index]
    _run(rows, kind, records, False, activations, input_scale)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def quantized_embedding(tokens: Tensor, packed: PackedWeight) -> Tensor:
    """Rows of a quantised table in float32: tokens int64 [...] -> [..., K]. Raises IndexError for a
    token that the table does not have."""
    function = _EMBEDDING.get() if jit.plain(tokens, packed.data) else None
    on_cpu = tokens.device.type == packed.data.device.type == "cpu"
    if function is None or not on_cpu or is_gpu_layout(packed):
        return reference.embedding(tokens, packed)
    flat = tokens.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(*tokens.shape, packed.inputs)
    scales = packed.group_scales
    status = function(
        flat.data_ptr(), flat.numel(), packed.data.data_ptr(),
        None if scales is None else scales.data_ptr(), packed.factor.data_ptr(), packed.outputs,
        packed.inputs, packed.bits, packed.group_size or packed.inputs, _MODES[packed.mode],
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise IndexError(f"a token lies outside the table of {packed.outputs} rows")
    return out
