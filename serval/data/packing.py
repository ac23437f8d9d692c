"""Packed rows of a fixed number of tokens, mixed from text, generated tasks and conversations.

A row holds whole documents end to end; the decoder keeps them apart. Which kind comes next is
decided by token shares (the kind furthest below its share), every random draw by a generator seeded
with (seed, row), and text walks through a shuffled order per epoch: the whole state of a stream is
five integers and the counts, so a run resumes at exactly the next row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serval.data.corpus import Corpus

Document = tuple[list[int], list[float]]
Maker = Callable[[Random, int], Document]  # (generator, most tokens) -> tokens, loss weights

_SHORTEST = 32


@dataclass
class Part:
    """One kind of generated document: its share of the tokens and its lengths (log-uniform)."""

    name: str
    share: float
    make: Maker
    min_length: int = 64
    max_length: int = 2048


class PackedStream:
    """An endless, resumable stream of packed rows (`serval.train.stream.TokenStream`).

    corpus: text documents, taking the share the parts leave. row_tokens: tokens per row.
    length_warmup_rows: over the first rows, generated documents grow (geometrically) from their
    shortest to their longest length.
    """

    def __init__(
        self,
        corpus: Corpus,
        parts: list[Part],
        row_tokens: int,
        seed: int,
        length_warmup_rows: int = 0,
    ) -> None:
        self.corpus, self.parts = corpus, parts
        self.row_tokens, self.seed = row_tokens, seed
        self.length_warmup_rows = length_warmup_rows
        self.row = self.epoch = self.place = self.offset = 0
        self.counts = {"text": 0, **{part.name: 0 for part in parts}}
        self.shares = {part.name: part.share for part in parts}
        self.shares["text"] = max(0.0, 1.0 - sum(self.shares.values()))
        self._order = self._shuffled()

    def state_dict(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "epoch": self.epoch,
            "place": self.place,
            "offset": self.offset,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row, self.epoch = state["row"], state["epoch"]
        self.place, self.offset = state["place"], state["offset"]
        self.counts = dict(state["counts"])
        self._order = self._shuffled()

    def next(self) -> tuple[Tensor, list[int], Tensor]:
        """(tokens int64 [row_tokens], document lengths, weights float32 [row_tokens])."""
        rng = Random(f"{self.seed}/{self.row}")
        tokens: list[int] = []
        weights: list[float] = []
        lengths: list[int] = []
        while (room := self.row_tokens - len(tokens)) > 0:
            name, (ids, loss) = self._document(rng, room)
            tokens += ids
            weights += loss
            lengths.append(len(ids))
            self.counts[name] += len(ids)
        self.row += 1
        return torch.tensor(tokens), lengths, torch.tensor(weights, dtype=torch.float32)

    def _document(self, rng: Random, room: int) -> tuple[str, Document]:
        total = sum(self.counts.values())
        behind = max(self.shares, key=lambda n: self.shares[n] * (total + room) - self.counts[n])
        for part in self.parts:
            if part.name == behind and room >= part.min_length:
                ids, loss = part.make(rng, self._length(part, rng, room))
                if ids:
                    return behind, (ids, loss)
        ids = self._text(room)
        return "text", (ids, [1.0] * len(ids))

    def _length(self, part: Part, rng: Random, room: int) -> int:
        longest = part.max_length / part.min_length
        if self.length_warmup_rows:
            longest **= min(1.0, 0.25 + 0.75 * self.row / self.length_warmup_rows)
        return min(room, round(part.min_length * longest ** rng.random()))

    def _text(self, room: int) -> list[int]:
        document = self.corpus.document(self._order[self.place])
        piece = document[self.offset : self.offset + room].tolist()
        self.offset += len(piece)
        if len(document) - self.offset < _SHORTEST:  # a shorter rest would teach nothing
            self.offset, self.place = 0, self.place + 1
            if self.place == len(self._order):
                self.place, self.epoch = 0, self.epoch + 1
                self._order = self._shuffled()
        return piece

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.corpus))
