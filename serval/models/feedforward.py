"""Gated feed-forward layer and the activations of gated experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from serval import kernels
from serval.models.config import ModelConfig
from serval.models.layers import Linear, shared_input

CLAMPED_SWIGLU_ALPHA = 1.702
CLAMPED_SWIGLU_LIMIT = 7.0


def gated_activation(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., F] -> [..., F]. silu: silu(gate) * up. clamped_swiglu (gpt-oss):
    (up + 1) * gate * sigmoid(alpha gate), with gate at most 7 and up within +-7."""
    if kind == "silu":
        return kernels.swiglu(gate, up)
    gate = gate.clamp(max=CLAMPED_SWIGLU_LIMIT)
    up = up.clamp(-CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * gate)


class GatedMLP(nn.Module):
    """down(activation(gate(x), up(x))), SwiGLU (arXiv 2002.05202) by default."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        self.activation = config.activation
        self.gate_proj = Linear(hidden, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        gate, up = shared_input(x, self.gate_proj, self.up_proj)
        return self.down_proj(gated_activation(self.activation, gate, up))
