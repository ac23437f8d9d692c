"""Logits of whole texts, step by step, from a decoder with or without a cache layout.

Without a layout each sequence attends to itself exactly, as in training. With one, keys and values
pass through the paged cache in chunks, as a served prompt's do, so that what a layout loses shows.
With a policy too, the first part of each text is a prompt and the rest comes token by token, from
what the policy kept. Only `chunk` rows of logits per sequence exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from serval.cache.budgeted import make_memory
from serval.cache.memory import PagedMemory, cache_budget
from serval.cache.policies.base import Policy
from serval.errors import RequestError
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder

BLOCK_SIZE = 32
PROMPT_SHARE = 0.5

Rows = tuple[int, int, Tensor]  # sequence, first row, logits [rows, vocabulary] in float32


def prompt_length(length: int, share: float = PROMPT_SHARE) -> int:
    """Tokens of a sequence of `length` that a policy takes as the prompt: it drops tokens after
    them."""
    return max(1, int(length * share))


class Scorer:
    """Logits at every position of token sequences.

    decoder: in eval mode. kv: None for exact attention, or a cache layout's name. chunk: tokens of
    each sequence that one step computes with a layout, and rows of logits made at a time. policy:
    what the cache keeps after a sequence's first `prompt_length` tokens (needs kv), of which
    prompt_share is the share.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: str | None = None,
        chunk: int = 256,
        policy: str | Policy | None = None,
        prompt_share: float = PROMPT_SHARE,
    ) -> None:
        self.decoder, self.kv, self.chunk, self.policy = decoder, kv, chunk, policy
        self.prompt_share = prompt_share
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
        if self.kv is None:
            return self._exact(sequences)
        if self.policy is None:
            return self._cached(sequences, self.kv)
        return self._continued(sequences, self.kv)

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

    @torch.inference_mode()
    def _continued(self, sequences: Sequence[Sequence[int]], kv: str) -> Iterator[Rows]:
        memory = self._storage(kv, [len(tokens) for tokens in sequences])
        manager = memory.manager
        caches = [manager.create() for _ in sequences]
        prompts = [prompt_length(len(tokens), self.prompt_share) for tokens in sequences]

        def step(places: list[tuple[int, int, int]]) -> None:
            """Compute tokens [start, stop) of sequences n and add their hidden states to `rows`."""
            if not places:
                return
            counts = [stop - start for _, start, stop in places]
            for (n, _, _), count in zip(places, counts, strict=True):
                manager.append(caches[n], count)
            batch = memory.batch([caches[n] for n, _, _ in places], counts)
            flat = [t for n, start, stop in places for t in sequences[n][start:stop]]
            hidden = self.decoder(torch.tensor(flat, device=self.device), batch)
            for (n, _, _), part in zip(places, hidden.split(counts), strict=True):
                rows[n].append(part)

        try:
            for cache, length in zip(caches, prompts, strict=True):
                manager.begin(cache, length)
            for first in range(0, max(map(len, sequences)), self.chunk):
                rows: dict[int, list[Tensor]] = {
                    n: [] for n, tokens in enumerate(sequences) if first < len(tokens)
                }
                step([(n, first, min(first + self.chunk, prompts[n]))
                      for n in rows if first < prompts[n]])  # fmt: skip
                for n in rows:
                    if first < prompts[n] <= first + self.chunk:
                        memory.settle(caches[n])
                for at in range(first, first + self.chunk):
                    live = [n for n in rows if prompts[n] <= at < len(sequences[n])]
                    step([(n, at, at + 1) for n in live])
                for n, parts in rows.items():
                    yield n, first, self.decoder.logits(torch.cat(parts)).float()
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
            self._memory = make_memory(
                self.decoder,
                kv,
                self.policy,
                cache_bytes=budget,
                max_model_len=max(lengths) if self.policy is None else sum(lengths),
                block_size=BLOCK_SIZE,
                prefix_caching=False,
                max_sequences=len(lengths),
            )
            self._blocks, self._sequences = blocks, len(lengths)
        return self._memory
