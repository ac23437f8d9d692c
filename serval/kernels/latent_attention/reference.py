"""Multi-head latent attention over a paged latent cache, absorbed form, in plain PyTorch.

DeepSeek-V2 (arXiv:2405.04434) section 2.1: every head reads the same row `[latent (C) | rotary key
(R)]`; with the key up-projection folded into the query, `score = q_latent . latent + q_rope .
k_rope` and the output stays latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels.attention.reference import paged_attention


def paged_latent_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Attend q_latent [T, H, C], q_rope [T, H, R] over `cache` [B, S, C + R]; returns latent
    outputs [T, H, C]."""
    keys = cache[:, None]  # one key-value head
    q = torch.cat((q_latent, q_rope), dim=-1)
    values = keys[..., : q_latent.shape[-1]]
    return paged_attention(q, keys, values, block_tables, context_lens, query_starts, scale)
