"""Momentum, MONA's one-buffer acceleration and the decoupled update, as their equations."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def round_stochastically(x: Tensor, seed: int) -> Tensor:
    """Round x, taken as float32, to bfloat16, up or down at random in proportion; element i's
    random bits are a hash of i and `seed` (32 bits)."""
    x = x.float()
    i = torch.arange(x.numel(), device=x.device).view(x.shape)
    h = ((i * 0x9E3779B9) & _MASK) ^ (seed & _MASK)
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    h = (h ^ (h >> 16)) & 0xFFFF
    bits = x.contiguous().view(torch.int32).long() & _MASK
    finite = (bits & 0x7F800000) != 0x7F800000
    bits = (bits + torch.where(finite, h, 0)) & 0xFFFF0000
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signed.to(torch.int32).view(torch.float32).to(torch.bfloat16)


def momentum_update(
    grad: Tensor, momentum: Tensor, out: Tensor, mu: float, nesterov: bool
) -> Tensor:
    """M <- mu M + (1 - mu) G in place; out = (1 - mu) G + mu M, or M without nesterov."""
    momentum.lerp_(grad.to(momentum.dtype), 1 - mu)
    return out.copy_(grad.lerp(momentum.to(grad.dtype), mu) if nesterov else momentum)


def accelerate(
    grad: Tensor, mean: Tensor, weight: float, correction: float, beta: float, seed: int
) -> Tensor:
    """Return G + weight (G - correction m) and then set m <- beta m + (1 - beta) G.

    mean (m): float32 or float64, or bfloat16, which is rounded stochastically with `seed`.
    """
    wide = mean.to(grad.dtype)
    corrected = grad + weight * (grad - correction * wide)
    newer = wide.lerp(grad, 1 - beta)
    mean.copy_(round_stochastically(newer, seed) if mean.dtype == torch.bfloat16 else newer)
    return corrected


def descend(parameter: Tensor, update: Tensor, decay: float, scale: float) -> None:
    """W <- decay W - scale O, in place."""
    parameter.mul_(decay).add_(update.to(parameter.dtype), alpha=-scale)
