"""Scorers: what each token of a prompt is worth to a layer, summed over the chunks of its prefill.

A scorer never sees an attention matrix: it gets the queries of a chunk and the keys so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from serval import kernels


class Scorer(ABC):
    """Non-negative importance of the keys, from the queries of one chunk. Importances of chunks add
    up. reads_attention: whether the queries matter. queries: how many of a prompt's queries count,
    the last ones; 0: all."""

    reads_attention: ClassVar[bool] = True
    queries: int = 0

    def skipped(self, first: int, count: int, length: int) -> int:
        """How many rows of a chunk of `count` from `first` on do not count in a prompt of `length`
        tokens."""
        if not self.queries:
            return 0
        return min(count, max(0, length - self.queries - first))

    @abstractmethod
    def score(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        first: int,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """float [m]: what this chunk adds to the importance of the first m keys.

        q: [n, H, D], queries at positions first.., rotary applied. k: [first + n, Hkv, D]. scale,
        window, sinks: as of `Memory.attend`.
        """


@dataclass(frozen=True)
class ReceivedAttention(Scorer):
    """The attention a key receives from all queries, mean over query heads (H2O, arXiv 2306.14048;
    PrefixKV, arXiv 2412.03409, section 3):

        I[n] = sum_i mean_h A[h, i, n]

    Early tokens are seen by more queries and are not corrected for it. Computed blockwise from q, k
    and the rows' log-sum-exp, in O(N) memory. With `queries`, i runs over the last ones only, which
    are those that ask (the observation window of SnapKV, arXiv 2404.14469).
    """

    queries: int = 0

    def score(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        first: int,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return kernels.received_mass(q, k, scale, first=first, window=window, sinks=sinks)[0]


class Recency(Scorer):
    """Later tokens are worth more: the local window, and with protected first tokens the selection
    of StreamingLLM (arXiv 2309.17453), without its change of positions."""

    reads_attention = False

    def score(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        first: int,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        added = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
        added[first:] = torch.arange(first + 1, k.shape[0] + 1, device=k.device)
        return added
