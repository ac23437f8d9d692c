"""The Walsh-Hadamard transform in plain PyTorch: x H with Sylvester's matrix over sqrt(n).

H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]; H / sqrt(n) is symmetric, orthogonal and its own
inverse. n log2(n) additions instead of n^2 products.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sylvester(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """H [size, size] of +-1, size a power of two."""
    made = torch.ones(1, 1, dtype=dtype)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype)
    while len(made) < size:
        made = torch.kron(made, two)
    return made


def largest_block(dim: int) -> int:
    """The largest power of two that divides dim."""
    return dim & -dim


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., D] times the block-diagonal H / sqrt(block), in x's dtype (inside at least
    float32)."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = wide.reshape(-1, block)
    half = 1
    while half < block:
        out = out.view(-1, block // (2 * half), 2, half)
        out = torch.stack([out[:, :, 0] + out[:, :, 1], out[:, :, 0] - out[:, :, 1]], 2)
        half *= 2
    return (out.reshape(x.shape) * block**-0.5).to(x.dtype)
