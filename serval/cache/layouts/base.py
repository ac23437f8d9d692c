"""The layout seam: how a group of layers stores keys and values, and attends over them.

A layout owns its storage and its attention kernel, so that quantised data is read as stored. To add
one: subclass `Layout`, implement `allocate`, `bytes_per_token`, `write`, `attend` (and the latent
pair if it can hold MLA), and add a line to `LAYOUTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from serval.errors import CacheError
from serval.kernels import pages
from serval.models.attention import AttentionSpec


@dataclass
class CacheView:
    """Where this step's sequences live in one group of layers.

    slots: int64 [T], where each row's key goes (block * block_size + offset). block_tables: int32
    [N, M]. context_lens: int32 [N], tokens per sequence including this step's. query_starts: int32
    [N + 1]. lengths, queries: the last two as Python ints per sequence (for layouts that branch).
    """

    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    lengths: list[int]
    queries: list[int]


class Layout(ABC):
    """Storage of one group of layers over `num_blocks` blocks of `block_size` tokens.

    Args:
        specs: the attention layers of the group; `slot` below indexes this list.
        dtype: the model's activation dtype, in which `k`, `v` and `q` arrive.
    """

    name: ClassVar[str]

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.specs = list(specs)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, device
        self.storage: list[list[Tensor]] = []  # per slot, tensors whose first axis is the block
        for spec in self.specs:
            self.check(spec)
            self.storage.append(self.allocate(spec))

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        """Raise `CacheError` naming the layout and the feature, if it cannot serve such a layer."""
        return None

    @classmethod
    @abstractmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        """Bytes that one token of one layer takes."""

    @abstractmethod
    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        """The tensors of one layer, [num_blocks, ...] each, from `zeros` (stale NaNs would
        spread)."""

    @abstractmethod
    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        """Store this step's k [T, Hkv, D] and v [T, Hkv, Dv] at `view.slots`."""

    @abstractmethod
    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Causal attention of q [T, H, D] over what is stored. Returns [T, H, Dv]."""

    def step(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store this step's keys and attend. A layout that attends over the exact new keys before
        it stores them compressed overrides this."""
        self.write(slot, view, k, v)
        return self.attend(slot, view, q, scale, window, sinks)

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
        """Store this step's latents and attend; shapes as in `Memory.attend_latent`."""
        raise CacheError(f"cache layout {self.name!r} does not support MLA; use kv='full'")

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeroed storage [num_blocks, *shape], on huge pages where the system grants them."""
        return pages.zeros(self.num_blocks, *shape, dtype=dtype, device=self.device)

    def fork_block(self, source: int, destination: int) -> None:
        """Copy one block's contents in every layer of the group."""
        for tensors in self.storage:
            for tensor in tensors:
                tensor[destination].copy_(tensor[source])

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(tensor.nbytes for tensors in self.storage for tensor in tensors)
