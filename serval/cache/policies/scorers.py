"""Scorers: what each token of a prompt is worth to a layer, summed over the chunks of its prefill.

A scorer never sees an attention matrix: it gets the queries of a chunk and the keys so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from serval import kernels


class Scorer(ABC):
    """Non-negative importance of the keys, from the queries of one chunk. Importances of chunks add
    up. reads_attention: whether the queries matter."""

    reads_attention: ClassVar[bool] = True

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


class ReceivedAttention(Scorer):
    """The attention a key receives from all queries, mean over query heads (H2O, arXiv 2306.14048;
    PrefixKV, arXiv 2412.03409, section 3):

        I[n] = sum_i mean_h A[h, i, n]

    Early tokens are seen by more queries and are not corrected for it. Computed blockwise from q, k
    and the rows' log-sum-exp, in O(N) memory.
    """

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
