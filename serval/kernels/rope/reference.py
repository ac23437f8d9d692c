"""Rotary position embedding in plain PyTorch (Su et al., RoFormer, arXiv:2104.09864).

Pair j of a head turns by the angle `position * frequency_j`. In the half-split form (Llama, Qwen)
pair j is `(x[j], x[j + R/2])`; in the interleaved form (DeepSeek, GPT-J) it is `(x[2j], x[2j +
1])`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R = 2 * cos.shape[1] dims of `x` [T, H, D] by the table rows named by
    `positions` [T]."""
    half = cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = cos[positions].to(wide)[:, None], sin[positions].to(wide)[:, None]  # [T, 1, R/2]
    turned = x[..., : 2 * half].to(wide)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries [T, H, D] and keys [T, Hk, D]; `cos`, `sin` float32 [P, R/2], `positions`
    int64 [T]."""
    return rotate(q, cos, sin, positions, interleaved), rotate(k, cos, sin, positions, interleaved)
