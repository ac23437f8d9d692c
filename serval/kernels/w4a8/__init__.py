"""Linear layers with 4- or 8-bit weights: W4A8, W8A8, and W4A16, W8A16 with float activations.

Scales per output channel, per group as floats, or per group as integers (Integer Scale, arXiv
2405.14597), all from one micro-kernel; activations are quantised inside, per token or with one
static scale. Integer results are exact: the same on every CPU and for every number of threads.

Floors: few rows stream the weight once, `N K bits / 8` bytes and its group scales; many rows take
`2 M N K` integer operations. Weight layout: packing.py. Inference only, no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.w4a8 import reference
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

_ACTIVATIONS = {"token": 0, "static": 1, "none": 2}


def _check(x: Tensor, packed: PackedWeight, activations: str, input_scale: float | None) -> None:
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


def _packed(
    data: Tensor, factor: Tensor, group_scales: Tensor | None, bits: int, inputs: int, group: int
) -> PackedWeight:
    return PackedWeight(data, factor, group_scales, bits, inputs, group or None)


def _one(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    activations: str,
    input_scale: float | None,
) -> Tensor:
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
    packed = _packed(data, factor, group_scales, bits, x.shape[-1], group_size)
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
    _check(x, packed, activations, input_scale)
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
    experts = packed.experts if isinstance(packed, PackedWeight) else len(packed)
    if experts != len(counts) or sum(counts) != x.shape[0]:
        raise ValueError(
            f"quantized_grouped_linear got {experts} experts, {len(counts)} counts that sum to "
            f"{sum(counts)}, and {x.shape[0]} rows; counts must name every expert and every row"
        )
    one = packed.expert if isinstance(packed, PackedWeight) else packed.__getitem__
    outputs = packed.outputs if isinstance(packed, PackedWeight) else packed[0].outputs
    out = x.new_empty(x.shape[0], outputs)
    start = 0
    for index, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            out[rows] = quantized_linear(
                x[rows], one(index), None if biases is None else biases[index],
                activations=activations, input_scale=input_scale,
            )  # fmt: skip
            start += count
    return out


def quantized_embedding(tokens: Tensor, packed: PackedWeight) -> Tensor:
    """Rows of a quantised table in float32: tokens int64 [...] -> [..., K]."""
    return reference.embedding(tokens, packed)
