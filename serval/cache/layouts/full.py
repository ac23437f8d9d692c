"""The plain layout: keys and values in the model's dtype, MLA as latent plus rotary key.

MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) is read in one of two forms. Absorbed: W_UK folds
into the query and W_UV into the output, so a (query, key) pair costs H (2C + R) products and the
stored rows are read once for all heads. Materialised: expanding L stored rows costs L H (Dn + Dv) C
products, after which a pair costs H (Dn + R + Dv). With n queries the second is cheaper when
n (2C + R - Dn - R - Dv) > (Dn + Dv) C; each sequence of a step gets the form that suits it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from serval import kernels
from serval.cache.layouts.base import CacheView, Layout
from serval.models.attention import AttentionSpec
from serval.models.memory import materialise_latent


class FullLayout(Layout):
    """Keys [B, Hkv, S, D] and values [B, Hkv, S, Dv]; for MLA one tensor [B, S, C + R].

    stored: the dtype of storage; None: the model's.
    """

    recordable = True
    name = "full"
    stored: ClassVar[torch.dtype | None] = None
    fetches: ClassVar[bool] = True

    def fetch(self, slot: int, view: CacheView, sequence: int) -> tuple[Tensor, Tensor]:
        length = view.lengths[sequence]
        blocks = view.block_tables[sequence, : -(-length // self.block_size)].long()
        keys, values = (
            x[blocks].transpose(1, 2).flatten(0, 1)[:length].to(self.dtype)
            for x in self.storage[slot]
        )
        return keys, values

    @classmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        dtype = cls.stored or dtype
        if spec.kind == "mla":
            return (spec.kv_lora_rank + spec.qk_rope_head_dim) * dtype.itemsize
        return spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize

    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        dtype = self.stored or self.dtype
        if spec.kind == "mla":
            width = spec.kv_lora_rank + spec.qk_rope_head_dim
            return [self.zeros(self.block_size, width, dtype=dtype)]
        heads = spec.num_key_value_heads
        return [
            self.zeros(heads, self.block_size, spec.head_dim, dtype=dtype),
            self.zeros(heads, self.block_size, spec.v_head_dim, dtype=dtype),
        ]

    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        keys, values = self.storage[slot]
        kernels.write_cache(k, v, view.slots, keys, values)

    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = self.storage[slot]
        return kernels.paged_attention(
            q,
            keys,
            values,
            view.block_tables,
            view.context_lens,
            view.query_starts,
            scale,
            window,
            sinks,
        )

    def fill_latent(self, slot: int, view: CacheView, latent: Tensor, k_rope: Tensor) -> None:
        (rows,) = self.storage[slot]
        new = torch.cat([latent, k_rope], dim=-1)[:, None]  # one head
        nothing = new[..., :0]
        cache = rows[:, None]
        kernels.write_cache(new, nothing, view.slots, cache, cache[..., :0])

    def step_latent(
        self,
        slot: int,
        view: CacheView,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        (rows,) = self.storage[slot]
        self.fill_latent(slot, view, latent, k_rope)
        threshold = self._materialise_from(q_nope.shape[-1], kv_b)
        if max(view.queries) < threshold:
            return self._absorbed(rows, view, q_nope, q_rope, kv_b, scale)
        parts = []
        start = 0
        for n, count in enumerate(view.queries):
            mine = slice(start, start + count)
            if count >= threshold:
                parts.append(
                    self._materialised(rows, view, n, q_nope[mine], q_rope[mine], kv_b, scale)
                )
            else:
                one = CacheView(
                    slots=view.slots[mine],
                    block_tables=view.block_tables[n : n + 1],
                    context_lens=view.context_lens[n : n + 1],
                    query_starts=torch.tensor([0, count], dtype=torch.int32, device=rows.device),
                    lengths=view.lengths[n : n + 1],
                    queries=view.queries[n : n + 1],
                )
                parts.append(self._absorbed(rows, one, q_nope[mine], q_rope[mine], kv_b, scale))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def _materialise_from(nope: int, kv_b: Tensor) -> float:
        return materialise_from(kv_b)

    @staticmethod
    def _absorbed(
        rows: Tensor, view: CacheView, q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, scale: float
    ) -> Tensor:
        o = kernels.paged_latent_attention(
            absorb(q_nope, kv_b),
            q_rope.contiguous(),
            rows,
            view.block_tables,
            view.context_lens,
            view.query_starts,
            scale,
        )
        return expand(o, kv_b, kv_b.shape[1] - q_nope.shape[-1])

    def _materialised(
        self,
        rows: Tensor,
        view: CacheView,
        n: int,
        q_nope: Tensor,
        q_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        length = view.lengths[n]
        blocks = view.block_tables[n, : -(-length // self.block_size)].long()
        stored = rows[blocks].flatten(0, 1)[:length].to(kv_b.dtype)  # [L, C + R]
        return attend_materialised(stored, q_nope, q_rope, kv_b, scale)


def materialise_from(kv_b: Tensor) -> float:
    """Queries per sequence from which expanding the latents is the cheaper form. kv_b: [H, Dn + Dv,
    C]."""
    _, width, rank = kv_b.shape
    saved = 2 * rank - width
    return width * rank / saved if saved > 0 else float("inf")


def absorb(q_nope: Tensor, kv_b: Tensor) -> Tensor:
    """Fold W_UK into q_nope [T, H, Dn]: [T, H, C]. kv_b: [H, Dn + Dv, C]."""
    w_k = kv_b[:, : q_nope.shape[-1]]
    return torch.bmm(q_nope.transpose(0, 1), w_k).transpose(0, 1).contiguous()


def expand(o: Tensor, kv_b: Tensor, v_head_dim: int) -> Tensor:
    """Apply W_UV to latent outputs o [T, H, C]: [T, H, Dv]."""
    w_v = kv_b[:, kv_b.shape[1] - v_head_dim :]
    return torch.bmm(o.transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1)


def attend_materialised(
    stored: Tensor, q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, scale: float
) -> Tensor:
    """Causal attention of a sequence's last n tokens, q_nope [n, H, Dn] and q_rope [n, H, R], over
    its rows `stored` [L, C + R], expanded into keys and values per head. Returns [n, H, Dv]."""
    length, rank = stored.shape[0], kv_b.shape[-1]
    q, k, v = materialise_latent(q_nope, q_rope, stored[:, :rank], stored[:, rank:], kv_b)
    value_width = v.shape[-1]
    v = F.pad(v, (0, max(0, k.shape[-1] - value_width)))  # the fused kernels want equal widths
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if q.shape[2] == length:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        row = torch.arange(length - q.shape[2], length, device=q.device)
        seen = torch.arange(length, device=q.device)[None, :] <= row[:, None]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return o[0].transpose(0, 1)[..., :value_width]
