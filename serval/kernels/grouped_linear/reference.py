"""Grouped linear in plain PyTorch: each run of rows is multiplied by its own expert's weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear_reference(
    x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None = None
) -> Tensor:
    """x: [R, K] sorted by expert, weight: [E, N, K], counts: rows per expert. Returns [R, N]."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            out[rows] = F.linear(x[rows], weight[expert], None if bias is None else bias[expert])
            start += count
    return out


def grouped_linear_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, counts: list[int], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; experts without rows get zeros, written once."""
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_w = torch.zeros_like(weight) if needs[1] else None
    grad_b = grad.new_zeros(weight.shape[0], weight.shape[1]) if needs[2] else None
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = slice(start, start + count)
        if grad_x is not None:
            torch.mm(grad[rows], weight[expert], out=grad_x[rows])
        if grad_w is not None:
            torch.mm(grad[rows].T, x[rows], out=grad_w[expert])
        if grad_b is not None:
            grad_b[expert] = grad[rows].sum(0)
        start += count
    return grad_x, grad_w, grad_b
