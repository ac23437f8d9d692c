"""OScaR: "The Occam's Razor for Extreme KV Cache Quantization in LLMs and Beyond"
(arXiv 2605.19660), and the low-bit caches it is compared with, by the same parts.

A group of 32 keys shares one scale per channel; tokens whose norms differ then share a grid that
serves none of them. Two steps before the keys are quantised mend that:

    canalized rotation      q <- q H, k <- k H after RoPE; no channel stands out
    omni-token scaling      n_t = |k_t| over all heads jointly, u_t = k_t / n_t is quantised per
                            channel, and n_t multiplies what is read back

Values are rotated too (inside W_v and W_o, `serval.models.value_rotation`; at run time where these
are quantised or adapted) and quantised per token. The last tokens of a sequence, fewer than
`residual`, stay exact in its state; when there are `residual` of them, all go into blocks. A token
is quantised once, except where a text is truncated to a length at which it must wait again: it then
comes back dequantised.

A step attends to what was stored before it, quantised, and to its own keys and values exactly. So a
prompt computed in one chunk is computed exactly, and what a text continues with depends on where
its prompt was cut (chunks, a reused prefix, preemption), but not on what else runs.

Decided here: a text of exactly m `residual` tokens has all of them quantised after the step that
computed the last (the official prefill keeps them when m = 1), so that which tokens are in blocks
depends on their number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from serval import kernels
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.layouts.exact_rows import Chunk, Step, decodes_only, merge, old_and_new
from serval.errors import CacheError
from serval.kernels import oscar
from serval.models.attention import AttentionSpec
from serval.models.value_rotation import rotate_values

_FEW = 8  # rows of a sequence up to which packed codes are read without being expanded
_EXPANDED = 256 << 20  # bytes that a sequence's stored tokens may take when they are


class OScaRLayout(Layout):
    """Records of 32 tokens and key-value head in blocks (`serval.kernels.oscar.format`), with
    float32 norms [B, S]; per sequence, exact rotated rows float32 [residual, Hkv, D] and
    [residual, Hkv, Dv], row = position % residual, and the first `sinks` tokens likewise.

    Attributes (options):
        bits: 2 or 4, of keys, and of values unless value_bits is not 0.
        residual: exact tokens at the end of a sequence, a multiple of the block size.
        zero: "int" rounds zero points (OScaR), "min" keeps a group's smallest number (KIVI),
            "symmetric" the one farthest from 0 (ggml).
        rotate: canalized rotation of keys and rotation of values.
        norms: omni-token scaling.
        sinks: first tokens that stay exact; prefixes are then not shared between sequences.
    keys: "channel" groups keys along tokens, "token" along channels.
    """

    name = "oscar"
    options: ClassVar[tuple[str, ...]] = (
        "bits",
        "value_bits",
        "residual",
        "zero",
        "rotate",
        "norms",
        "sinks",
    )
    delayed = True
    bits: ClassVar[int] = 2
    value_bits: ClassVar[int] = 0
    residual: ClassVar[int] = 128
    zero: ClassVar[str] = "int"
    rotate: ClassVar[bool] = True
    norms: ClassVar[bool] = True
    sinks: ClassVar[int] = 0
    keys: ClassVar[str] = "channel"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._formats = [self.format(spec) for spec in self.specs]
        self._modules: list[nn.Module] = []
        self._step: Step | None = None

    # What is stored, and where

    @classmethod
    @cache
    def format(cls, spec: AttentionSpec) -> oscar.QuantizedKV:
        """How a layer's keys and values are stored."""
        return oscar.QuantizedKV(
            spec.num_key_value_heads,
            spec.head_dim,
            spec.v_head_dim,
            cls.bits,
            cls.value_bits or cls.bits,
            zero=cls.zero,  # type: ignore[arg-type]  # the format checks it
            keys=cls.keys,  # type: ignore[arg-type]
            norms=cls.norms,
        )

    @classmethod
    def check_options(cls) -> None:
        for option, choices in (("bits", (2, 4)), ("value_bits", (0, 2, 4))):
            if getattr(cls, option) not in choices:
                raise CacheError(
                    f"cache layout {cls.name!r} got {option}={getattr(cls, option)}; expected one "
                    f"of {', '.join(map(str, choices))}"
                )
        cls.format(AttentionSpec("gqa", 1, 1, 32, 32))
        if cls.residual < oscar.GROUP or cls.residual % oscar.GROUP:
            raise CacheError(
                f"cache layout {cls.name!r} got residual={cls.residual}; tokens are quantised in "
                f"groups of {oscar.GROUP}, so give a positive multiple of it"
            )
        if cls.sinks < 0:
            raise CacheError(f"cache layout {cls.name!r} got sinks={cls.sinks}; give 0 or more")

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        if spec.kind == "mla":
            raise CacheError(
                f"cache layout {cls.name!r} does not support MLA latents; use kv='full'"
            )
        if spec.window is not None:
            raise CacheError(
                f"cache layout {cls.name!r} does not support sliding windows; give those layers "
                "kv='full' (one name per layer)"
            )
        try:
            cls.format(spec)
        except CacheError as error:
            raise CacheError(f"cache layout {cls.name!r}: {error}") from None

    @classmethod
    def check_block_size(cls, block_size: int) -> None:
        if block_size % oscar.GROUP or cls.residual % block_size:
            raise CacheError(
                f"cache layout {cls.name!r} got block_size={block_size}; it must be a multiple of "
                f"{oscar.GROUP} (the quantisation group) that divides residual={cls.residual}"
            )

    @classmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> float:
        return oscar.bytes_per_token(cls.format(spec))

    @classmethod
    def state_bytes(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        width = spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim)
        return (cls.residual + cls.sinks) * width * 4

    @classmethod
    def in_blocks(cls, num_tokens: int) -> int:
        return max(0, num_tokens - cls.sinks) // cls.residual * cls.residual

    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return self.zeros(*shape[1:], dtype=dtype)

        return oscar.allocate(self.format(spec), self.num_blocks, self.block_size, zeros)

    def allocate_state(self, spec: AttentionSpec) -> list[Tensor]:
        """Exact keys and values: the residual window, then the first tokens if any are kept."""
        return [
            torch.zeros(
                self.num_states, rows, spec.num_key_value_heads, dim, device=self.device
            )  # float32
            for rows in (self.residual, self.sinks)[: 1 + bool(self.sinks)]
            for dim in (spec.head_dim, spec.v_head_dim)
        ]

    def can_record(self, view: CacheView) -> bool:
        return decodes_only(view, self.residual, self.sinks)

    def prepare(self, modules: Sequence[nn.Module], rotary: tuple[Tensor, Tensor]) -> None:
        self._modules = list(modules)
        if self.rotate:
            for module in modules:
                rotate_values(module)

    # A step

    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        raise CacheError(f"cache layout {self.name!r} stores and attends in one step")

    def fill(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        self.store(slot, view, k, v)

    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        raise CacheError(f"cache layout {self.name!r} stores and attends in one step")

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
        plan = self.plan(view)
        wide, k, v = q.float(), k.float(), v.float()
        if self.rotate:
            wide, k = kernels.hadamard_pair(wide, k)
        if self._turns_values(slot):
            v = kernels.hadamard(v)
        o = wide.new_empty(*q.shape[:2], v.shape[-1]) if plan.chunks else wide
        if plan.rows is not None:
            self._hold(slot, plan, k[plan.rows], v[plan.rows])
            decoded = self._decode(slot, plan, wide[plan.rows], scale, sinks)
            if plan.chunks:
                o[plan.rows] = decoded
            else:
                o = decoded
        for chunk in plan.chunks:
            mine = slice(chunk.start, chunk.stop)
            o[mine] = self._chunk(slot, chunk, wide[mine], k[mine], v[mine], scale, sinks)
        self._commit(slot, plan, k, v)
        return (kernels.hadamard(o) if self._turns_values(slot) else o).to(q.dtype)

    def store(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        """A step without attention: k [T, Hkv, D] and v [T, Hkv, Dv] are stored."""
        plan = self.plan(view)
        k, v = self._stored_basis(slot, k, v)
        if plan.rows is not None:
            self._hold(slot, plan, k[plan.rows], v[plan.rows])
        self._commit(slot, plan, k, v)

    def read(
        self, slot: int, table: np.ndarray, state: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """A sequence's tokens as they are stored, in the model's basis: float32 k [n, Hkv, D] and v
        [n, Hkv, Dv]. table: int32, its blocks; state: its state."""
        first, stored = min(self.sinks, num_tokens), self.in_blocks(num_tokens)
        waiting, tensors = num_tokens - first - stored, self.states[slot]
        blocks = torch.from_numpy(table.astype(np.int64)).to(self.device)
        packed = oscar.fetch(self._formats[slot], self.storage[slot], blocks, stored)
        k, v = (
            torch.cat([x[state, :first] for x in tensors[2 + i : 3 + i]] + [packed[i]]
                      + [tensors[i][state, :waiting]])
            for i in range(2)
        )  # fmt: skip
        return self._stored_basis(slot, k, v)  # its own inverse

    def plan(self, view: CacheView) -> Step:
        """What this step's sequences need; the same for every layer of the group."""
        if self._step is None or self._step.view is not view:
            self._step = Step(view, self.block_size, self.residual, self.sinks)
        return self._step

    def _stored_basis(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """float32 k and v in the basis in which they are stored, or back from it."""
        k, v = k.float(), v.float()
        return (
            kernels.hadamard(k) if self.rotate else k,
            kernels.hadamard(v) if self._turns_values(slot) else v,
        )

    def _turns_values(self, slot: int) -> bool:
        """Whether values arrive in the other basis than the stored one."""
        module = self._modules[slot] if self._modules else None
        return self.rotate != getattr(module, "values_rotated", False)

    def _hold(self, slot: int, step: Step, k: Tensor, v: Tensor) -> None:
        """Put decoded rows k [n, Hkv, D], v [n, Hkv, Dv] into the states, before they are read."""
        tensors = self.states[slot]
        if step.window is None and step.first is None:
            oscar.hold(k, v, step.states, step.lengths, *tensors[:2])
            return
        for place, rows in ((step.window, tensors[:2]), (step.first, tensors[2:])):
            if place is not None:
                rows[0][place.states, place.rows] = k[place.taken]
                rows[1][place.states, place.rows] = v[place.taken]

    def _decode(
        self, slot: int, step: Step, q: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Sequences of one row q [n, H, D], which `_hold` has put into the states."""
        residual_k, residual_v = self.states[slot][:2]
        o, lse = oscar.attend(
            self._formats[slot],
            q,
            self.storage[slot],
            step.tables,
            step.stored,
            residual_k,
            residual_v,
            step.states,
            step.lengths,
            scale,
            sinks,
        )
        if self.sinks:
            first_k, first_v = (x[step.states.long()] for x in self.states[slot][2:])
            o, _ = merge((o, lse), step.attend_first(q, first_k, first_v, scale))
        return o

    def _chunk(
        self,
        slot: int,
        chunk: Chunk,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """One sequence's several rows q [n, H, D]: stored tokens, then exact ones, causally."""
        exact_k, exact_v = self._exact_rows(slot, chunk)
        exact_k, exact_v = torch.cat([exact_k, k]), torch.cat([exact_v, v])
        if not chunk.stored:
            return old_and_new(q, exact_k, exact_v, scale, sinks)
        row = 4 * (k[0].numel() + v[0].numel())
        if len(q) > _FEW and chunk.stored * row <= _EXPANDED:
            stored_k, stored_v = self._stored_rows(slot, chunk)
            # softmax does not mind the order of keys, as long as the new ones come last
            exact_k, exact_v = torch.cat([stored_k, exact_k]), torch.cat([stored_v, exact_v])
            return old_and_new(q, exact_k, exact_v, scale, sinks)
        stored = oscar.attend(
            self._formats[slot],
            q,
            self.storage[slot],
            chunk.table[None],
            chunk.count(chunk.stored),
            None,
            None,
            None,
            chunk.count(chunk.stored),
            scale,
            sinks,
            chunk.count(0, len(q)),
        )
        return merge(stored, chunk.attend_exact(q, exact_k, exact_v, scale))[0]

    def _stored_rows(self, slot: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """A sequence's quantised tokens before this step: k [n, Hkv, D], v [n, Hkv, Dv]."""
        return oscar.fetch(self._formats[slot], self.storage[slot], chunk.table, chunk.stored)

    def _exact_rows(self, slot: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """A sequence's exact tokens before this step, the first ones and the window."""
        tensors = self.states[slot]
        k, v = (x[chunk.state, : chunk.waiting] for x in tensors[:2])
        if not chunk.first:
            return k, v
        first_k, first_v = (x[chunk.state, : chunk.first] for x in tensors[2:])
        return torch.cat([first_k, k]), torch.cat([first_v, v])

    def _commit(self, slot: int, step: Step, k: Tensor, v: Tensor) -> None:
        """After attention: new rows of chunks go into the states, full windows into blocks."""
        fmt, storage, tensors = self._formats[slot], self.storage[slot], self.states[slot]
        for state, blocks in step.full:
            oscar.store(fmt, tensors[0][state], tensors[1][state], blocks, storage)
        for chunk in step.chunks:
            state, waiting = chunk.state, chunk.waiting
            mine = slice(chunk.start, chunk.stop)
            new_k, new_v = k[mine], v[mine]
            if chunk.new_first:
                kept = slice(chunk.first, chunk.first + chunk.new_first)
                tensors[2][state, kept] = new_k[: chunk.new_first]
                tensors[3][state, kept] = new_v[: chunk.new_first]
                new_k, new_v = new_k[chunk.new_first :], new_v[chunk.new_first :]
            if len(chunk.new_blocks):
                taken = len(chunk.new_blocks) * self.block_size - waiting
                oscar.store(
                    fmt,
                    torch.cat([tensors[0][state, :waiting], new_k[:taken]]),
                    torch.cat([tensors[1][state, :waiting], new_v[:taken]]),
                    chunk.new_blocks,
                    storage,
                )
                new_k, new_v, waiting = new_k[taken:], new_v[taken:], 0
            tensors[0][state, waiting : waiting + len(new_k)] = new_k
            tensors[1][state, waiting : waiting + len(new_v)] = new_v

    def truncate(self, table: np.ndarray, state: int, old: int, new: int) -> None:
        first = self.in_blocks(new)
        count = max(0, new - self.sinks - first)
        if not count:
            return
        blocks = torch.from_numpy(table[first // self.block_size :].astype(np.int64))
        for fmt, storage, tensors in zip(self._formats, self.storage, self.states, strict=True):
            k, v = oscar.fetch(fmt, storage, blocks.to(self.device), count)
            tensors[0][state, :count], tensors[1][state, :count] = k, v


class KiviLayout(OScaRLayout):
    """KIVI (arXiv 2402.02750): keys per channel, values per token, the smallest number of a group
    kept; neither rotation nor norms. The window is flushed as a whole."""

    name = "kivi"
    options: ClassVar[tuple[str, ...]] = ("bits", "value_bits", "residual", "sinks")
    zero = "min"
    rotate = False
    norms = False


class PerTokenInt4Layout(KiviLayout):
    """Keys and values both per token, in groups of 32 channels; with `rotate`, QuaRot's cache
    (arXiv 2404.00456)."""

    name = "int4"
    options: ClassVar[tuple[str, ...]] = ("residual", "rotate", "sinks")
    keys = "token"
    bits = 4


class PerTokenInt2Layout(PerTokenInt4Layout):
    """As `int4` with 2 bits."""

    name = "int2"
    bits = 2


class Q4_0Layout(PerTokenInt4Layout):
    """As ggml's q4_0 cache: symmetric, per token in groups of 32 channels; x ~ d (code - 8), where
    -8 d is the number farthest from 0. Groups of 32 tokens are packed together, so the last ones
    wait, exact."""

    name = "q4_0"
    options = ("residual", "sinks")
    zero = "symmetric"
    residual = 32
