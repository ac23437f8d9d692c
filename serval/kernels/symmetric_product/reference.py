"""Batched products in plain PyTorch: what the C++ ones compute."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [B, m, k], b [B, k, n] -> A B [B, m, n]."""
    return torch.bmm(a, b, out=out)


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [B, m, k] -> X X^T [B, m, m]."""
    return torch.bmm(x, x.mT, out=out)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """alpha A B + beta D + diagonal I for a, b, add (D) [B, m, m]; A and B symmetric, A B = B A."""
    out = torch.bmm(a, b, out=out).mul_(alpha)
    if add is not None:
        out.add_(add, alpha=beta)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out
