"""SwiGLU in plain PyTorch (Shazeer, GLU variants, arXiv:2002.05202): `silu(gate) * up`."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gate * sigmoid(gate) * up`, elementwise, computed in float32 and returned in `gate`'s
    dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for gate and up; with s = sigmoid(gate), d silu = s (1 + gate (1 - s))."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    dy, g, u = dy.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(g)
    return (dy * u * s * (1 + g * (1 - s))).to(gate.dtype), (dy * g * s).to(up.dtype)
