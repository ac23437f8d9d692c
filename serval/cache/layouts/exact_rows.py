"""Steps of layouts that keep a sequence's first and last tokens exact and the rest in blocks.

Of a sequence's n tokens the first `sinks` are the *first* ones. Of the others, all but the last
n % `residual` lie in blocks; these wait in the *window*, token i of them in row i % residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serval import kernels
from serval.cache.layouts.base import CacheView

Part = tuple[Tensor, Tensor]  # o [n, H, Dv] and the log of the softmax denominator [n, H]


@dataclass
class Place:
    """Where decoded rows go: rows `taken` of the decoded ones, at [states, rows]; int64 [n]."""

    taken: Tensor
    states: Tensor
    rows: Tensor


@dataclass
class Chunk:
    """A sequence that computes several tokens, rows start..stop of the step.

    state: its state. table: int32 [M], its blocks. first, stored, waiting: its tokens before this
    step, among the first ones, in blocks, in the window. new_first: new tokens among the first
    ones; new_blocks: int32, blocks that this step fills.
    """

    start: int
    stop: int
    state: int
    table: Tensor
    first: int
    stored: int
    waiting: int
    new_first: int
    new_blocks: Tensor

    def count(self, *values: int) -> Tensor:
        """int32 on the device of the table."""
        return torch.tensor(values, dtype=torch.int32, device=self.table.device)

    @staticmethod
    def attend_exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
        """The last rows, q [n, H, D], over k [m, Hkv, D] and v [m, Hkv, Dv], causally."""
        rows, keys, device = len(q), len(k), q.device
        place = torch.arange(keys - rows, keys, device=device)
        hidden = torch.arange(keys, device=device) > place[:, None]
        grouped = q.unflatten(1, (k.shape[1], -1))
        z = torch.einsum("tgrd,lgd->tgrl", grouped, k).flatten(1, 2) * scale  # [n, H, m]
        return _weighted(z.masked_fill_(hidden[:, None], float("-inf")), v[None])


def decodes_only(view: CacheView, residual: int, sinks: int) -> bool:
    """Whether every sequence computes one token that goes into its window and does not fill it."""
    return (
        not sinks
        and view.stored is not None
        and all(count == 1 for count in view.queries)
        and all(length % residual for length in view.lengths)
    )


class Step:
    """What a step's sequences need, from their view.

    rows: int64 [n] or a slice, the rows of sequences that compute one token (None: there are none);
    tables, stored, lengths, states: int32, of these, tokens counted without the first ones. full:
    (state, blocks to fill) of those whose window this step fills. chunks: the other sequences.
    window, first: where decoded rows go, None where no row does, or when all go into the window and
    `lengths` say where.
    """

    def __init__(self, view: CacheView, block_size: int, residual: int, sinks: int) -> None:
        assert view.states is not None
        self.view, self.sinks = view, sinks
        self.rows: Tensor | slice | None = None
        self.window: Place | None = None
        self.first: Place | None = None
        self.full: list[tuple[int, Tensor]] = []
        self.chunks: list[Chunk] = []
        if decodes_only(view, residual, sinks):  # reads no tensor, so that it can be recorded
            assert view.stored is not None
            self.rows = slice(0, len(view.lengths))
            self.states, self.tables = view.states, view.block_tables
            self.lengths, self.stored = view.context_lens, view.stored
            return
        states = view.states.tolist()
        decoded: list[int] = []
        starts: list[int] = []
        stored: list[int] = []
        start = 0
        for n, (length, count) in enumerate(zip(view.lengths, view.queries, strict=True)):
            before, after = max(0, length - count - sinks), max(0, length - sinks)
            old, new = before // residual * residual, after // residual * residual
            table = view.block_tables[n]
            filled = table[old // block_size : new // block_size]
            if count == 1:
                decoded.append(n)
                starts.append(start)
                stored.append(old)
                if len(filled):
                    self.full.append((states[n], filled))
            elif count:
                first = min(sinks, length - count)
                new_first = min(sinks, length) - first
                chunk = Chunk(
                    start, start + count, states[n], table, first, old, before - old, new_first,
                    filled,
                )  # fmt: skip
                self.chunks.append(chunk)
            start += count
        if decoded:
            self._single(view, decoded, starts, stored, residual)

    def _single(
        self,
        view: CacheView,
        decoded: list[int],
        starts: list[int],
        stored: list[int],
        residual: int,
    ) -> None:
        device = view.context_lens.device
        every = len(decoded) == len(view.lengths)
        some = torch.tensor(decoded, device=device)
        self.rows = slice(0, len(decoded)) if every else torch.tensor(starts, device=device)
        assert view.states is not None
        self.states = view.states if every else view.states[some]
        self.tables = view.block_tables if every else view.block_tables[some]
        whole = [view.lengths[n] for n in decoded]
        lengths = [max(0, length - self.sinks) for length in whole]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.stored = torch.tensor(stored, dtype=torch.int32, device=device)
        late = [i for i, length in enumerate(whole) if length > self.sinks]
        early = [i for i, length in enumerate(whole) if length <= self.sinks]
        if late:
            rows = [(lengths[i] - 1) % residual for i in late]
            self.window = self._place(late, rows)
        if early:
            self.first = self._place(early, [whole[i] - 1 for i in early])
        if self.sinks:
            kept = torch.tensor([min(self.sinks, length) for length in whole], device=device)
            self._unseen = torch.arange(self.sinks, device=device) >= kept[:, None]

    def _place(self, taken: list[int], rows: list[int]) -> Place:
        device = self.lengths.device
        chosen = torch.tensor(taken, device=device)
        return Place(chosen, self.states.long()[chosen], torch.tensor(rows, device=device))

    def attend_first(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
        """Decoded rows q [n, H, D] over their first tokens k [n, sinks, Hkv, D], v alike."""
        grouped = q.unflatten(1, (k.shape[2], -1))
        z = torch.einsum("tgrd,tlgd->tgrl", grouped, k).flatten(1, 2) * scale
        return _weighted(z.masked_fill_(self._unseen[:, None], float("-inf")), v)


def _weighted(z: Tensor, v: Tensor) -> Part:
    """Softmax over logits z [n, H, m], of which each row has a finite one, and the mean of v [n or
    1, m, Hkv, Dv]."""
    lse = z.logsumexp(-1)
    weights = torch.exp(z - lse[..., None]).unflatten(1, (v.shape[2], -1))
    v = v.expand(len(z), -1, -1, -1)
    return torch.einsum("tgrl,tlgd->tgrd", weights, v).flatten(1, 2), lse


def merge(a: Part, b: Part) -> Part:
    """Attention over the keys of both parts."""
    lse = torch.logaddexp(a[1], b[1])
    weights = [torch.exp(part[1] - lse)[..., None] for part in (a, b)]
    return a[0] * weights[0] + b[0] * weights[1], lse


def old_and_new(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Causal attention of a sequence's last rows q [n, H, D] over k [m, Hkv, D], v [m, Hkv, Dv]."""

    def counts(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    return kernels.paged_attention(
        q,
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        counts(0)[None],
        counts(len(k)),
        counts(0, len(q)),
        scale,
        None,
        sinks,
    )
