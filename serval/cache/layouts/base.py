"""The layout seam: how a group of layers stores keys and values, and attends over them.

A layout owns its storage and its attention kernel, so that quantised data is read as stored. To add
one: subclass `Layout`, implement `allocate`, `bytes_per_token`, `write`, `attend` (and the latent
pair if it can hold MLA), and add a line to `LAYOUTS`.

Beside blocks, a layout may keep a *state* per sequence: tensors of fixed size, such as a window of
exact rows that are not yet quantised, or a recurrent state. Which tokens lie in blocks is a pure
function of how many there are (`in_blocks`), so that tables need no other books: the tokens from
`in_blocks(n)` on are in the state. A state is copied by a fork, and never shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from serval.errors import CacheError
from serval.kernels import pages
from serval.models.attention import AttentionSpec
from serval.models.memory import Weights, attend_weighted


@dataclass
class CacheView:
    """Where this step's sequences live in one group of layers.

    slots: int64 [T], where each row's key goes (block * block_size + offset). block_tables: int32
    [N, M]. context_lens: int32 [N], tokens per sequence including this step's. query_starts: int32
    [N + 1]. lengths, queries: the last two as Python ints per sequence (for layouts that branch).
    states: int32 [N], the slot of each sequence's state (None: the layout keeps none). A layout
    that stores with delay gets no slots: it finds its rows by position in block_tables, which hold
    `in_blocks(length)` tokens, of which `stored`, int32 [N], were there before this step.
    """

    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    lengths: list[int]
    queries: list[int]
    states: Tensor | None = None
    stored: Tensor | None = None


class Layout(ABC):
    """Storage of one group of layers over `num_blocks` blocks of `block_size` tokens.

    Args:
        specs: the attention layers of the group; `slot` below indexes this list.
        num_states: sequences whose state is kept at once.
        shared: all layers use the same storage and states, because every layer has block tables of
            its own: no block or state belongs to two of them.
        dtype: the model's activation dtype, in which `k`, `v` and `q` arrive.

    options: names of the class attributes that a user may set (`--kv name:option=value`).
    delayed: whether tokens may wait in the state before they are stored in blocks.
    fetches: whether `fetch` works, which attention other than softmax needs.
    unbounded: whether a sequence may be longer than the model's context, because queries see
    bounded distances only.
    recordable: whether the kernel calls of a decode step depend on the shapes in its view only, not
    on lengths or other values, so that they may be recorded and made again (`engine.recorded`). A
    layout of which only some steps are so overrides `can_record`.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    delayed: ClassVar[bool] = False
    fetches: ClassVar[bool] = False
    unbounded: ClassVar[bool] = False
    recordable: ClassVar[bool] = False

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_states: int = 0,
        shared: bool = False,
    ) -> None:
        self.specs = list(specs)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, device
        self.num_states, self.shared = num_states, shared
        self.check_block_size(block_size)
        self.storage: list[list[Tensor]] = []  # per slot, tensors whose first axis is the block
        self.states: list[list[Tensor]] = []  # per slot, tensors whose first axis is the state
        for spec in self.specs:
            self.admit(spec)
            if shared and self.storage:
                self.storage.append(self.storage[0])
                self.states.append(self.states[0])
            else:
                self.storage.append(self.allocate(spec))
                self.states.append(self.allocate_state(spec))

    @classmethod
    def configure(cls, given: Mapping[str, str], name: str) -> type[Layout]:
        """This layout with some of its `options` set from text; raises `CacheError` for an option
        it lacks or a value of the wrong type. `name` is what the user wrote, for messages."""
        values: dict[str, Any] = {
            "name": name,
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
        }
        for key, text in given.items():
            if key not in cls.options:
                known = ", ".join(cls.options) or "none"
                raise CacheError(
                    f"cache layout {cls.name!r} has no option {key!r}; it has: {known}"
                )
            kind = type(getattr(cls, key))
            try:
                values[key] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
            except (ValueError, KeyError):
                raise CacheError(
                    f"option {key!r} of cache layout {cls.name!r} takes a {kind.__name__}, got "
                    f"{text!r}"
                ) from None
        made: type[Layout] = type(cls.__name__, (cls,), values)
        made.check_options()
        return made

    @classmethod
    def check_options(cls) -> None:
        """Raise `CacheError` when options have values that this layout cannot work with."""
        return None

    @classmethod
    def admit(cls, spec: AttentionSpec) -> None:
        """`check`, and that the layout can hand out keys where a layer's attention is not
        softmax."""
        if spec.weights != "softmax" and not cls.fetches:
            raise CacheError(
                f"cache layout {cls.name!r} does not support attention weights {spec.weights!r}, "
                "which need the stored keys; use kv='full'"
            )
        cls.check(spec)

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        """Raise `CacheError` naming the layout and the feature, if it cannot serve such a layer."""
        return None

    @classmethod
    def check_block_size(cls, block_size: int) -> None:
        """Raise `CacheError` when the layout cannot store blocks of `block_size` tokens."""
        return None

    @classmethod
    @abstractmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> float:
        """Bytes that one token of one layer takes in blocks."""

    @classmethod
    def state_bytes(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        """Bytes that one sequence's state takes in one layer."""
        return 0

    @classmethod
    def in_blocks(cls, num_tokens: int) -> int:
        """How many of a sequence's first `num_tokens` tokens lie in blocks after a step. It never
        falls as `num_tokens` grows, and is `num_tokens` unless `delayed`."""
        return num_tokens

    def can_record(self, view: CacheView) -> bool:
        """Whether the kernel calls of this decode step are those of any other of its shapes for
        which this is true (see `recordable`)."""
        return self.recordable

    def prepare(self, modules: Sequence[nn.Module], rotary: tuple[Tensor, Tensor]) -> None:
        """Called once before the first step: `modules` are the attention modules of the group, in
        the order of `specs`; a layout may fold what it needs into their weights, if that leaves the
        model's function as it is for every layout. rotary: the model's cos and sin [P, R/2]."""
        return None

    @abstractmethod
    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        """The tensors of one layer, [num_blocks, ...] each, from `zeros` (stale NaNs would
        spread)."""

    def allocate_state(self, spec: AttentionSpec) -> list[Tensor]:
        """The state tensors of one layer, [num_states, ...] each."""
        return []

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

    def fetch(self, slot: int, view: CacheView, sequence: int) -> tuple[Tensor, Tensor]:
        """A sequence's stored keys [L, Hkv, D] and values [L, Hkv, Dv] in the model's dtype. Raises
        `CacheError` unless the layout says that it `fetches`."""
        raise CacheError(f"cache layout {self.name!r} does not hand out stored keys; use kv='full'")

    def step_weighted(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        weights: Weights,
    ) -> Tensor:
        """`step` with `weights` in place of softmax, over explicit logits."""
        self.write(slot, view, k, v)
        parts, start = [], 0
        for n, count in enumerate(view.queries):
            keys, values = self.fetch(slot, view, n)
            mine = q[start : start + count]
            parts.append(attend_weighted(weights, mine, keys, values, scale, window))
            start += count
        return torch.cat(parts)

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

    def fill(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        """Store the first k [T, Hkv, D] and v [T, Hkv, Dv] of an empty sequence (the view has no
        other) without attending: what a policy kept of its prompt. A layout whose `write` is not
        the whole of storing overrides this."""
        self.write(slot, view, k, v)

    def fill_latent(self, slot: int, view: CacheView, latent: Tensor, k_rope: Tensor) -> None:
        """As `fill`, of latents [T, C] and rotated keys [T, R]."""
        raise CacheError(
            f"cache layout {self.name!r} cannot take over what a policy kept of latents; use "
            "kv='full'"
        )

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeroed storage [num_blocks, *shape], on huge pages where the system grants them."""
        return pages.zeros(self.num_blocks, *shape, dtype=dtype, device=self.device)

    def grow(self, num_blocks: int, num_states: int) -> None:
        """Make room for more blocks and states; what is stored stays where it is."""

        def extended(tensors: list[Tensor], more: int) -> list[Tensor]:
            if more <= 0:
                return tensors
            return [torch.cat([t, t.new_zeros(more, *t.shape[1:])]) for t in tensors]

        self.storage = [extended(t, num_blocks - self.num_blocks) for t in self.storage]
        self.states = [extended(t, num_states - self.num_states) for t in self.states]
        self.num_blocks = max(num_blocks, self.num_blocks)
        self.num_states = max(num_states, self.num_states)

    def fork_block(self, source: int, destination: int) -> None:
        """Copy one block's contents in every layer of the group."""
        for tensors in self.storage[:1] if self.shared else self.storage:
            for tensor in tensors:
                tensor[destination].copy_(tensor[source])

    def fork_state(self, source: int, destination: int) -> None:
        """Copy one sequence's state in every layer of the group."""
        for tensors in self.states[:1] if self.shared else self.states:
            for tensor in tensors:
                tensor[destination].copy_(tensor[source])

    def truncate(self, table: np.ndarray, state: int, old: int, new: int) -> None:
        """A sequence of `old` tokens keeps its first `new`. Called only where `in_blocks(new)` is
        less than `in_blocks(old)` and the layout is `delayed`, before blocks are given back: the
        tokens from `in_blocks(new)` to `new` must go back into the state. table: int32, its
        blocks."""
        raise CacheError(f"cache layout {self.name!r} cannot be truncated")

    @property
    def nbytes(self) -> int:
        """Bytes of storage and states."""
        owned = self.storage[:1] + self.states[:1] if self.shared else self.storage + self.states
        return sum(tensor.nbytes for tensors in owned for tensor in tensors)


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
