"""Grouped linear: the expert products of a mixture, over tokens sorted by expert.

Work is proportional to the rows given: experts without rows cost nothing forward, and backward
writes one gradient tensor for the whole stack (indexing the stack expert by expert would make
autograd allocate a full-size gradient for each). Floor: 2 R N K operations, and the weights of the
experts that were hit, read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serval.kernels.grouped_linear.reference import (
    grouped_linear_backward_reference,
    grouped_linear_reference,
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight.dtype != x.dtype:  # autocast: the stack follows the activations
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return grouped_linear_reference(x, weight, counts, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grad_x, grad_w, grad_b = grouped_linear_backward_reference(
            grad.contiguous(), x, weight.to(x.dtype), ctx.counts, needs
        )
        if grad_w is not None:
            grad_w = grad_w.to(weight.dtype)
        if grad_b is not None:
            grad_b = grad_b.to(ctx.bias_dtype)
        return grad_x, grad_w, None, grad_b


def grouped_linear(
    x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None = None
) -> Tensor:
    """Multiply consecutive runs of rows by the weight of their expert.

    x: [R, K], rows sorted by expert; weight: [E, N, K]; counts: E row counts that sum to R;
    bias: [E, N] or None. Returns [R, N] in the dtype of x. Differentiable in x, weight and bias.
    Under autocast x is cast to the autocast dtype first.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled():
        return _GroupedLinear.apply(x, weight, counts, bias)
    return grouped_linear_reference(x, weight, counts, bias)
