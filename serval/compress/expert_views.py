"""A stack of experts taken apart into linears, so that each can be observed and quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serval.models.feedforward import gated_activation
from serval.models.moe import Experts, MixtureOfExperts


class SeparateExperts(nn.Module):
    """A stack of experts as plain linears `0.gate_proj`, `0.up_proj`, `0.down_proj`, ... whose
    weights are views of the stack: what changes one changes the other. Called as `Experts` is."""

    def __init__(self, stack: Experts) -> None:
        super().__init__()
        self.stack = (stack,)  # in a tuple, so that its parameters are not counted twice
        self.activation = stack.activation
        width = stack.gate_up_proj.shape[1] // 2
        for index, (gate_up, down) in enumerate(
            zip(stack.gate_up_proj, stack.down_proj, strict=True)
        ):
            bias = None if stack.gate_up_bias is None else stack.gate_up_bias[index]
            down_bias = None if stack.down_bias is None else stack.down_bias[index]
            expert = nn.Module()
            expert.gate_proj = _linear(gate_up[:width], None if bias is None else bias[:width])
            expert.up_proj = _linear(gate_up[width:], None if bias is None else bias[width:])
            expert.down_proj = _linear(down, down_bias)
            self.add_module(str(index), expert)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x: [R, D] sorted by expert, counts: rows per expert. Returns [R, D]."""
        parts = []
        for expert, rows in zip(self.children(), x.split(counts), strict=True):
            if len(rows):
                gate, up = expert.gate_proj(rows), expert.up_proj(rows)  # type: ignore[operator]
                inner = gated_activation(self.activation, gate, up)
                parts.append(expert.down_proj(inner))  # type: ignore[operator]
        return torch.cat(parts) if parts else torch.empty_like(x)


def take_experts_apart(block: nn.Module) -> None:
    """Replace every stack of experts in `block` by `SeparateExperts` over the same storage."""
    for owner in list(block.modules()):
        if isinstance(owner, MixtureOfExperts) and isinstance(owner.experts, Experts):
            setattr(owner, "experts", SeparateExperts(owner.experts))  # noqa: B010 another class


def put_experts_together(block: nn.Module) -> None:
    """Undo `take_experts_apart`."""
    for owner in list(block.modules()):
        if isinstance(owner, MixtureOfExperts) and isinstance(owner.experts, SeparateExperts):
            owner.experts = owner.experts.stack[0]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
