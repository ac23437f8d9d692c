"""A linear layer, `x W^T + bias`: PyTorch's own, also with a weight narrower than its input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WIDENED_ROWS = 8192  # rows of the weight that are wide at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


def linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear` with a weight of another dtype, converted to x's a part at a time."""
    parts = [F.linear(x, part.to(x.dtype)) for part in weight.split(_WIDENED_ROWS)]
    out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    return out if bias is None else out + bias.to(x.dtype)
