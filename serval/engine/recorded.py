"""Decode steps without Python between their kernels.

The second step of a given number of sequences is recorded (`kernels.replay`) over a batch that lies
at fixed addresses; later ones only put their positions, tables and embeddings there and replay.
The decoder and the cache know nothing of it. A step that cannot be replayed, because PyTorch itself
computes something in it (mixtures of experts, latent attention), goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module as global_hooks

from serval.cache.layouts.base import CacheView
from serval.cache.memory import PagedMemory
from serval.kernels.replay import Pool, Tape, record
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder

MAX_ROWS = 32  # above this, Python is a small part of a step
_FIRST_WIDTH = 64  # blocks of a sequence in the first tables


@dataclass
class _Fixed:
    """The inputs of a recorded step, at the addresses that its kernels read."""

    embeddings: Tensor
    batch: PackedBatch
    views: list[CacheView]
    tape: Tape | None = None

    def __post_init__(self) -> None:
        self._batch = _arrays(self.batch, _BATCH)
        self._views = [_arrays(view, _tensors(view)) for view in self.views]

    def put(self, embeddings: Tensor, batch: PackedBatch, views: list[CacheView]) -> bool:
        """Copy a step's inputs here; False, when its block tables are too wide."""
        for mine, view in zip(self._views, views, strict=True):
            if view.block_tables.shape[1] > mine["block_tables"].shape[1]:
                return False
            _copy(mine, view)
        _copy(self._batch, batch)
        self.embeddings.copy_(embeddings)
        return True


_BATCH = ["positions", "query_starts", "context_lens"]


def _arrays(holder: object, names: list[str]) -> dict[str, np.ndarray]:
    return {name: getattr(holder, name).numpy() for name in names}


def _copy(to: dict[str, np.ndarray], values: object) -> None:
    for name, array in to.items():
        new = getattr(values, name).numpy()
        # A table's further columns keep what they hold: no query looks beyond its length.
        array[..., : new.shape[-1]] = new


def _tensors(view: CacheView) -> list[str]:
    return [f.name for f in fields(view) if isinstance(getattr(view, f.name), Tensor)]


class RecordedSteps:
    """Steps in which each sequence computes one token, by their number of sequences.

    Args: decoder: in eval mode, on the CPU. memory: its paged cache.
    """

    def __init__(self, decoder: Decoder, memory: PagedMemory) -> None:
        self.decoder, self.memory = decoder, memory
        self.obstacles: dict[int, str] = {}  # rows -> why such steps are not replayed
        self.replayed = 0  # steps so far
        self._steps: dict[int, _Fixed | None] = {}  # None: seen once
        self._pool = Pool()
        self._model = _Fingerprint(decoder)
        self._made_from: list[int] = []

    def run(self, tokens: Tensor, batch: PackedBatch) -> Tensor | None:
        """Logits [N, V] of tokens int64 [N], valid until the next step; None when the step has to
        go the ordinary way. The memory knows where the step's sequences live."""
        rows = tokens.shape[0]
        if not 0 < rows <= MAX_ROWS or batch.adapters is not None or rows in self.obstacles:
            return None
        if not self.memory.can_record():
            return None
        now = self._model.read()
        if now is None:
            return None
        if now != self._made_from:
            self._steps.clear()
            self.obstacles.clear()
            self._made_from = now
        if rows not in self._steps:
            self._steps[rows] = None  # the first time, modules may make what they keep
            return None
        embeddings, views = self.decoder.embed(tokens), self.memory.current
        step = self._steps[rows]
        if step is not None and step.put(embeddings, batch, views):
            assert step.tape is not None
            self.replayed += 1
            return step.tape.run()
        return self._record(embeddings, batch, views)

    def _record(self, embeddings: Tensor, batch: PackedBatch, views: list[CacheView]) -> Tensor:
        rows = embeddings.shape[0]
        fixed = _Fixed(
            embeddings.clone(),
            replace(batch, **{name: getattr(batch, name).clone() for name in _BATCH}),
            [_fixed_view(view) for view in views],
        )
        self.memory.begin(fixed.views)

        def compute() -> Tensor:
            hidden = self.decoder(None, fixed.batch, embeddings=fixed.embeddings)
            return self.decoder.logits(hidden).float()

        result, tape = record(self._pool, compute)
        if isinstance(tape, str):
            self.obstacles[rows] = tape
            self._steps.pop(rows)
        else:
            fixed.tape = tape
            self._steps[rows] = fixed
        return result


def _fixed_view(view: CacheView) -> CacheView:
    """A copy of a view with room for wider tables."""
    width = max(_FIRST_WIDTH, 1 << (view.block_tables.shape[1] - 1).bit_length())
    table = torch.zeros(view.block_tables.shape[0], width, dtype=view.block_tables.dtype)
    table[:, : view.block_tables.shape[1]] = view.block_tables
    copies = {name: getattr(view, name).clone() for name in _tensors(view)}
    return replace(view, **{**copies, "block_tables": table})


class _Fingerprint:
    """Which modules and tensors a decoder consists of, read before each step: a tape holds their
    addresses. Tensors may move to other memory (`.data`) or be replaced as objects."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._find()

    def _find(self) -> None:
        modules = list(self._decoder.modules())
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
        parts = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self._parts: list[dict[str, Any]] = parts
        self._objects = list(self._read_objects())  # kept alive: an id is not given away again
        self._ids = list(map(id, self._objects))
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._attention = self._decoder.attention_modules

    def _read_objects(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._parts))

    def read(self) -> list[int] | None:
        """Equal to what it was as long as nothing changed; None when the decoder has hooks, which a
        replay would not call."""
        if list(map(id, self._read_objects())) != self._ids:
            self._find()
        if any(self._hooks):
            return None
        bases = [getattr(module, "values_rotated", False) for module in self._attention]
        return [torch.get_num_threads(), *map(Tensor.data_ptr, self._tensors), *bases, *self._ids]
