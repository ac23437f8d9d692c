"""Linear layers with int8 weights (per channel) and int8 activations (per token), W8A8.

Floor for few rows: the weight is streamed once, N K bytes; for many rows: 2 M N K integer
operations. Activations are quantised inside the kernel. Results are exact integer sums times the
two scales: the same on every CPU and for every number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.int8_linear import reference
from serval.kernels.int8_linear.packing import (
    DEPTH,
    PANEL,
    PackedInt8,
    pack_int8_weight,
    unpack_int8_weight,
)

__all__ = [
    "PackedInt8",
    "int8_linear",
    "int8_linear_multi",
    "pack_int8_weight",
    "unpack_int8_weight",
]

_ONE = jit.Kernel("int8_linear", "int8_linear", "plll pppp l i")
_MULTI = jit.Kernel("int8_linear", "int8_linear_multi", "plll pl i")
_MAX_INPUTS = 65536  # 255 * 127 * K must fit int32


def _check(x: Tensor, data: Tensor, scale: Tensor) -> None:
    fits = data.dim() == 4 and data.shape[1] == -(-x.shape[-1] // DEPTH)
    if not fits or data.shape[0] != -(-scale.shape[0] // PANEL):
        raise ValueError(
            f"int8_linear got inputs of {x.shape[-1]} features, a packed weight "
            f"{tuple(data.shape)} and {scale.shape[0]} scales; pack the weight with "
            "pack_int8_weight for this input size"
        )


def _rows(x: Tensor) -> Tensor:
    """Float32 rows [M, K] with contiguous features."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    flat = flat.float()
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _int8_linear(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    function = _ONE.get() if x.device.type == "cpu" and x.shape[-1] <= _MAX_INPUTS else None
    if function is None:
        weight = unpack_int8_weight(PackedInt8(data, scale), x.shape[-1])
        return reference.int8_linear(x, weight, scale, bias)
    rows = _rows(x)
    n = scale.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=torch.float32)
    if bias is not None:
        bias = bias.float().contiguous()
    function(
        rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1],
        data.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), n, torch.get_num_threads(),
    )  # fmt: skip
    return out if x.dtype == torch.float32 else out.to(x.dtype)


jit.define(
    "int8_linear(Tensor x, Tensor data, Tensor scale, Tensor? bias) -> Tensor",
    _int8_linear,
    lambda x, data, scale, bias: x.new_empty(*x.shape[:-1], scale.shape[0]),
)


def int8_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` with W8A8 arithmetic; no gradients.

    x [..., K], `packed` from `pack_int8_weight` of a weight [N, K], bias [N]. Returns [..., N] in
    x's dtype.
    """
    data, scale = packed
    _check(x, data, scale)
    if jit.plain(x, data):
        return _int8_linear(x, data, scale, bias)
    return torch.ops.serval.int8_linear(x, data, scale, bias)


def int8_linear_multi(
    x: Tensor, packed: Sequence[PackedInt8], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Several `int8_linear` of one input, for example q, k, v or gate, up: one quantisation, one
    parallel region."""
    biases = [None] * len(packed) if biases is None else list(biases)
    if len(biases) != len(packed):
        raise ValueError(f"int8_linear_multi got {len(packed)} weights and {len(biases)} biases")
    usable = x.device.type == "cpu" and x.shape[-1] <= _MAX_INPUTS and jit.plain(x, packed[0].data)
    function = _MULTI.get() if usable else None
    if function is None:
        return [int8_linear(x, p, b) for p, b in zip(packed, biases, strict=True)]
    rows = _rows(x)
    wide = [None if b is None else b.float().contiguous() for b in biases]
    outs, records = [], []
    for (data, scale), bias in zip(packed, wide, strict=True):
        _check(x, data, scale)
        out = torch.empty((*x.shape[:-1], scale.shape[0]), dtype=torch.float32)
        outs.append(out)
        records += [data.data_ptr(), scale.data_ptr(), 0 if bias is None else bias.data_ptr()]
        records += [out.data_ptr(), scale.shape[0]]
    fields = (ctypes.c_int64 * len(records))(*records)
    function(
        rows.data_ptr(), rows.stride(0), rows.shape[0], rows.shape[1],
        ctypes.addressof(fields), len(packed), torch.get_num_threads(),
    )  # fmt: skip
    return outs if x.dtype == torch.float32 else [out.to(x.dtype) for out in outs]
