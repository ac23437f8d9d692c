"""The memory protocol: what a token mixer hands its tensors to, and the training memory.

The model knows nothing of blocks, bits or eviction; a cache knows nothing of projections. In
training the memory stores nothing: each document attends causally to itself. In the engine it is
the paged cache (`serval.cache`).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_ROWS = 256  # whose explicit logits exist at once


class Weights(Protocol):
    """Attention from explicit logits, in place of softmax (`serval.models.variants`)."""

    def __call__(self, z: Tensor, q: Tensor, v: Tensor, scale: float) -> Tensor:
        """z [H, n, m] scaled logits, -inf where masked; q [H, n, D]; v [Hkv, m, Dv] -> o
        [H, n, Dv]."""
        ...


@runtime_checkable
class Memory(Protocol):
    """Attention over whatever this memory has stored plus the tensors of this step."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        """Causal grouped-query attention.

        q: [T, H, D], k: [T, Hkv, D], v: [T, Hkv, Dv], rotary already applied. `window`: a query
        sees itself and the window - 1 tokens before it. `sinks` [H]: a learned logit per head that
        joins the softmax denominator only. `weights` replaces softmax. Returns [T, H, Dv].
        """
        ...

    def attend_latent(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        """Causal latent attention; absorbed or materialised is the memory's choice.

        q_nope: [T, H, Dn], q_rope: [T, H, Dr], latent: [T, C] (normed, scaled), k_rope: [T, Dr],
        kv_b: [H, Dn + Dv, C]. Returns [T, H, Dv].
        """
        ...


class CausalMemory:
    """Stores nothing; every document of the packed batch attends to itself only.

    starts: boundaries of the documents in the packed rows, N + 1 integers.
    """

    def __init__(self, starts: list[int]) -> None:
        self.starts = starts

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
        weights: Weights | None = None,
    ) -> Tensor:
        spans = list(zip(self.starts[:-1], self.starts[1:], strict=True))
        if weights is not None:
            parts = [
                attend_weighted(weights, q[a:b], k[a:b], v[a:b], scale, window) for a, b in spans
            ]
        else:
            parts = [
                _document_attention(q[a:b], k[a:b], v[a:b], scale, window, sinks) for a, b in spans
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_latent(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        q, k, v = materialise_latent(q_nope, q_rope, latent, k_rope, kv_b)
        return self.attend(layer, q, k, v, scale)


def attend_weighted(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Causal attention of q [n, H, D], the last rows, over k [m, Hkv, D] and v [m, Hkv, Dv] with
    `weights` in place of softmax. Returns [n, H, Dv]."""
    rows, heads = q.shape[:2]
    keys, groups = k.shape[:2]
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, m, D]
    key = torch.arange(keys, device=q.device)
    parts = []
    for start in range(0, rows, _QUERY_ROWS):
        mine = q[start : start + _QUERY_ROWS].transpose(0, 1)  # [H, n, D]
        place = torch.arange(mine.shape[1], device=q.device)[:, None] + (keys - rows + start)
        age = place - key
        seen = age >= 0 if window is None else (age >= 0) & (age < window)
        z = (mine.reshape(groups, -1, q.shape[-1]) @ k.transpose(1, 2)).view(heads, -1, keys)
        z = (z * scale).masked_fill(~seen, float("-inf"))
        parts.append(weights(z, mine, v, scale).transpose(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def materialise_latent(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, kv_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand latents into per-head keys and values (shapes as in `Memory.attend_latent`)."""
    heads, width, rank = kv_b.shape
    nope = q_nope.shape[-1]
    kv = F.linear(latent, kv_b.reshape(heads * width, rank)).view(-1, heads, width)
    k_nope, v = kv.split([nope, width - nope], dim=-1)
    k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, heads, -1)], dim=-1)
    return torch.cat([q_nope, q_rope], dim=-1), k, v


def _document_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    length, heads, value_dim = q.shape[0], q.shape[1], v.shape[-1]
    if v.shape[-1] < k.shape[-1]:  # the fused kernels want equal widths
        v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
        v = v.repeat_interleave(heads // v.shape[1], dim=1)
    if sinks is None and (window is None or window >= length):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        row = torch.arange(length, device=q.device)
        age = row[:, None] - row[None, :]
        seen = age >= 0
        if window is not None:
            seen &= age < window
        bias = torch.zeros(length, length, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            # A zero key with a zero value whose logit is the sink: it takes mass, adds nothing.
            column = sinks.to(q.dtype).view(heads, 1, 1).expand(heads, length, 1)
            bias = torch.cat([bias.expand(heads, -1, -1), column], dim=-1)
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    o = o.squeeze(0).transpose(0, 1)
    # slicing only when there is something to cut: its backward fills and copies a whole tensor
    return o if o.shape[-1] == value_dim else o[..., :value_dim]
