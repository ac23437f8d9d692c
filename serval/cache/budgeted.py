"""The paged cache under a policy: every layer has tables and lengths of its own.

Layers that store their keys the same way share one pool of blocks and one storage, so that a block
which one layer does not need serves another layer, or another sequence. A prompt that will lose
tokens is computed in `Staging`; when it is complete, `settle` moves what the policy keeps into
blocks.

Prefixes are not shared between sequences: what a prompt keeps of its start depends on how it goes
on, and what lies in blocks afterwards is not a leading piece of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serval.cache.layouts import layout_class
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.manager import CacheManager, Group, SequenceCache
from serval.cache.memory import (
    PagedMemory,
    cache_bytes_per_token,
    cache_state_bytes,
    layer_layouts,
)
from serval.cache.policies import make_policy
from serval.cache.policies.base import Policy
from serval.cache.pool import BlockPool
from serval.cache.staging import Staging
from serval.cache.views import ViewBuilder
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.models.decoder import Decoder
from serval.models.memory import Weights


class BudgetedMemory(PagedMemory):
    """`PagedMemory` in which a policy decides what each layer keeps.

    Args: as of `PagedMemory`, and
        policy: what is kept. The budget of bytes is for what is kept; beside it, prompts that are
            being computed take exact storage, of at most `max_model_len` tokens at a time
            (`staging_bytes`).

    Raises `CacheError` as `PagedMemory` does, and for layers or layouts that no policy can serve.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        kv: str | Sequence[str],
        *,
        policy: Policy,
        cache_bytes: int,
        max_model_len: int,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_sequences: int = 8,
    ) -> None:
        policy.bind(specs)
        self.policy, self.specs, self.dtype = policy, list(specs), dtype
        self.device = torch.device(device)
        self.block_size = block_size
        self._windows = [spec.window for spec in specs]
        names = layer_layouts(specs, kv)
        per_token = cache_bytes_per_token(specs, kv, dtype)
        states = max_sequences * cache_state_bytes(specs, kv, dtype)
        self.block_bytes = max(1, math.ceil(per_token * block_size))
        for spec, name in zip(specs, names, strict=True):
            _check(policy, spec, name, dtype)
        self._members: dict[tuple[str, AttentionSpec], list[int]] = {}  # layers of each pool
        for layer, (spec, name) in enumerate(zip(specs, names, strict=True)):
            stored_alike = replace(spec, window=None, sinks=False, num_heads=0)
            self._members.setdefault((name, stored_alike), []).append(layer)
        blocks = self._pool_sizes(cache_bytes, states, max_model_len, per_token)

        self.layouts: list[Layout] = []
        place: dict[int, tuple[int, Layout, int]] = {}
        groups: dict[int, Group] = {}
        for ((name, _), layers), count in zip(self._members.items(), blocks, strict=True):
            kind = layout_class(name)
            own = [specs[layer] for layer in layers]
            stateful = kind.state_bytes(own[0], dtype) > 0
            slots = max_sequences * len(layers) if stateful else 0
            layout = kind(own, count, block_size, dtype, self.device, slots, shared=True)
            self.layouts.append(layout)
            pool, ids = BlockPool(count), BlockPool(slots) if stateful else None
            for slot, layer in enumerate(layers):
                place[layer] = (layer, layout, slot)
                groups[layer] = Group(
                    pool,
                    layout.fork_block,
                    in_blocks=layout.in_blocks,
                    delayed=layout.delayed,
                    states=ids,
                    copy_state=layout.fork_state,
                    restore=layout.truncate,
                )
        self._place = [place[layer] for layer in range(len(names))]
        self.manager = CacheManager(
            [groups[layer] for layer in range(len(names))],
            block_size,
            prefix_caching=False,
            staged_blocks=self._staged_blocks,
            max_staged_tokens=max_model_len,
        )
        self.views = ViewBuilder(self.manager, self.device)
        self._views: list[CacheView] = []
        self._staged: list[tuple[slice, Staging]] = []  # this step's rows outside the pool
        self._pooled: Tensor | slice | None = None  # and the others

    # How much is kept

    def _pool_sizes(
        self, cache_bytes: int, states: int, max_model_len: int, per_token: float
    ) -> list[int]:
        """Blocks of each pool: bytes are split as the layers' full caches would be."""
        needed = self._most_blocks(max_model_len, growing=True)
        sizes, enough = [], True
        shares = [self._layer_bytes(name, spec) for name, spec in self._members]
        weights = [
            share * len(layers)
            for share, layers in zip(shares, self._members.values(), strict=True)
        ]
        for share, weight, least in zip(shares, weights, needed, strict=True):
            room = (cache_bytes - states) * weight / sum(weights)
            sizes.append(int(room // (share * self.block_size)))
            enough = enough and sizes[-1] >= least
        if not enough:
            wanted = states + math.ceil(
                max(
                    least * share * self.block_size * sum(weights) / weight
                    for least, share, weight in zip(needed, shares, weights, strict=True)
                )
            )
            raise CacheError(
                f"cache_bytes={cache_bytes:,} is too small for what policy {self.policy.name!r} "
                f"with keep={self.policy.keep} keeps of one sequence of max_model_len="
                f"{max_model_len:,} tokens: {wanted:,} bytes are needed ({per_token:,} per kept "
                "token). Raise cache_bytes, lower max_model_len or keep, or use a smaller kv "
                "layout."
            )
        return sizes

    def _layer_bytes(self, name: str, spec: AttentionSpec) -> float:
        return layout_class(name).bytes_per_token(spec, self.dtype)

    def _most_blocks(self, length: int, growing: bool = False) -> list[int]:
        """The most blocks of each pool that a sequence of `length` tokens keeps, however they are
        split over layers; growing: while it decodes, when a layer may hold one entry more."""
        every = len(self.specs)
        entries = self.policy.budget(length, every)
        if self.policy.keep == 1:
            entries = every * length
        elif growing:
            entries = min(entries + every, every * length)
        size = self.block_size
        most = []
        for layers in self._members.values():
            count = len(layers)
            mine = min(entries, count * length)
            most.append(min((mine + count * (size - 1)) // size, count * -(-length // size)))
        return most

    def _staged_blocks(self, length: int) -> list[int] | None:
        if not self.policy.drops(length, self._windows):
            return None
        return self._most_blocks(length)

    @property
    def staging_bytes(self) -> int:
        return sum(staging.nbytes for staging in self.manager.stagings)

    def can_record(self) -> bool:
        return not self._staged and super().can_record()

    # A step

    def start(
        self,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        positions: np.ndarray,
        owner: np.ndarray,
        lens: np.ndarray,
        query_starts: Tensor,
    ) -> None:
        self._staged, self._pooled = [], None
        staged = [n for n, cache in enumerate(caches) if cache.staged]
        if not staged:
            super().start(caches, counts, positions, owner, lens, query_starts)
            return
        starts = np.concatenate([[0], np.cumsum(counts)])
        for n in staged:
            cache, count = caches[n], counts[n]
            if cache.staging is None:
                cache.staging = Staging(
                    self.specs, cache.staged, self.policy.scorer, self.dtype, self.device
                )
            cache.staging.begin(cache.num_tokens - count, count)
            self._staged.append((slice(int(starts[n]), int(starts[n + 1])), cache.staging))
        others = [n for n, cache in enumerate(caches) if not cache.staged]
        if not others:
            return
        rows = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in others])
        if others == list(range(len(others))):
            self._pooled = slice(0, len(rows))
        else:
            self._pooled = torch.from_numpy(rows).to(self.device)
        own_counts = [counts[n] for n in others]
        own_starts = np.concatenate([[0], np.cumsum(own_counts)]).astype(np.int32)
        super().start(
            [caches[n] for n in others],
            own_counts,
            positions[rows],
            np.repeat(np.arange(len(others)), own_counts),
            lens[others],
            torch.from_numpy(own_starts).to(self.device),
        )

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
        """See `serval.models.memory.Memory.attend`."""
        group, layout, slot = self._place[layer]
        if not self._staged:
            return layout.step(slot, self._views[group], q, k, v, scale, window, sinks)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        if self._pooled is not None:
            at = self._pooled
            out[at] = layout.step(
                slot, self._views[group], q[at], k[at], v[at], scale, window, sinks
            )
        for rows, staging in self._staged:
            out[rows] = staging.attend(layer, q[rows], k[rows], v[rows], scale, window, sinks)
        return out

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
        """See `serval.models.memory.Memory.attend_latent`."""
        group, layout, slot = self._place[layer]
        if not self._staged:
            return layout.step_latent(
                slot, self._views[group], q_nope, q_rope, latent, k_rope, kv_b, scale
            )
        out = q_nope.new_empty(*q_nope.shape[:2], self.specs[layer].v_head_dim)
        if self._pooled is not None:
            at = self._pooled
            out[at] = layout.step_latent(
                slot,
                self._views[group],
                q_nope[at],
                q_rope[at],
                latent[at],
                k_rope[at],
                kv_b,
                scale,
            )
        for rows, staging in self._staged:
            out[rows] = staging.attend_latent(
                layer, q_nope[rows], q_rope[rows], latent[rows], k_rope[rows], kv_b, scale
            )
        return out

    # After a prompt

    @torch.inference_mode()
    def settle(self, cache: SequenceCache) -> None:
        """When a sequence's prompt is complete, drop what the policy does not keep and move the
        rest into blocks. Nothing happens afterwards: decoding holds the shares by itself."""
        if cache.retention is not None or self.policy.keep == 1:
            return
        length, chosen = cache.num_tokens, None
        if cache.staged:
            staging: Staging = cache.staging
            counts = self.policy.allocate(staging.importance, self._windows)
            chosen = [
                self.policy.select(row, count, window)
                for row, count, window in zip(
                    staging.importance, counts, self._windows, strict=True
                )
            ]
            self.manager.settle(cache, counts)
            for layer, positions in enumerate(chosen):
                self._fill(cache, layer, staging, positions)
        fixed = [group.delayed for group in self.manager.groups]
        cache.retention = self.policy.retention(chosen, length, self._windows, fixed)

    def _fill(self, cache: SequenceCache, layer: int, staging: Staging, positions: Tensor) -> None:
        """Store a layer's survivors in the blocks that the sequence got for them."""
        _, layout, slot = self._place[layer]
        count = len(positions)
        ids = cache.tables[layer].ids
        place = np.arange(0 if layout.delayed else count)
        slots = ids[place // self.block_size].astype(np.int64) * self.block_size
        view = CacheView(
            slots=self._tensor(slots + place % self.block_size),
            block_tables=self._tensor(ids[None].copy()),
            context_lens=self._tensor(np.array([count], dtype=np.int32)),
            query_starts=self._tensor(np.array([0, count], dtype=np.int32)),
            lengths=[count],
            queries=[count],
            states=self._tensor(np.array([cache.states[layer]], dtype=np.int32)),
        )
        fill = layout.fill_latent if self.specs[layer].kind == "mla" else layout.fill
        fill(slot, view, *staging.rows(layer, positions))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _check(policy: Policy, spec: AttentionSpec, name: str, dtype: torch.dtype) -> None:
    kind = layout_class(name)
    if kind.bytes_per_token(spec, dtype) == 0:
        raise CacheError(
            f"cache layout {name!r} drops tokens by itself; it cannot serve policy "
            f"{policy.name!r}. Use kv='full', or no policy"
        )
    if spec.weights != "softmax":
        raise CacheError(
            f"policy {policy.name!r} does not support attention weights {spec.weights!r}: "
            "importance is the share of a softmax"
        )


def make_memory(
    decoder: Decoder,
    kv: str | Sequence[str],
    policy: str | Policy | None,
    *,
    prefix_caching: bool = True,
    **options: Any,
) -> PagedMemory:
    """The paged cache of a decoder, with or without a policy. prefix_caching: see `PagedMemory`; a
    policy rules it out. options: the other keyword arguments of `PagedMemory`."""
    if policy is None:
        return PagedMemory.of(decoder, kv, prefix_caching=prefix_caching, **options)
    return BudgetedMemory.of(decoder, kv, policy=make_policy(policy), **options)
