"""Row log-sum-exps and column masses of causal attention in plain PyTorch, block of rows by block:
the specification of the C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22  # scores that exist at a time


def received_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    first: int,
    window: int | None,
    sinks: Tensor | None,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """See `serval.kernels.received_mass`; in float64 for such input, in float32 otherwise."""
    (rows, heads, dim), (keys, kv_heads, _) = q.shape, k.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // kv_heads
    queries = q.to(wide).view(rows, kv_heads, group, dim)
    sink = None if sinks is None else sinks.to(wide).view(kv_heads, group, 1)
    mass = torch.zeros(kv_heads, group, keys, dtype=wide, device=q.device)
    lse = torch.empty(rows, heads, dtype=wide, device=q.device)
    step = max(1, min(256, BLOCK_ELEMENTS // (heads * keys)))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        low = 0 if window is None else max(0, first + a - window + 1)
        high = first + b
        scores = torch.einsum("qhgd,khd->hgqk", queries[a:b], k[low:high].to(wide)) * scale
        row = torch.arange(first + a, high, device=q.device)[:, None]
        column = torch.arange(low, high, device=q.device)[None]
        hidden = column > row
        if window is not None:
            hidden = hidden | (column <= row - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        total = scores.logsumexp(-1)  # [Hkv, G, b - a]
        if sink is not None:
            total = torch.logaddexp(total, sink)
        lse[a:b] = total.flatten(0, 1).T
        mass[:, :, low:high] += (scores - total[..., None]).exp().sum(2)
    by_head = mass.flatten(0, 1)
    return (by_head if per_head else by_head.mean(0)), lse
