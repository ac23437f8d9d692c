"""StreamingLLM: attention sinks and a window of recent tokens, in constant memory.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. A query
at position p sees the first S tokens and the last W up to itself, at positions 0, 1, 2 ... within
the cache: with e = max(0, p + 1 - S - W) tokens gone, key i < S stands at i, key j >= S at j - e,
the query at p - e. Sequences of at most S + W tokens are attended to exactly.

The paper keeps keys unrotated and rotates all of them anew at each step. Here keys arrive rotated
at their true positions; rotations compose and scores depend on differences only, so it is enough to
turn the sinks forward by e (one query), or the query back by e where it meets the sinks (many
queries): the same scores.

Decided here: what a query sees depends on its own position only, so a prompt gives the same result
in chunks of any size (the paper's code evicts once per chunk). The window lies in a ring of
W + slack rows in the sequence's state; no blocks are used. `truncate` by up to `slack` tokens is
exact, and so is one to at most S. Beyond it, rows that the ring has lost are missing from windows
until these have moved past them; sinks and tokens computed since are always seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from serval import kernels
from serval.cache.layouts.base import CacheView, Layout
from serval.errors import CacheError
from serval.models.attention import AttentionSpec, Rotary


@dataclass
class Step:
    """Where a step's rows live, the same for every layer.

    Sequences with one query: `rows` their rows, `slots` where the new row goes, `tables` and `lens`
    the ring slots they see, `states` and `gone` [n] their state and e; `turned` says whether any of
    them has outgrown the cache. The others are `many`: (rows, state, first position, first position
    that the ring still holds).
    """

    rows: Tensor
    states: Tensor
    slots: Tensor
    tables: Tensor
    lens: Tensor
    gone: Tensor
    turned: bool
    starts: Tensor
    many: list[tuple[slice, int, int, int]]


class StreamingLayout(Layout):
    """Per sequence: keys [S + W + slack, Hkv, D] and values, and the sinks' keys as computed.

    sinks: S, tokens kept from the start; recent: W; slack: rows beyond W, for rewinding.
    """

    name = "streaming"
    options = ("sinks", "recent", "slack")
    delayed = True
    unbounded = True
    sinks: int = 4
    recent: int = 1020
    slack: int = 16

    @classmethod
    def check_options(cls) -> None:
        if cls.sinks < 0 or cls.recent < 1 or cls.slack < 0:
            raise CacheError(
                f"cache layout 'streaming' got sinks={cls.sinks}, recent={cls.recent}, "
                f"slack={cls.slack}; expected at least 0, 1 and 0"
            )

    @classmethod
    def check(cls, spec: AttentionSpec) -> None:
        if spec.kind == "mla":
            raise CacheError("cache layout 'streaming' does not support MLA; use kv='full'")
        if spec.window is not None:
            raise CacheError(
                "cache layout 'streaming' does not serve sliding-window layers, which forget by "
                "themselves; give kv one name per layer, 'full' for these"
            )

    @classmethod
    def capacity(cls) -> int:
        """Rows of a sequence's state."""
        return cls.sinks + cls.recent + cls.slack

    @classmethod
    def bytes_per_token(cls, spec: AttentionSpec, dtype: torch.dtype) -> float:
        return 0.0

    @classmethod
    def state_bytes(cls, spec: AttentionSpec, dtype: torch.dtype) -> int:
        row = spec.head_dim + spec.v_head_dim
        numbers = cls.capacity() * row + cls.sinks * spec.head_dim
        return spec.num_key_value_heads * numbers * dtype.itemsize

    @classmethod
    def in_blocks(cls, num_tokens: int) -> int:
        return 0

    def allocate(self, spec: AttentionSpec) -> list[Tensor]:
        return []

    def allocate_state(self, spec: AttentionSpec) -> list[Tensor]:
        heads, rows = spec.num_key_value_heads, self.capacity()

        def state(*shape: int) -> Tensor:
            return torch.zeros(self.num_states, *shape, dtype=self.dtype, device=self.device)

        return [
            state(rows, heads, spec.head_dim),
            state(rows, heads, spec.v_head_dim),
            state(self.sinks, heads, spec.head_dim),
        ]

    def prepare(self, modules: list[nn.Module], rotary: Rotary) -> None:  # type: ignore[override]
        cos, sin = rotary
        factor = cos[0, 0]  # YaRN scales its tables; turning a stored key further must not
        self._rotary = (cos / factor, sin / factor)
        self._interleaved = [bool(getattr(m, "interleaved", False)) for m in modules]
        states = max(1, self.num_states)
        self._newest = np.full(states, -1, dtype=np.int64)  # position stored last
        self._longest = np.full(states, -1, dtype=np.int64)  # the largest ever; sinks were turned
        self._lost = np.zeros(states, dtype=np.int64)  # no row before this one, but for the sinks
        self._step: tuple[CacheView, Step] | None = None

    def fork_state(self, source: int, destination: int) -> None:
        super().fork_state(source, destination)
        for known in (self._newest, self._longest, self._lost):
            known[destination] = known[source]

    # -- where things lie ------------------------------------------------------------------------

    def _slot(self, positions: np.ndarray) -> np.ndarray:
        """Rows of a state for positions: the sinks first, then the ring."""
        ring = self.recent + self.slack
        return np.where(
            positions < self.sinks, positions, self.sinks + (positions - self.sinks) % ring
        )

    def _held(self, state: int, first: int, length: int) -> int:
        """The first position that the ring holds when tokens first..length - 1 come, which are
        noted. Where first is not the next one, the sequence was truncated: what the ring had
        dropped by then does not come back."""
        if first == 0:
            self._newest[state] = self._longest[state] = -1
            self._lost[state] = 0
        dropped = int(self._newest[state]) + 1 - self.recent - self.slack
        held = max(self.sinks, int(self._lost[state]), dropped)
        if first <= self._newest[state]:
            self._lost[state] = held = min(held, max(first, self.sinks))
        self._newest[state] = length - 1
        self._longest[state] = max(self._longest[state], length - 1)
        return held

    def _plan(self, view: CacheView) -> Step:
        if self._step is not None and self._step[0] is view:
            return self._step[1]
        assert view.states is not None
        states = view.states.cpu().numpy().astype(np.int64)
        rows, tables, slots, gone, single, many = [], [], [], [], [], []
        at = 0
        for n, (length, count) in enumerate(zip(view.lengths, view.queries, strict=True)):
            state, first = int(states[n]), length - count
            if count:
                held = self._held(state, first, length)
                if count > 1:
                    many.append((slice(at, at + count), state, first, held))
                else:
                    seen = np.arange(max(held, length - self.recent), length)
                    places = np.concatenate([np.arange(min(self.sinks, length)), self._slot(seen)])
                    if first < self.sinks:
                        places = np.arange(length)
                    base = state * self.capacity()
                    rows.append(at)
                    tables.append(places + base)
                    slots.append(base + int(self._slot(np.array(first))))
                    gone.append(max(0, length - self.sinks - self.recent))
                    single.append(n)
            at += count
        width = max((len(table) for table in tables), default=0)
        packed = np.zeros((len(tables), width), dtype=np.int32)
        for n, table in enumerate(tables):
            packed[n, : len(table)] = table

        def tensor(values: list[int] | np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype).to(self.device)

        step = Step(
            rows=tensor(rows, torch.int64),
            states=tensor(states[single] if single else [], torch.int64),
            slots=tensor(slots, torch.int64),
            tables=tensor(packed, torch.int32),
            lens=tensor([len(table) for table in tables], torch.int32),
            gone=tensor(gone, torch.int64),
            turned=bool((self._longest[states[single]] >= self.sinks + self.recent).any()),
            starts=torch.arange(len(tables) + 1, dtype=torch.int32, device=self.device),
            many=many,
        )
        self._step = (view, step)
        return step

    # -- storing and attending -------------------------------------------------------------------

    def write(self, slot: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        """Store the new rows of sequences with one query; the others are stored as they attend."""
        step = self._plan(view)
        keys, values, originals = self.states[slot]
        keys.flatten(0, 1)[step.slots] = k[step.rows]
        values.flatten(0, 1)[step.slots] = v[step.rows]
        within = step.slots % self.capacity()
        fresh = within < self.sinks
        if fresh.any():
            originals[step.states[fresh], within[fresh]] = k[step.rows[fresh]]

    def attend(
        self,
        slot: int,
        view: CacheView,
        q: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the sequences with one query, q [T, H, D]; returns [their rows, H, Dv]."""
        step = self._plan(view)
        keys, values, originals = self.states[slot]
        if self.sinks and step.turned:
            stored = originals[step.states]  # [n, S, Hkv, D]
            turned = self._turn(
                slot, stored.flatten(0, 1), step.gone.repeat_interleave(self.sinks), 1
            )
            keys[step.states, : self.sinks] = turned.view_as(stored)
        flat_keys, flat_values = (x.flatten(0, 1)[:, :, None] for x in (keys, values))
        return kernels.paged_attention(
            q[step.rows], flat_keys, flat_values, step.tables, step.lens, step.starts, scale,
            None, sinks,
        )  # fmt: skip

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
        step = self._plan(view)
        if not step.many:
            self.write(slot, view, k, v)
            return self.attend(slot, view, q, scale, window, sinks)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        if step.rows.numel():
            self.write(slot, view, k, v)
            out[step.rows] = self.attend(slot, view, q, scale, window, sinks)
        for rows, state, first, held in step.many:
            out[rows] = self._prompt(
                slot, state, first, held, q[rows], k[rows], v[rows], scale, sinks
            )
        return out

    def _prompt(
        self, slot: int, state: int, first: int, held: int, q: Tensor, k: Tensor, v: Tensor,
        scale: float, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend with many queries of one sequence over what is stored and themselves, then store.

        Queries that see everything come first; the others attend to their window and to the sinks,
        and the two parts merge by their log-sum-exps.
        """
        keys, values, originals = self.states[slot]
        total = first + q.shape[0]
        exact = max(0, min(total, self.sinks + self.recent) - first)  # queries that see everything
        past = np.arange(max(held, first - self.recent + 1), first)
        ring = torch.from_numpy(self._slot(past)).to(self.device)
        stored = min(first, self.sinks)
        # the first tokens as computed, then the ring's and the new ones, in order of position
        all_k = torch.cat([originals[state, :stored], keys[state, ring], k])
        all_v = torch.cat([values[state, :stored], values[state, ring], v])
        parts = []
        if exact:
            before = stored + len(past)
            parts.append(_dense(q[:exact], all_k, all_v, scale, before, None, sinks))
        if exact < q.shape[0]:
            away = self.sinks  # sinks lead all_k, whether stored before or just computed
            recent_k, recent_v = all_k[away:], all_v[away:]
            index = recent_k.shape[0] - (q.shape[0] - exact)
            late = q[exact:]
            o = _dense(late, recent_k, recent_v, scale, index, self.recent, None)
            _, lse = kernels.received_mass(late, recent_k, scale, first=index, window=self.recent)
            gone = torch.arange(first + exact, total, device=q.device) + 1
            parts.append(
                self._with_sinks(
                    slot, late, gone - self.sinks - self.recent, all_k[:away], all_v[:away],
                    scale, o, lse, sinks,
                )
            )  # fmt: skip
        self._store(slot, state, first, k, v)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _with_sinks(
        self, slot: int, q: Tensor, gone: Tensor, k: Tensor, v: Tensor, scale: float, o: Tensor,
        lse: Tensor, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Join o, lse of the window with attention to the sinks k [S, Hkv, D], v [S, Hkv, Dv]."""
        if not k.shape[0]:
            return o if sinks is None else o * torch.sigmoid(lse - sinks.float())[..., None]
        group = q.shape[1] // k.shape[1]
        turned = self._turn(slot, q, gone, -1).float()
        z = torch.einsum("nhd,shd->nhs", turned, k.float().repeat_interleave(group, 1)) * scale
        total = torch.logaddexp(lse, z.logsumexp(-1))
        if sinks is not None:
            total = torch.logaddexp(total, sinks.float())
        extra = torch.einsum(
            "nhs,shd->nhd", (z - total[..., None]).exp(), v.float().repeat_interleave(group, 1)
        )
        return (o.float() * (lse - total).exp()[..., None] + extra).to(o.dtype)

    def _turn(self, slot: int, x: Tensor, by: Tensor, sign: int) -> Tensor:
        """Rotate x [n, h, D] by `sign * by` [n] positions."""
        cos, sin = self._rotary
        return kernels.rotary(x, x[:, :1], cos, sign * sin, by, self._interleaved[slot])[0]

    def _store(self, slot: int, state: int, first: int, k: Tensor, v: Tensor) -> None:
        keys, values, originals = self.states[slot]
        total = first + k.shape[0]
        kept = np.arange(max(first, self.sinks, total - self.recent - self.slack), total)
        places = torch.from_numpy(self._slot(kept)).to(self.device)
        new = torch.from_numpy(kept - first).to(self.device)
        keys[state, places], values[state, places] = k[new], v[new]
        if first < self.sinks:
            end = min(total, self.sinks)
            for stored, rows in ((keys, k), (originals, k), (values, v)):
                stored[state, first:end] = rows[: end - first]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, window: int | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Causal attention of q [n, H, D] at positions first.. over k, v [m, Hkv, ...]."""
    end = first + q.shape[0]
    device = q.device
    return kernels.paged_attention(
        q,
        k[:end].transpose(0, 1)[None],
        v[:end].transpose(0, 1)[None],
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        torch.tensor([end], dtype=torch.int32, device=device),
        torch.tensor([0, q.shape[0]], dtype=torch.int32, device=device),
        scale,
        window,
        sinks,
    )
