"""Int8 keys and values: x ~ scale * code, code in [-127, 127], one scale per token and head.

scale = max|x| / 127 over a head's channels. Written once, when the token is computed, and never
quantised again; the attention kernel reads the codes directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval import kernels
from serval.cache.layouts.base import CacheView, Layout
from serval.errors import CacheError
from serval.models.attention import AttentionSpec


class Int8Layout(Layout):
    """Codes int8 [B, Hkv, S, D] and scales float32 [B, Hkv, S], for keys and for values."""

    name = "int8"
    recordable = True

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        if spec.kind == "mla":
            raise CacheError("cache layout 'int8' does not support MLA latents; use kv='full'")

    @classmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        return spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim + 2 * 4)

    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        heads, size = spec.num_key_value_heads, self.block_size
        return [
            self.zeros(heads, size, spec.head_dim, dtype=torch.int8),
            self.zeros(heads, size, spec.v_head_dim, dtype=torch.int8),
            self.zeros(heads, size, dtype=torch.float32),
            self.zeros(heads, size, dtype=torch.float32),
        ]

    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        kernels.write_cache_int8(k, v, view.slots, *self.storage[slot])

    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values, key_scales, value_scales = self.storage[slot]
        return kernels.paged_attention_int8(
            q,
            keys,
            values,
            key_scales,
            value_scales,
            view.block_tables,
            view.context_lens,
            view.query_starts,
            scale,
            window,
            sinks,
        )
