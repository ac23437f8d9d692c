"""The engine's memory: attention layers write to, and read from, the paged cache through it.

`PagedMemory` joins the pieces: which layout serves which layer, the storage they allocated within a
budget of bytes, and the `CacheManager` whose tables say where each sequence lives. It implements
the `Memory` protocol of `serval.models.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from serval.cache.layouts import layout_class
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.manager import CacheManager, Group, SequenceCache
from serval.cache.pool import BlockPool
from serval.cache.views import ViewBuilder
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.models.memory import Weights
from serval.models.value_rotation import keep_basis


class PagedMemory:
    """Paged storage for every attention layer of a model.

    Args:
        specs: the attention layers, in the order of the `layer` argument.
        kv: a layout name for all layers, or one name per layer.
        cache_bytes: budget for storage; the number of blocks follows from it.
        max_model_len: tokens that the longest sequence may hold; the budget must fit one.
        max_sequences: sequences that hold tokens at once (for layouts with a state per sequence).
        block_size: tokens per block.
        dtype, device: of the model's activations.

    Raises `CacheError` when the budget is too small (saying how many bytes are needed), or a layout
    cannot serve a layer.
    """

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        kv: str | Sequence[str],
        *,
        cache_bytes: int,
        max_model_len: int,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prefix_caching: bool = True,
        max_sequences: int = 8,
    ) -> None:
        names = layer_layouts(specs, kv)
        kinds = [layout_class(name) for name in names]
        per_token = cache_bytes_per_token(specs, kv, dtype)
        states = max_sequences * cache_state_bytes(specs, kv, dtype)
        self.block_bytes = max(1, math.ceil(per_token * block_size))
        self.block_size = block_size
        stored = max(kind.in_blocks(max_model_len) for kind in kinds)
        needed = max(1, -(-stored // block_size)) if per_token else 0
        num_blocks = (cache_bytes - states) // self.block_bytes
        if num_blocks < needed:
            besides = f" and {states:,} for the states of {max_sequences} sequences"
            raise CacheError(
                f"cache_bytes={cache_bytes:,} is too small for one sequence of "
                f"max_model_len={max_model_len:,} tokens: {needed * self.block_bytes + states:,} "
                f"bytes are needed ({per_token:,} per token{besides if states else ''}). Raise "
                "cache_bytes, lower max_model_len"
                f"{' or max_sequences' if states else ''}, or use a smaller kv layout."
            )
        if per_token == 0:
            num_blocks = 1  # everything lives in states
        self.layouts: list[Layout] = []
        self._place: list[tuple[int, Layout, int]] = []  # per layer: group, layout, slot
        members: dict[str, list[int]] = {}
        for layer, name in enumerate(names):
            members.setdefault(name, []).append(layer)
        place: dict[int, tuple[int, Layout, int]] = {}
        groups = []
        for index, (name, layers) in enumerate(members.items()):
            kind = layout_class(name)
            own = [specs[layer] for layer in layers]
            stateful = any(kind.state_bytes(spec, dtype) for spec in own)
            layout = kind(
                own,
                num_blocks,
                block_size,
                dtype,
                torch.device(device),
                max_sequences if stateful else 0,
            )
            self.layouts.append(layout)
            groups.append(
                Group(
                    BlockPool(num_blocks),
                    layout.fork_block,
                    in_blocks=layout.in_blocks,
                    delayed=layout.delayed,
                    states=BlockPool(max_sequences) if stateful else None,
                    copy_state=layout.fork_state,
                    restore=layout.truncate,
                )
            )
            place.update({layer: (index, layout, slot) for slot, layer in enumerate(layers)})
        self._place = [place[layer] for layer in range(len(names))]
        self.manager = CacheManager(groups, block_size, prefix_caching)
        self.views = ViewBuilder(self.manager, torch.device(device))
        self._views: list[CacheView] = []

    @classmethod
    def of(cls, decoder: Decoder, kv: str | Sequence[str], **options: Any) -> Self:
        """The memory of a decoder's trunk (its MTP heads draft, which is not the engine's affair),
        with the layouts prepared for it. options: the keyword arguments of the class."""
        weight = decoder.norm.weight
        memory = cls(
            decoder.trunk_attention_layers, kv, dtype=weight.dtype, device=weight.device, **options
        )
        modules = decoder.attention_modules
        rotary = decoder.rotary(weight.device)
        for layout in memory.layouts:
            own = [
                (slot, modules[i]) for i, (_, of, slot) in enumerate(memory._place) if of is layout
            ]
            layout.prepare([module for _, module in sorted(own, key=lambda pair: pair[0])], rotary)
        keep_basis(decoder, memory)
        return memory

    @property
    def nbytes(self) -> int:
        """Bytes of storage in all layouts."""
        return sum(layout.nbytes for layout in self.layouts)

    def batch(self, caches: Sequence[SequenceCache], counts: Sequence[int]) -> PackedBatch:
        """The batch in which sequence n computes its last counts[n] tokens, which `append` has
        made room for. It begins the step."""
        lens = np.array([cache.num_tokens for cache in caches], dtype=np.int32)
        starts = np.array([0, *accumulate(counts)], dtype=np.int32)
        owner = np.repeat(np.arange(len(caches)), counts)
        positions = np.arange(starts[-1], dtype=np.int64) + (lens - starts[1:])[owner]
        device = self.views.device
        query_starts = torch.from_numpy(starts).to(device)
        self.start(caches, counts, positions, owner, lens, query_starts)
        return PackedBatch(
            positions=torch.from_numpy(positions).to(device),
            query_starts=query_starts,
            context_lens=torch.from_numpy(lens).to(device),
            memory=self,
        )

    def start(
        self,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        positions: np.ndarray,
        owner: np.ndarray,
        lens: np.ndarray,
        query_starts: Tensor,
    ) -> None:
        """Begin a step in which sequence n computes its last counts[n] tokens; arguments as of
        `ViewBuilder.build`."""
        self.begin(self.views.build(caches, counts, positions, owner, lens, query_starts))

    def settle(self, cache: SequenceCache) -> None:
        """Every known token of a sequence is computed; called after each step that ends so. Here
        nothing follows; under a policy, tokens may be dropped."""
        return None

    @property
    def staging_bytes(self) -> int:
        """Bytes of prompts that are computed outside the storage."""
        return 0

    def begin(self, views: list[CacheView]) -> None:
        """Set where this step's sequences live, one view per group."""
        self._views = views

    @property
    def current(self) -> list[CacheView]:
        """Where this step's sequences live, one view per group."""
        return self._views

    def can_record(self) -> bool:
        """Whether the current step's kernel calls follow from the shapes in its views (see
        `Layout`). A subclass answers for itself."""
        return all(layout.can_record(self._views[group]) for group, layout, _ in self._place)

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
        if weights is not None:
            return layout.step_weighted(slot, self._views[group], q, k, v, scale, window, weights)
        return layout.step(slot, self._views[group], q, k, v, scale, window, sinks)

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
        view = self._views[group]
        return layout.step_latent(slot, view, q_nope, q_rope, latent, k_rope, kv_b, scale)


