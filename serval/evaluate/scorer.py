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

from serval.cache.layouts.base import CacheView
from serval.cache.memory import PagedMemory, cache_bytes_per_token
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
        self._blocks = 0

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
        blocks = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        memory = self._storage(kv, sum(blocks))
        first_block = [0, *accumulate(blocks)]
        for first in range(0, max(len(tokens) for tokens in sequences), self.chunk):
            live = [n for n, tokens in enumerate(sequences) if first < len(tokens)]
            ends = [min(first + self.chunk, len(sequences[n])) for n in live]
            view = self._view(first, ends, [first_block[n] for n in live])
            memory.begin([view] * len(memory.layouts))
            batch = PackedBatch(
                positions=torch.cat([torch.arange(first, end) for end in ends]).to(self.device),
                query_starts=view.query_starts,
                context_lens=view.context_lens,
                memory=memory,
            )
            flat = [t for n, end in zip(live, ends, strict=True) for t in sequences[n][first:end]]
            hidden = self.decoder(torch.tensor(flat, device=self.device), batch)
            for n, rows in zip(live, hidden.split(view.queries), strict=True):
                yield n, first, self.decoder.logits(rows).float()

    def _view(self, first: int, ends: list[int], first_blocks: list[int]) -> CacheView:
        """Sequence n lies in consecutive blocks from first_blocks[n], in every group of layers."""
        queries = [end - first for end in ends]
        width = -(-max(ends) // BLOCK_SIZE)
        slots = [
            block * BLOCK_SIZE + torch.arange(first, end)
            for block, end in zip(first_blocks, ends, strict=True)
        ]
        table = torch.tensor(first_blocks, dtype=torch.int32)[:, None] + torch.arange(
            width, dtype=torch.int32
        )
        last = max(first_blocks) + width  # a shorter sequence's unused entries stay valid ids
        return CacheView(
            slots=torch.cat(slots).to(self.device),
            block_tables=table.clamp(max=max(last - 1, 0)).to(self.device),
            context_lens=torch.tensor(ends, dtype=torch.int32, device=self.device),
            query_starts=torch.tensor(
                [0, *accumulate(queries)], dtype=torch.int32, device=self.device
            ),
            lengths=ends,
            queries=queries,
        )

    def _storage(self, kv: str, blocks: int) -> PagedMemory:
        if self._memory is None or self._blocks < blocks:
            specs = self.decoder.trunk_attention_layers
            block_bytes = cache_bytes_per_token(specs, kv, self.dtype) * BLOCK_SIZE
            self._memory = PagedMemory(
                specs,
                kv,
                cache_bytes=blocks * block_bytes,
                max_model_len=blocks * BLOCK_SIZE,
                block_size=BLOCK_SIZE,
                dtype=self.dtype,
                device=self.device,
                prefix_caching=False,
            )
            self._blocks = blocks
        return self._memory
