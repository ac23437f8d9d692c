"""Attention-sink metrics (survey arXiv 2604.10098), from masses and row sums, never from a matrix.

Symbols: A_ij = exp(z_ij - lse_i) is the weight that query i gives to key j (positions from 0 here),
mass_j = sum_i A_ij. Everything is per query head; keys and values, which heads of a group share,
are counted once per key-value head. "The sink" is one key position, by default the first.

Decided here: a query of a sliding-window layer counts for a key only while it sees it; entropy
includes a learned sink logit as one more outcome, since its mass is somewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.analyze.attention import Attention, attend
from serval.errors import ConfigError

EPSILON = 0.3  # of the sink rate (Gu et al.)
LENGTH = 64  # tokens of a sequence in the sink rate
DORMANT = 0.9


def watchers(keys: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """How many queries of a whole document of `keys` tokens see each key: float32 [keys]."""
    count = torch.arange(keys, 0, -1, dtype=torch.float32, device=device)
    return count if window is None else count.clamp(max=window)


def importance(
    attention: Attention, tokens: int | None = None, renormalise: bool = False
) -> Tensor:
    """alpha_k, the mean weight of key k over the queries that see it (Gu et al., arXiv 2410.10781).

    tokens: of the document's start (None: all). renormalise: rows over tokens alone, which Gu et
    al. do for attention that is not normalised. Needs a whole document. Returns [H, tokens].
    """
    count = attention.q.shape[0] if tokens is None else tokens
    mass = (
        attention.mass
        if tokens is None and not renormalise
        else attention.received(count, sinks=not renormalise)[0]
    )
    return mass / watchers(count, attention.window, mass.device)


def sink_hits(alpha: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Which keys are sinks of which heads: alpha [..., H, T] > epsilon. The sink rate of key k is
    the mean of hits[..., k] over samples, layers and heads (threshold first, then average)."""
    return alpha > epsilon


def received_sinks(mass: Tensor, tau: float | None = None) -> Tensor:
    """Sinks by received mass (survey, eq. 5): mass_j > tau mean(mass), for mass [..., T].

    The mean is 1 for normalised rows and no key receives more than T, so tau must lie between 1 and
    T; None: T / 8, at least 2. Raises ConfigError outside.
    """
    length = mass.shape[-1]
    tau = max(2.0, length / 8) if tau is None else tau
    if not 1 < tau < length:
        raise ConfigError(
            f"tau is {tau}; a key receives at most {length} times the mean over {length} tokens, "
            f"so choose a value between 1 and {length}"
        )
    return mass > tau * mass.mean(-1, keepdim=True)


def sink_mass(attention: Attention, key: int = 0) -> Tensor:
    """Mean weight of `key` over the later queries that see it: [H] ("first-token mass")."""
    weight = attention.weights_of(torch.tensor([key], device=attention.q.device))[
        key - attention.first
    ]
    others = watchers(attention.k.shape[0], attention.window)[key] - 1
    return (attention.mass[:, key] - weight[:, 0]) / max(1.0, float(others))


def dormant(mass: Tensor) -> Tensor:
    """Heads that do nothing but look at the sink: sink mass [..., H] above 0.9."""
    return mass > DORMANT


def value_drain(attention: Attention, key: int = 0) -> Tensor:
    """|v_key| / median_j |v_j| per key-value head [Hkv]; below 0.3 for a sink that does nothing."""
    norms = attention.v.float().norm(dim=-1)  # [m, Hkv]
    return norms[key] / norms.median(dim=0).values.clamp(min=1e-12)


def key_cosine(attention: Attention) -> Tensor:
    """cos(k_j, mean_t k_t) per key-value head: [Hkv, m]; sinks lie across the other keys (near 0
    or below), which KeyDiff uses as importance -cos."""
    keys = attention.k.float()
    return torch.cosine_similarity(keys, keys.mean(0, keepdim=True), dim=-1).T


def orthorank(hidden: Tensor, key: int = 0) -> Tensor:
    """OrthoRank importance 1 - |cos(h_t, h_key)| of hidden states [T, D]: [T], 0 for the sink."""
    states = hidden.float()
    return 1 - torch.cosine_similarity(states, states[key : key + 1], dim=-1).abs()


def entropy(attention: Attention) -> Tensor:
    """Entropy of each row in nats: [n, H].

    H_i = lse_i - sum_j A_ij z_ij, and sum_j A_ij z_ij = scale q_i . (sum_j A_ij k_j) is one more
    attention, with the keys as values. A sink logit b adds A_ib b to the sum. Where something else
    replaces softmax: the entropy of the weights over their sum.
    """
    a = attention
    if a.function is not None:
        parts = []
        for rows in a.blocks():
            weights = a.block(rows).float()
            share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
            parts.append(-torch.xlogy(share, share).sum(-1).T)
        return torch.cat(parts)
    mean_key = attend(a.q, a.k, a.k, a.scale, a.first, a.window, a.sinks)
    expected = (a.q.float() * mean_key.float()).sum(-1) * a.scale
    if a.sinks is not None:
        b = a.sinks.float()
        expected = expected + (b - a.lse).exp() * b
    return (a.lse - expected).clamp(min=0)


def row_sums(attention: Attention) -> Tensor:
    """Weight that each row gives to tokens: [n, H], 1 but for a learned sink's share, or what a
    variant of softmax makes it."""
    if attention.function is not None:
        return attention.lse.exp()
    if attention.sinks is None:
        return torch.ones_like(attention.lse)
    return 1 - (attention.sinks.float() - attention.lse).exp()


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation along the last axis; ties get the order they lie in."""
    ranks = [t.argsort(-1).argsort(-1).double() for t in (x, y)]
    a, b = (r - r.mean(-1, keepdim=True) for r in ranks)
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)).float()
