"""The engine's memory: attention layers write to, and read from, the paged cache through it.

`PagedMemory` joins the pieces: which layout serves which layer, the storage they allocated within a
budget of bytes, and the `CacheManager` whose tables say where each sequence lives. It implements
the `Memory` protocol of `serval.models.memory`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serval.cache.layouts import LAYOUTS
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.manager import CacheManager, Group
from serval.cache.pool import BlockPool
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.registry import resolve


class PagedMemory:
    """Paged storage for every attention layer of a model.

    Args:
        specs: the attention layers, in the order of the `layer` argument.
        kv: a layout name for all layers, or one name per layer.
        cache_bytes: budget for storage; the number of blocks follows from it.
        max_model_len: tokens that the longest sequence may hold; the budget must fit one.
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
    ) -> None:
        names = layer_layouts(specs, kv)
        per_token = cache_bytes_per_token(specs, kv, dtype)
        self.block_bytes = per_token * block_size
        self.block_size = block_size
        num_blocks = cache_bytes // self.block_bytes
        needed = -(-max_model_len // block_size)
        if num_blocks < needed:
            raise CacheError(
                f"cache_bytes={cache_bytes:,} is too small for one sequence of "
                f"max_model_len={max_model_len:,} tokens: {needed * self.block_bytes:,} bytes are "
                f"needed ({per_token:,} per token). Raise cache_bytes, lower max_model_len, or use "
                "a smaller kv layout."
            )
        self.layouts: list[Layout] = []
        self._place: list[tuple[int, Layout, int]] = []  # per layer: group, layout, slot
        members: dict[str, list[int]] = {}
        for layer, name in enumerate(names):
            members.setdefault(name, []).append(layer)
        place: dict[int, tuple[int, Layout, int]] = {}
        groups = []
        for index, (name, layers) in enumerate(members.items()):
            kind: type[Layout] = resolve(LAYOUTS, name, "cache layout")
            layout = kind(
                [specs[layer] for layer in layers],
                num_blocks,
                block_size,
                dtype,
                torch.device(device),
            )
            self.layouts.append(layout)
            groups.append(Group(BlockPool(num_blocks), layout.fork_block))
            place.update({layer: (index, layout, slot) for slot, layer in enumerate(layers)})
        self._place = [place[layer] for layer in range(len(names))]
        self.manager = CacheManager(groups, block_size, prefix_caching)
        self._views: list[CacheView] = []

    @property
    def nbytes(self) -> int:
        """Bytes of storage in all layouts."""
        return sum(layout.nbytes for layout in self.layouts)

    def begin(self, views: list[CacheView]) -> None:
        """Set where this step's sequences live, one view per group."""
        self._views = views

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
    ) -> Tensor:
        """See `serval.models.memory.Memory.attend`."""
        group, layout, slot = self._place[layer]
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
) -> int:
    """Bytes that one token takes over all layers. Raises when a layout cannot serve a layer."""
    total = 0
    for spec, name in zip(specs, layer_layouts(specs, kv), strict=True):
        kind: type[Layout] = resolve(LAYOUTS, name, "cache layout")
        kind.check(spec)
        total += kind.bytes_per_token(spec, dtype)
    return total
