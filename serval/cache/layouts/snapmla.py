"""SnapMLA: Efficient Long-Context MLA Decoding via Hardware-Aware FP8 Quantized Pipelining.

arXiv 2602.10718. For models with latent attention (MLA). A token is stored when it is computed and
never again: its latent c [C] as E4M3 codes with a scale of its own, its rotary key divided by that
scale, in bfloat16:

    s = max|c| / 448;   codes = E4M3(c / s);   rope = BF16(k_rope / s)

C + 4 + 2R bytes per token and layer, against 2 (C + R) in bfloat16. Decode steps and speculative
verification (at most `fp8_queries` tokens of a sequence at once) read the codes as stored, with
quantised queries and probabilities (`serval.kernels.snapmla`). Longer runs are prompts: their
attention runs in the model's precision over what the codes stand for ("fetch-dequantise"), so a
prompt's result depends neither on how it was cut into such runs nor on whether its start was
reused. In both cases tokens are stored first and then read, so queries see quantised keys of their
own step too.

The paper's ablations, as `config`:

    snapmla  as above
    a        one scale over latent and rotary key, both in E4M3, queries alike
    b        scale 1 for every latent, rotary keys in bfloat16 as they are
    c        one scale per sequence: that of the largest number so far
    d        one scale per 64 tokens: that of the largest number of these so far

In `c` and `d` the paper codes all tokens by the largest number of all; here a token is coded by
those up to itself, since stored tokens are never coded anew and may be shared. So a later, larger
token does not coarsen earlier ones (`serval bench snapmla` measures both with all tokens at once).
All are stored in the same arrays, for comparing quality; formats of their own would take C + R + 4
(`a`), C + 2R (`b`, `c`) and C + 4 / 64 + 2R bytes (`d`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from serval import kernels
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.layouts.full import absorb, attend_materialised, expand, materialise_from
from serval.errors import CacheError
from serval.kernels.snapmla import reference
from serval.kernels.snapmla.reference import BLOCK, SMALLEST
from serval.models.attention import AttentionSpec

CONFIGS = ("snapmla", "a", "b", "c", "d")


class SnapMLALayout(Layout):
    """Codes uint8 [B, S, C], scales float32 [B, S], aligned rotary keys bfloat16 [B, S, R].

    config: one of CONFIGS. fp8_queries: most tokens of one sequence in a step that attend in
    FP8; more are a prompt and attend in the model's precision.
    """

    name = "snapmla"
    options: ClassVar[tuple[str, ...]] = ("config", "fp8_queries")
    config: ClassVar[str] = "snapmla"
    fp8_queries: ClassVar[int] = 8

    @classmethod
    def check_options(cls) -> None:
        if cls.config not in CONFIGS:
            raise CacheError(
                f"cache layout 'snapmla' has no configuration {cls.config!r}; choose one of: "
                + ", ".join(CONFIGS)
            )
        if cls.fp8_queries < 0:
            raise CacheError(
                f"option 'fp8_queries' of cache layout 'snapmla' is {cls.fp8_queries}; it expects "
                "a number of tokens, 0 or more"
            )

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        if spec.kind != "mla":
            raise CacheError(
                "cache layout 'snapmla' stores the latents of MLA models; this model has "
                f"{spec.kind!r} attention. Use kv='int8' or kv='full'"
            )

    @classmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        return spec.kv_lora_rank + 4 + 2 * spec.qk_rope_head_dim

    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        size = self.block_size
        return [
            self.zeros(size, spec.kv_lora_rank, dtype=torch.uint8),
            self.zeros(size, dtype=torch.float32),
            self.zeros(size, spec.qk_rope_head_dim, dtype=torch.bfloat16),
        ]

    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        raise CacheError("cache layout 'snapmla' stores latents, not keys and values")

    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        raise CacheError("cache layout 'snapmla' stores latents, not keys and values")

    def fill_latent(self, slot: int, view: CacheView, latent: Tensor, k_rope: Tensor) -> None:
        codes, scales, rope = self.storage[slot]
        if self.config in ("snapmla", "a"):
            kernels.write_snapmla(
                latent, k_rope, view.slots, codes, scales, rope, self.config == "a"
            )
            return
        by = torch.ones(len(latent), device=latent.device)
        if self.config != "b":
            by = self._running_scales(scales, view, latent)
        made = reference.quantize_by(latent.float(), k_rope.float(), by)
        for cache, rows in zip(self.storage[slot], made, strict=True):
            cache[view.slots // self.block_size, view.slots % self.block_size] = rows

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
        self.fill_latent(slot, view, latent, k_rope)
        if max(view.queries) <= self.fp8_queries:
            return self._decode(slot, view, q_nope, q_rope, kv_b, scale)
        few: list[int] = []
        rows: list[int] = []
        parts: list[tuple[slice, Tensor]] = []
        start = 0
        for n, count in enumerate(view.queries):
            mine = slice(start, start + count)
            if count > self.fp8_queries:
                found = self._prefill(slot, view, n, q_nope[mine], q_rope[mine], kv_b, scale)
                parts.append((mine, found))
            elif count:
                few.append(n)
                rows += range(mine.start, mine.stop)
            start += count
        if len(parts) == 1 and not few:
            return parts[0][1]
        out = parts[0][1].new_empty(start, *parts[0][1].shape[1:])
        for mine, found in parts:
            out[mine] = found
        if few:
            at = torch.tensor(rows, device=out.device)
            some = select(view, few, at)
            out[at] = self._decode(slot, some, q_nope[at], q_rope[at], kv_b, scale)
        return out

    def _running_scales(self, stored: Tensor, view: CacheView, latent: Tensor) -> Tensor:
        """Of new tokens, float32 [T]: of the largest number so far in their sequence ("c") or in
        their 64 tokens ("d"). stored: the layer's scales."""
        largest = latent.float().abs().amax(-1)
        out = torch.empty_like(largest)
        start = 0
        for n, (length, count) in enumerate(zip(view.lengths, view.queries, strict=True)):
            at, row = length - count, start
            start += count
            while at < length:
                step = length - at
                if self.config == "d":
                    step = min(step, BLOCK - at % BLOCK)
                high = largest[row : row + step].cummax(0).values.clamp_min(SMALLEST)
                scales = reference.scale_of(high)
                if at and (self.config == "c" or at % BLOCK):
                    last = view.block_tables[n, (at - 1) // self.block_size]
                    before = stored[last, (at - 1) % self.block_size]
                    scales = torch.maximum(scales, before)
                out[row : row + step] = scales
                at, row = at + step, row + step
        return out

    def _decode(
        self,
        slot: int,
        view: CacheView,
        q_nope: Tensor,
        q_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        codes, scales, rope = self.storage[slot]
        o, _ = kernels.snapmla_attention(
            absorb(q_nope, kv_b),
            q_rope,
            codes,
            scales,
            rope,
            view.block_tables,
            view.context_lens,
            view.query_starts,
            scale,
            self.config == "a",
        )
        return expand(o.to(kv_b.dtype), kv_b, kv_b.shape[1] - q_nope.shape[-1])

    def _prefill(
        self,
        slot: int,
        view: CacheView,
        n: int,
        q_nope: Tensor,
        q_rope: Tensor,
        kv_b: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention of sequence n's queries in the model's precision over what the codes stand
        for: absorbed or materialised, whichever takes fewer operations."""
        codes, scales, rope = self.storage[slot]
        length, count = view.lengths[n], q_nope.shape[0]
        fetched = kernels.fetch_snapmla(codes, scales, rope, view.block_tables[n], length)
        stored = fetched.to(kv_b.dtype)
        if count >= materialise_from(kv_b):
            return attend_materialised(stored, q_nope, q_rope, kv_b, scale)

        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=stored.device)

        o = kernels.paged_latent_attention(
            absorb(q_nope, kv_b),
            q_rope.contiguous(),
            stored[None],  # a cache of one block
            ints(0)[None],
            ints(length),
            ints(0, count),
            scale,
        )
        return expand(o, kv_b, kv_b.shape[1] - q_nope.shape[-1])


def select(view: CacheView, sequences: list[int], rows: Tensor) -> CacheView:
    """The view of some sequences, whose packed rows are `rows` int64."""
    at = torch.tensor(sequences, device=rows.device)
    queries = [view.queries[n] for n in sequences]
    starts = torch.tensor([0, *queries], dtype=torch.int32, device=rows.device)
    return CacheView(
        slots=view.slots[rows],
        block_tables=view.block_tables[at],
        context_lens=view.context_lens[at],
        query_starts=starts.cumsum(0, dtype=torch.int32),
        lengths=[view.lengths[n] for n in sequences],
        queries=queries,
    )
