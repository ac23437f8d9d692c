"""SwiGLU in plain PyTorch (Shazeer, GLU variants, arXiv:2002.05202): `silu(gate) * up`."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gate * sigmoid(gate) * up`, elementwise, computed in float32 and returned in `gate`'s dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
