"""Prompts outside the pool: exact keys and values of one sequence, and what its tokens are worth.

A policy drops tokens only when a prompt is complete, since every later query counts. Until then the
prompt's attention is exact, over storage of its own, however the prompt is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serval.cache.layouts.base import CacheView
from serval.cache.layouts.full import FullLayout, absorb
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.models.memory import Weights

if TYPE_CHECKING:
    from serval.cache.policies.scorers import Scorer

_GPU_BLOCK = 64
CHUNK = 512  # tokens of a prompt that `measure_importance` computes at a time


class Staging:
    """Keys, values and importance of one prompt in all layers.

    Args:
        specs: the attention layers. length: tokens of the prompt. dtype, device: of the model's
            activations.

    importance: float32 [L, length], the scorer's sum over the chunks so far.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        length: int,
        scorer: Scorer,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # On CPUs one block, so that keys are contiguous; GPU kernels are compiled per block size.
        block = length if device.type == "cpu" else _GPU_BLOCK
        blocks = -(-length // block)
        self._layout = FullLayout(specs, blocks, block, dtype, device)
        self.specs, self.scorer = list(specs), scorer
        self.importance = torch.zeros(len(specs), length, device=device)
        self._first, self._end = 0, 0
        self._table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
        self._view: CacheView | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and importance."""
        return self._layout.nbytes + self.importance.nbytes

    def begin(self, first: int, count: int) -> None:
        """The next step computes the tokens [first, first + count)."""
        self._first, self._end = first, first + count
        device = self.importance.device
        self._view = CacheView(
            slots=torch.arange(first, self._end, device=device),
            block_tables=self._table,
            context_lens=torch.tensor([self._end], dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            lengths=[self._end],
            queries=[count],
        )

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store this step's keys, attend exactly, and add to the importance; as `Memory.attend`."""
        assert self._view is not None
        o = self._layout.step(layer, self._view, q, k, v, scale, window, sinks)
        keys = _by_token(self._layout.storage[layer][0])
        self._add(layer, q, keys[: self._end], scale, window, sinks)
        return o

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
        """As `attend`, of latents. Scores are those of all query heads with the one stored row:
        q_nope^T W_UK c + q_rope^T k_rope."""
        assert self._view is not None
        o = self._layout.step_latent(layer, self._view, q_nope, q_rope, latent, k_rope, kv_b, scale)
        if self.scorer.reads_attention:
            q = torch.cat([absorb(q_nope, kv_b), q_rope], dim=-1)  # [n, H, C + R]
        else:
            q = q_nope
        rows = self._layout.storage[layer][0].flatten(0, 1)[: self._end, None]  # [m, 1, C + R]
        self._add(layer, q, rows, scale, None, None)
        return o

    def _add(
        self,
        layer: int,
        q: Tensor,
        keys: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> None:
        skip = self.scorer.skipped(self._first, q.shape[0], self.importance.shape[1])
        if skip < q.shape[0]:
            added = self.scorer.score(q[skip:], keys, scale, self._first + skip, window, sinks)
            self.importance[layer, : self._end] += added

    def put(self, layer: int, k: Tensor, v: Tensor, importance: Tensor) -> None:
        """Store this step's k [n, Hkv, D] and v [n, Hkv, Dv] as if they had been computed, and add
        importance [m] of all tokens so far: for benchmarks of what comes after a prompt."""
        assert self._view is not None
        self._layout.write(layer, self._view, k, v)
        self.importance[layer, : self._end] += importance

    def rows(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The keys [n, Hkv, D] and values [n, Hkv, Dv] of tokens at `positions`; of an MLA layer
        the latents [n, C] and rotated keys [n, R]."""
        stored, spec = self._layout.storage[layer], self.specs[layer]
        if spec.kind == "mla":
            found = stored[0].flatten(0, 1)[positions]
            return found[:, : spec.kv_lora_rank], found[:, spec.kv_lora_rank :]
        keys, values = (_by_token(tensor)[positions] for tensor in stored)
        return keys, values


def _by_token(blocks: Tensor) -> Tensor:
    """[B, Hkv, S, D] as [B S, Hkv, D]; a view where there is one block."""
    return blocks.transpose(1, 2).flatten(0, 1)


class StagingMemory:
    """A `serval.models.memory.Memory` of one sequence, all of it in `staging`."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging

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
        if weights is not None:
            raise CacheError("importance is the share of a softmax; this model's layers use none")
        return self.staging.attend(layer, q, k, v, scale, window, sinks)

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
        return self.staging.attend_latent(layer, q_nope, q_rope, latent, k_rope, kv_b, scale)


@torch.inference_mode()
def measure_importance(decoder: Decoder, tokens: Sequence[int], scorer: Scorer) -> Tensor:
    """What each of `tokens` is worth to each attention layer of the trunk: float32 [L, N]."""
    weight = decoder.norm.weight
    device = weight.device
    staging = Staging(decoder.trunk_attention_layers, len(tokens), scorer, weight.dtype, device)
    memory = StagingMemory(staging)
    for first in range(0, len(tokens), CHUNK):
        part = torch.tensor(list(tokens[first : first + CHUNK]), device=device)
        count = len(part)
        staging.begin(first, count)
        batch = PackedBatch(
            positions=torch.arange(first, first + count, device=device),
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_lens=torch.tensor([first + count], dtype=torch.int32, device=device),
            memory=memory,
        )
        decoder(part, batch, pre_norm=True)
    return staging.importance.clone()
