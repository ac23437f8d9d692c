"""RMSNorm in plain PyTorch (Zhang & Sennrich, arXiv:1910.07467): `y = x / sqrt(mean(x^2) + eps) *
weight`."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension of `x` [..., D] by its root mean square and scale by `weight`
    [D].

    The statistics are taken in float32 (float64 for float64 input); the result has `x`'s dtype.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`; dtypes follow PyTorch's promotion of the
    two."""
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients for x and weight: with g = dy * w and r = 1 / rms, dx = r g - x r^3 mean(g x), dw =
    sum dy x r."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    dy = dy.to(wide.dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    g = dy * weight.to(wide.dtype)
    dx = r * g - wide * r.pow(3) * (g * wide).mean(-1, keepdim=True)
    dw = (dy * wide * r).flatten(0, -2).sum(0) if x.dim() > 1 else dy * wide * r
    return dx.to(x.dtype), dw.to(weight.dtype)
