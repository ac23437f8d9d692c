"""Variants of softmax attention over explicit logits: the formulas, in their stable forms.

Survey: "Attention Sink in Transformers" (arXiv 2604.10098, section on mitigation). Softmax rows sum
to 1, so a head that wants to do nothing parks its mass on some token; each variant here gives it
another way out.

Symbols: z [..., n, m] are scaled logits, -inf where masked; v [..., m, d];
lse_i = log sum_j e^z_ij; o = softmax(z) v. Functions of z alone return the weights A [..., n, m]; a
row without a visible key is 0, never NaN. Neutral settings, with which a variant is softmax
attention: sink logit b = -inf, clipped softmax gamma = 0 and zeta = 1, elastic tau = 0, gates 1.

Identities: softmax1(z) = sink_logit(z, 0) = kv_bias with k' = 0 and v' = 0;
sink_logit(z, b) v = o sigmoid(lse - b); kv_bias = g o + (1 - g) v' with
g = sigmoid(lse - q.k' / sqrt d). So they run on top of any attention that returns its lse (natural
logarithm).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _top(z: Tensor) -> Tensor:
    """Row maxima [..., n, 1], 0 for rows without a visible key; constant for autograd."""
    top = z.detach().amax(-1, keepdim=True)
    return torch.where(top > float("-inf"), top, torch.zeros_like(top))


def softmax(z: Tensor) -> Tensor:
    """e^z_j / sum_k e^z_k."""
    e = (z - _top(z)).exp()
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, torch.ones_like(total))


def softmax1(z: Tensor) -> Tensor:
    """e^z_j / (1 + sum_k e^z_k) ("off by one"). The row maximum counts the 1: m = max(0, max z)."""
    top = _top(z).clamp(min=0)
    e = (z - top).exp()
    return e / ((-top).exp() + e.sum(-1, keepdim=True))


def sink_logit(z: Tensor, b: Tensor) -> Tensor:
    """e^z_j / (e^b + sum_k e^z_k): a learned logit per head takes mass and adds nothing (gpt-oss).

    b broadcasts against z [..., n, 1]. It joins the scaled logits, after any soft-capping, whatever
    the window.
    """
    high = torch.maximum(_top(z), b.detach())
    high = torch.where(high > float("-inf"), high, torch.zeros_like(high))
    e = (z - high).exp()
    total = (b - high).exp() + e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, torch.ones_like(total))


def kv_bias(z: Tensor, v: Tensor, key_logit: Tensor, value: Tensor) -> Tensor:
    """softmax([z; q.k']) [v; v'] (Sun et al. 2024, arXiv 2402.17762): an extra key k' and value v'
    per head, not rotated, visible to every query, not counted in the length.

    key_logit: q.k' / sqrt d, broadcasts against z [..., n, 1]. value: v' [..., 1, d]. Returns the
    output [..., n, d].
    """
    column = key_logit.expand(*z.shape[:-1], 1)
    weights = softmax(torch.cat([z, column], -1))
    return weights[..., :-1] @ v + weights[..., -1:] * value


def k_bias(z: Tensor, key_logit: Tensor) -> Tensor:
    """KV bias with v' = 0 (Gu et al., arXiv 2410.10781): a sink logit that depends on the query."""
    return sink_logit(z, key_logit)


def v_bias(o: Tensor, value: Tensor) -> Tensor:
    """o + v' (Gu et al.): does not remove sinks, a control."""
    return o + value


def clipped_softmax(z: Tensor, gamma: float, zeta: float = 1.0) -> Tensor:
    """clip((zeta - gamma) softmax(z) + gamma, 0, 1) (Bondarenko et al., arXiv 2306.12929): exact
    zeros from finite logits. gamma = -alpha / T with alpha 2 to 4 and T the longest length."""
    return ((zeta - gamma) * softmax(z) + gamma).clamp(0, 1) * (z > float("-inf"))


def softpick(z: Tensor, eps: float = 1e-8) -> Tensor:
    """relu(e^z_j - 1) / (sum_k |e^z_k - 1| + eps) (arXiv 2504.20966), both sums scaled by e^-m.

    m = max(0, max z): with every logit negative the numerators are 0 for any m, and this one does
    not overflow. Masked entries count in neither sum.
    """
    top = _top(z).clamp(min=0)
    e = ((z - top).exp() - (-top).exp()) * (z > float("-inf"))
    return e.relu() / (e.abs().sum(-1, keepdim=True) + eps)


def sigmoid(z: Tensor, b: float | Tensor = 0.0) -> Tensor:
    """sigmoid(z + b), rows not normalised (arXiv 2409.04431 has b = -log T, Gu et al. b = 0)."""
    return torch.sigmoid(z + b)


def elu_kernel(z: Tensor) -> Tensor:
    """elu(z) + 1, rows not normalised (Gu et al.); divided by its sum, the sink would return."""
    seen = z > float("-inf")
    return (torch.nn.functional.elu(z.masked_fill(~seen, 0.0)) + 1) * seen


def elastic_softmax(z: Tensor, tau: Tensor) -> Tensor:
    """relu(softmax(z)_ij + tau / i), i the number of keys that query i sees; tau per head, -1 at
    the start (-0.5 trains more easily: the gradient vanishes at -1). tau broadcasts against
    z [..., n, 1]."""
    seen = z > float("-inf")
    visible = seen.sum(-1, keepdim=True).clamp(min=1)
    return (softmax(z) + tau / visible).relu() * seen


def sink_logit_from_lse(o: Tensor, lse: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Add a sink logit to finished softmax attention: o [..., n, d], lse [..., n], b broadcasts
    against lse. Returns (o sigmoid(lse - b), logaddexp(lse, b)). Attention that was split over keys
    may count b as one more split, with lse b and o 0."""
    return o * torch.sigmoid(lse - b)[..., None], torch.logaddexp(lse, b.expand_as(lse))


def kv_bias_from_lse(
    o: Tensor, lse: Tensor, key_logit: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Add a bias key and value to finished softmax attention: key_logit [..., n] = q.k' / sqrt d,
    value broadcasts against o. Returns the output and the new lse."""
    g = torch.sigmoid(lse - key_logit)[..., None]
    return g * o + (1 - g) * value, torch.logaddexp(lse, key_logit.expand_as(lse))


def output_gate(o: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """o_h sigmoid(x W_g) (gated attention, arXiv 2505.06708, position G1: after attention, before
    the output projection). x [..., n, D] is the normed input at the query's own token; weight
    [g, D] with g = H (headwise) or H d (elementwise); o [..., n, H, d]."""
    gate = torch.nn.functional.linear(x, weight, bias)
    return o * torch.sigmoid(gate).view(*o.shape[:-1], -1)


def conditional_gate(o: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """o_h sigmoid(w_h . x_h + b_h) (Bondarenko et al., arXiv 2306.12929): one linear per head on
    that head's slice of the input. x, o [..., n, H, d], weight [H, d], bias [H]."""
    return o * torch.sigmoid((x * weight).sum(-1, keepdim=True) + bias[:, None])


def value_gate(v: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """sigmoid(G v) * v: values are gated before they are mixed, so the gated ones may be cached."""
    return torch.sigmoid(torch.nn.functional.linear(v, weight, bias)) * v


def gate_bias(initial: float) -> float:
    """The bias with which a gate starts at `initial` (in (0, 1)); 0.25 in arXiv 2306.12929."""
    return math.log(initial / (1 - initial))
