"""How unevenly layers attend, and what a selection keeps of it (arXiv 2412.03409, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serval.cache.policies.allocators import sorted_shares


def lorenz(importance: Tensor) -> Tensor:
    """Lorenz curves [L, N + 1] of importance [L, N], float64: the share that the least important
    0, 1 ... N tokens of a layer hold. The diagonal is a flat layer."""
    shares = 1 - sorted_shares(importance).flip(1)
    return torch.cat([shares, shares.new_ones(len(shares), 1)], dim=1).clamp(min=0)


def gini(importance: Tensor) -> Tensor:
    """Gini coefficients [L] of importance [L, N], float64: 0 where all tokens count the same,
    1 - 1 / N where one counts alone.

    G = 2 sum_i i x_(i) / (N sum x) - (N + 1) / N, x in rising order, i = 1..N.
    """
    x = importance.double().cpu().sort(dim=1).values
    n = x.shape[1]
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    return 2 * (rank * x).sum(1) / (n * x.sum(1)) - (n + 1) / n


def retained(importance: Tensor, kept: Sequence[int]) -> Tensor:
    """P_l[o_l] [L], float64: the share of a layer's importance that its kept[l] most important
    tokens hold. Equal values across layers are the sign of a PrefixKV allocation."""
    shares = sorted_shares(importance)
    return shares[torch.arange(len(shares)), torch.tensor(kept) - 1]


def retained_by(importance: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """The share of a layer's importance that the tokens chosen[l] hold, [L], float64."""
    wide = importance.double().cpu()
    held = [row[some.cpu()].sum() for row, some in zip(wide, chosen, strict=True)]
    return torch.stack(held) / wide.sum(1)
