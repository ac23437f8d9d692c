"""WISCA: A Lightweight Model Transition Method to Improve LLM Training via Weight Scaling
(arXiv 2508.16676).

Two sets of weights that compute the same function can lie at points of different sharpness. WISCA
jumps along such a set to where the two matrices of a pair are equally large, then trains on:

    r = sqrt(|W_k|_1 / |W_q|_1);   W_q <- r W_q;   W_k <- W_k / r      Q K^T is unchanged
    r = sqrt(|W_o|_1 / |W_v|_1);   W_v <- r W_v;   W_o <- W_o / r      P V W_o is unchanged

with |.|_1 the sum of absolute entries. Biases of q, k and v follow their weights, that of the
output does not. Gradient flow conserves |W_q|^2 - |W_k|^2, so an imbalance, as grouped-query
attention has from its start, does not heal by itself.

The paper applies both every 250 steps. Decided here, where it was silent: also before the first
step; optimizer state follows (`serval.optim.covariant`); a norm on queries and keys switches the
first pair off; which rows may have their own factor (`sites`); latent attention, gated feed-forward
layers (off by default) and the two matrices of a LoRA adapter.
"""

from serval.train.wisca.adapters import ADAPTERS
from serval.train.wisca.pairs import PairReport, Report
from serval.train.wisca.rescale import WiscaCallback, wisca_
from serval.train.wisca.sites import (
    AttentionAdapter,
    AttentionSite,
    LatentSite,
    Projection,
    UnusableError,
)

__all__ = [
    "ADAPTERS",
    "AttentionAdapter",
    "AttentionSite",
    "LatentSite",
    "PairReport",
    "Projection",
    "Report",
    "UnusableError",
    "WiscaCallback",
    "wisca_",
]