def layer_layouts(specs: Sequence[AttentionSpec], kv: str | Sequence[str]) -> list[str]:
    """One layout name per layer; raises `CacheError` when the list has the wrong length."""
    if isinstance(kv, str):
        return [kv] * len(specs)
    if len(kv) != len(specs):
        raise CacheError(
            f"kv names {len(kv)} layouts, the model has {len(specs)} attention layers: give one "
            "name, or one per layer"
        )
    return list(kv)


def cache_bytes_per_token(
    specs: Sequence[AttentionSpec], kv: str | Sequence[str], dtype: torch.dtype
) -> float:
    """Bytes that one token takes over all layers. Raises when a layout cannot serve a layer."""
    total = 0.0
    for spec, name in zip(specs, layer_layouts(specs, kv), strict=True):
        kind = layout_class(name)
        kind.admit(spec)
        total += kind.bytes_per_token(spec, dtype)
    return int(total) if total.is_integer() else total


def cache_budget(
    specs: Sequence[AttentionSpec],
    kv: str | Sequence[str],
    dtype: torch.dtype,
    *,
    blocks: int,
    block_size: int,
    sequences: int,
) -> int:
    """Bytes for a cache of `blocks` blocks and the states of `sequences` sequences."""
    block = math.ceil(cache_bytes_per_token(specs, kv, dtype) * block_size)
    return blocks * block + sequences * cache_state_bytes(specs, kv, dtype)


def cache_state_bytes(
    specs: Sequence[AttentionSpec], kv: str | Sequence[str], dtype: torch.dtype
) -> int:
    """Bytes that one sequence's state takes over all layers, beside its blocks."""
    names = layer_layouts(specs, kv)
    return sum(
        layout_class(name).state_bytes(spec, dtype) for spec, name in zip(specs, names, strict=True)
    )
