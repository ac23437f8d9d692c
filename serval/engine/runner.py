"""Runs one step: scheduled work -> packed batch -> decoder -> logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serval.cache.memory import PagedMemory
from serval.engine.recorded import RecordedSteps
from serval.engine.request import Logprob
from serval.engine.sampler import prompt_logprobs
from serval.engine.scheduler import Work
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder

_LOGITS_SLICE = 256  # rows of prompt logits that exist at once


class Runner:
    """Builds batches in buffers that are made once; a step allocates almost nothing.

    Args:
        decoder: the model, in eval mode.
        memory: its paged cache.
        max_batch_tokens, max_sequences: the largest step.
        device: where the model lives.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: PagedMemory,
        max_batch_tokens: int,
        max_sequences: int,
        device: torch.device,
    ) -> None:
        self.decoder, self.memory, self.device = decoder, memory, device
        self._tokens = np.zeros(max_batch_tokens, dtype=np.int64)
        self._positions = np.zeros(max_batch_tokens, dtype=np.int64)
        self._context_lens = np.zeros(max_sequences, dtype=np.int32)
        self._query_starts = np.zeros(max_sequences + 1, dtype=np.int32)
        self.recorded = RecordedSteps(decoder, memory) if device.type == "cpu" else None
        self._iota = np.arange(max(max_batch_tokens, max_sequences), dtype=np.int64)

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Tensor:
        """Compute the step. Returns float32 logits [R, V], a row per work item that samples.

        Prompt log-probabilities that a request asked for are appended to it on the way.
        """
        count, rows = len(work), 0
        for n, item in enumerate(work):
            stop = rows + item.count
            self._tokens[rows:stop] = item.sequence.tokens[item.start : item.start + item.count]
            rows = stop
            self._query_starts[n + 1] = rows
            self._context_lens[n] = item.start + item.count
        starts, lens = self._query_starts[: count + 1], self._context_lens[:count]
        if rows == count:
            owner = self._iota[:count]
            self._positions[:rows] = lens - 1
        else:
            owner = np.repeat(self._iota[:count], starts[1:] - starts[:-1])
            self._positions[:rows] = self._iota[:rows] + (lens - starts[1:])[owner]
        context_lens, query_starts = self._tensor(lens), self._tensor(starts)
        caches, counts = [item.sequence.cache for item in work], [item.count for item in work]
        self.memory.start(caches, counts, self._positions[:rows], owner, lens, query_starts)
        sampled = [int(starts[n + 1]) - 1 for n, item in enumerate(work) if item.samples]
        scored = [n for n, item in enumerate(work) if item.sequence.wants_prompt_logprobs]
        logits_rows = None
        if len(sampled) != rows:
            logits_rows = torch.tensor(sampled, dtype=torch.int64, device=self.device)
        adapters = [item.sequence.request.adapter for item in work]
        batch = PackedBatch(
            positions=self._tensor(self._positions[:rows]),
            query_starts=query_starts,
            context_lens=context_lens,
            memory=self.memory,
            logits_rows=None if scored else logits_rows,
            adapters=adapters if any(adapters) else None,
        )
        tokens = self._tensor(self._tokens[:rows])
        if self.recorded is not None and rows == count == len(sampled) and not scored:
            logits = self.recorded.run(tokens, batch)
            if logits is not None:
                return logits
        hidden = self.decoder(tokens, batch)
        for n in scored:
            self._prompt_logprobs(work[n], hidden[int(starts[n]) : int(starts[n + 1])])
        if scored and logits_rows is not None:
            hidden = hidden[logits_rows]
        return self.decoder.logits(hidden).float()

    def _tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def _prompt_logprobs(self, item: Work, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that this chunk's rows [count, D] predict."""
        sequence = item.sequence
        found: list[dict[int, Logprob] | None] | None = sequence.request.prompt_logprobs
        assert found is not None
        first = len(found)  # the prompt token to predict next; row first - 1 predicts it
        last = min(item.start + item.count + 1, sequence.num_prompt)
        for low in range(first, last, _LOGITS_SLICE):
            high = min(low + _LOGITS_SLICE, last)
            rows = hidden[low - 1 - item.start : high - 1 - item.start]
            logits = self.decoder.logits(rows).float()
            targets = sequence.tokens[low:high]
            found.extend(prompt_logprobs(logits, targets, sequence.params.prompt_logprobs or 0))
