"""What a quantised weight matrix is: codes, scales and how its inputs are treated.

The convention is compressed-tensors': symmetric integers,

    s = max |w| / (2^(bits-1) - 1/2)        q = clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1)

over one output channel or one group of `group_size` consecutive inputs of it. A scale is rounded to
the dtype it is stored in before codes are computed from it, so that codes and scales of a
checkpoint belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from serval.errors import CheckpointError, ConfigError

Activations = Literal["token", "static", "none"]
Scales = Literal["float", "integer"]


@dataclass(frozen=True)
class WeightScheme:
    """How a matrix [N, K] is stored and multiplied.

    bits: 4 or 8. group_size: inputs that share a scale; None: one scale per output channel.
    activations: "token" int8 inputs with a scale per token, "static" int8 inputs with one scale
    known beforehand, "none" float inputs. scales: "integer" replaces group scales by integers times
    one factor per channel (Integer Scale, arXiv 2405.14597). Raises ConfigError.
    """

    bits: int = 4
    group_size: int | None = None
    activations: Activations = "token"
    scales: Scales = "float"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"weights can have 4 or 8 bits, got bits={self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"group_size={self.group_size}: give a positive number of inputs, or leave it out "
                "for one scale per output channel"
            )
        if self.scales == "integer" and self.group_size is None:
            raise ConfigError("integer scales need a group_size; per channel there is one scale")

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, inputs: int) -> int:
        """Scales per output channel; raises ConfigError when groups do not divide `inputs`."""
        if self.group_size is None:
            return 1
        if inputs % self.group_size:
            raise ConfigError(
                f"group_size={self.group_size} does not divide the {inputs} inputs of a matrix; "
                "choose a divisor, or leave that module out"
            )
        return inputs // self.group_size


@dataclass
class QuantizedWeight:
    """A matrix in integers.

    codes: int8 [N, K]. scales: float32 [N, G], G = 1 or K / group_size. scale_dtype: in which dtype
    a checkpoint stores the scales. integer, row_factor: int16 [N, G] and float32 [N] whose product
    is what is multiplied by when `scheme.scales` is "integer" (then `scales` is that product).
    input_scale: of static activations. Read from checkpoints made elsewhere only: zero_points int8
    [N, G], w = (q - z) s; order int64 [K], input order[j] belongs to column j of the codes, for
    groups that are not runs of consecutive inputs.
    """

    codes: Tensor
    scales: Tensor
    scheme: WeightScheme
    scale_dtype: torch.dtype = torch.float32
    integer: Tensor | None = None
    row_factor: Tensor | None = None
    input_scale: float | None = None
    zero_points: Tensor | None = None
    order: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        n, k = self.codes.shape
        groups = self.scales.shape[1]
        values = self.codes.view(n, groups, k // groups).float()
        if self.zero_points is not None:
            values -= self.zero_points.float().unsqueeze(-1)
        values = (values * self.scales.unsqueeze(-1)).view(n, k)
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order, values)


def require_finite(weight: Tensor, name: str) -> None:
    """Raises CheckpointError naming `name` when a weight holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f"weight {name!r} holds NaN or infinity and cannot be quantised; repair or retrain it"
        )


def quantize(
    weight: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    scales: Tensor | None = None,
) -> QuantizedWeight:
    """Round a float matrix [N, K] to nearest. scales: float32 [N, G] to use instead of the largest
    value's. A group of zeros gets `scale_dtype`'s epsilon as scale."""
    n, k = weight.shape
    groups = scheme.groups(k)
    values = weight.detach().float().reshape(n, groups, k // groups)
    if scales is None:
        scales = values.abs().amax(-1) / (scheme.highest + 0.5)
    scales = scales.to(scale_dtype).float()
    scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
    codes = (values / scales.unsqueeze(-1)).round_().clamp_(scheme.lowest, scheme.highest)
    return QuantizedWeight(codes.to(torch.int8).view(n, k), scales, scheme, scale_dtype)
