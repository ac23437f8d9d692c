"""W8A8 linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from serval.kernels.int8_linear import reference
from serval.kernels.int8_linear.packing import PackedInt8, pack_int8_weight, unpack_int8_weight

__all__ = [
    "PackedInt8",
    "int8_linear",
    "int8_linear_multi",
    "pack_int8_weight",
    "unpack_int8_weight",
]


def int8_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None = None) -> Tensor:
    return reference.int8_linear(x, unpack_int8_weight(packed, x.shape[-1]), packed.scale, bias)


def int8_linear_multi(
    x: Tensor, packed: Sequence[PackedInt8], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    biases = [None] * len(packed) if biases is None else biases
    return [int8_linear(x, p, b) for p, b in zip(packed, biases, strict=True)]
