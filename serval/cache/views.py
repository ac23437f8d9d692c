"""Views of a step: where its sequences' tokens live, per group of layers.

Built once per step from the sequences' tables, in buffers that are reused; every layer of a group
then reads the same view.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from serval.cache.layouts.base import CacheView
from serval.cache.manager import CacheManager, Group, SequenceCache


class ViewBuilder:
    """Makes the `CacheView`s of steps over one cache.

    Args:
        manager: whose tables are read. device: where the tensors of a view live; on the CPU they
            are the builder's own buffers, valid until the next step is built.
    """

    def __init__(self, manager: CacheManager, device: torch.device) -> None:
        self.manager, self.device = manager, device
        groups = len(manager.groups)
        self._tables = [np.zeros(64, dtype=np.int32) for _ in range(groups)]
        self._states = [np.zeros(8, dtype=np.int32) for _ in range(groups)]
        self._slots = [np.zeros(64, dtype=np.int64) for _ in range(groups)]

    def build(
        self,
        caches: Sequence[SequenceCache],
        counts: Sequence[int],
        positions: np.ndarray,
        owner: np.ndarray,
        lens: np.ndarray,
        query_starts: Tensor,
    ) -> list[CacheView]:
        """One view per group of a step in which sequence n computes its last counts[n] tokens.

        Args: `positions` int64 [T], of each row in its sequence; `owner` int64 [T], which sequence
            a row belongs to; `lens` int32 [N], tokens per sequence including this step's;
            `query_starts` int32 [N + 1].
        """
        context_lens, lengths, queries = self._tensor(lens), lens.tolist(), list(counts)
        replacing = [n for n, cache in enumerate(caches) if cache.placed is not None]
        query_rows = [0, *accumulate(counts)] if replacing else []
        views = []
        for g, group in enumerate(self.manager.groups):
            evicted = [cache.evicted[g] for cache in caches]
            entries, own_lens, own_lengths = positions, context_lens, lengths
            if any(evicted):
                gone = np.array(evicted, dtype=np.int64)
                entries = positions - gone[owner]
                own_lens = self._tensor((lens - gone).astype(np.int32))
                own_lengths = [length - less for length, less in zip(lengths, evicted, strict=True)]
                for n in replacing:
                    placed = caches[n].placed
                    if placed is not None and placed[g] >= 0:
                        entries[query_rows[n]] = placed[g]
            table = self._table(g, caches)
            slots = self._slots[g][:0]
            if not group.delayed:
                slots = self._slot_rows(g, table, entries, owner)
            views.append(
                CacheView(
                    slots=self._tensor(slots),
                    block_tables=self._tensor(table),
                    context_lens=own_lens,
                    query_starts=query_starts,
                    lengths=own_lengths,
                    queries=queries,
                    states=self._state_slots(g, caches) if group.states is not None else None,
                    stored=self._stored(group, own_lengths, queries) if group.delayed else None,
                )
            )
        return views

    def _table(self, g: int, caches: Sequence[SequenceCache]) -> np.ndarray:
        tables = [cache.tables[g] for cache in caches]
        width = max(table.count for table in tables)
        if len(self._tables[g]) < width * len(tables):
            self._tables[g] = np.zeros(2 * width * len(tables), dtype=np.int32)
        packed = self._tables[g][: width * len(tables)].reshape(len(tables), width)
        for n, table in enumerate(tables):
            packed[n, : table.count] = table.ids
            packed[n, table.count :] = 0
        return packed

    def _slot_rows(
        self, g: int, table: np.ndarray, entries: np.ndarray, owner: np.ndarray
    ) -> np.ndarray:
        rows, size = len(entries), self.manager.block_size
        if len(self._slots[g]) < rows:
            self._slots[g] = np.zeros(2 * rows, dtype=np.int64)
        slots = self._slots[g][:rows]
        block, offset = np.divmod(entries, size)
        slots[:] = table[owner, block]
        slots *= size
        slots += offset
        return slots

    def _state_slots(self, g: int, caches: Sequence[SequenceCache]) -> Tensor:
        if len(self._states[g]) < len(caches):
            self._states[g] = np.zeros(2 * len(caches), dtype=np.int32)
        states = self._states[g][: len(caches)]
        states[:] = [cache.states[g] for cache in caches]
        return self._tensor(states)

    def _stored(self, group: Group, lengths: list[int], queries: list[int]) -> Tensor:
        counts = [group.in_blocks(max(0, n - new)) for n, new in zip(lengths, queries, strict=True)]
        return self._tensor(np.array(counts, dtype=np.int32))

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)
