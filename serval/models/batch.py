"""The packed batch: all sequences of a step end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from serval.models.memory import CausalMemory, Memory


@dataclass
class PackedBatch:
    """One step's sequences, laid end to end along the token axis.

    positions: int64 [T], rotary position of each row. query_starts: int32 [N + 1], rows
    query_starts[n]:query_starts[n+1] belong to sequence n. context_lens: int32 [N], tokens of
    sequence n known after this step. memory: what attention layers talk to. logits_rows: int64 [R],
    the rows whose logits are wanted (None: all); `Decoder.forward` returns these only. adapters:
    per sequence, the number of its LoRA adapter from 1, or 0 for none (None: no sequence has one);
    read by `serval.adapt.serving`.
    """

    positions: Tensor
    query_starts: Tensor
    context_lens: Tensor
    memory: Memory
    logits_rows: Tensor | None = None
    adapters: list[int] | None = None

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> PackedBatch:
        """A training batch: documents of `lengths` tokens, each seeing only itself."""
        starts = [0, *accumulate(lengths)]
        positions = torch.cat([torch.arange(n) for n in lengths])
        return cls(
            positions=positions.to(device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(list(lengths), dtype=torch.int32, device=device),
            memory=CausalMemory(starts),
        )
