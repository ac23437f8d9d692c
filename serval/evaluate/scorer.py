"""Logits of whole texts, step by step, from a decoder with or without a cache layout.

Without a layout each sequence attends to itself exactly, as in training. With one, keys and values
pass through the paged cache in chunks, as a served prompt's do, so that what a layout loses shows.
Only `chunk` rows of logits per sequence exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from serval.cache.memory import PagedMemory, cache_budget
from serval.errors import RequestError
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder

BLOCK_SIZE = 32

Rows = tuple[int, int, Tensor]  # sequence, first row, logits [rows, vocabulary] in float32


class Scorer:
    """Logits at every position of token sequences.

    decoder: in eval mode. kv: None for exact attention, or a cache layout's name. chunk: tokens of
    each sequence that one step computes with a layout, and rows of logits made at a time.
    """

    def __init__(self, decoder: Decoder, kv: str | None = None, chunk: int = 256) -> None:
        self.decoder, self.kv, self.chunk = decoder, kv, chunk
        parameter = decoder.norm.weight
        self.device, self.dtype = parameter.device, parameter.dtype
        self._memory: PagedMemory | None = None
        self._blocks = self._sequences = 0

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Rows]:
        """Logits of all rows of all sequences, `chunk` rows at a time, in rounds: first the first
        chunk of every sequence, then the second. The order does not depend on `kv`.

        Raises RequestError when a sequence is empty or longer than the model's context.
        """
        limit = self.decoder.config.max_position_embeddings
        for tokens in sequences:
            if not 0 < len(tokens) <= limit:
                raise RequestError(
                    f"a sequence of {len(tokens)} tokens cannot be scored; the model takes 1 to "
                    f"{limit} (max_position_embeddings)"
                )
        return self._exact(sequences) if self.kv is None else self._cached(sequences, self.kv)

    @torch.inference_mode()
    def _exact(self, sequences: Sequence[Sequence[int]]) -> Iterator[Rows]:
        lengths = [len(tokens) for tokens in sequences]
        flat = torch.tensor([t for tokens in sequences for t in tokens], device=self.device)
        hidden = self.decoder(flat, PackedBatch.from_lengths(lengths, self.device))
        starts = [0, *accumulate(lengths)]
        for first in range(0, max(lengths), self.chunk):
            for n, length in enumerate(lengths):
                if first < length:
                    rows = hidden[starts[n] + first : starts[n] + min(first + self.chunk, length)]
                    yield n, first, self.decoder.logits(rows).float()

    @torch.inference_mode()
    def _cached(self, sequences: Sequence[Sequence[int]], kv: str) -> Iterator[Rows]:
        memory = self._storage(kv, [len(tokens) for tokens in sequences])
        manager = memory.manager
        caches = [manager.create() for _ in sequences]
        try:
            for first in range(0, max(len(tokens) for tokens in sequences), self.chunk):
                live = [n for n, tokens in enumerate(sequences) if first < len(tokens)]
                ends = [min(first + self.chunk, len(sequences[n])) for n in live]
                counts = [end - first for end in ends]
                for n, count in zip(live, counts, strict=True):
                    manager.append(caches[n], count)
                batch = memory.batch([caches[n] for n in live], counts)
                flat = [
                    t for n, end in zip(live, ends, strict=True) for t in sequences[n][first:end]
                ]
                hidden = self.decoder(torch.tensor(flat, device=self.device), batch)
                for n, rows in zip(live, hidden.split(counts), strict=True):
                    yield n, first, self.decoder.logits(rows).float()
        finally:
            for cache in caches:
                manager.free(cache)

    def _storage(self, kv: str, lengths: list[int]) -> PagedMemory:
        blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
        if self._memory is None or self._blocks < blocks or self._sequences < len(lengths):
            specs = self.decoder.trunk_attention_layers
            budget = cache_budget(
                specs,
                kv,
                self.dtype,
                blocks=blocks,
                block_size=BLOCK_SIZE,
                sequences=len(lengths),
            )
            self._memory = PagedMemory.of(
                self.decoder,
                kv,
                cache_bytes=budget,
                max_model_len=max(lengths),
                block_size=BLOCK_SIZE,
                prefix_caching=False,
                max_sequences=len(lengths),
            )
            self._blocks, self._sequences = blocks, len(lengths)
        return self._memory
