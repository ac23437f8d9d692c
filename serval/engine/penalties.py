"""Repetition, presence and frequency penalties; their cost follows the text, not the vocabulary.

For each token that occurred: l' = l / r if l > 0 else l * r (prompt and output, arXiv 1909.05858),
then l' - presence - frequency * count (output only).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class TokenCounts:
    """The distinct tokens of a sequence and how often each was generated."""

    def __init__(self, prompt_token_ids: list[int]) -> None:
        ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._index = {token: i for i, token in enumerate(ids.tolist())}
        self._ids = np.concatenate([ids, np.zeros(64, dtype=np.int64)])
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self.size = len(ids)

    def copy(self) -> TokenCounts:
        """An independent copy."""
        other = TokenCounts.__new__(TokenCounts)
        other._index, other.size = dict(self._index), self.size
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    def add(self, token: int) -> None:
        """Count one generated token."""
        at = self._index.get(token)
        if at is None:
            if self.size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            at = self._index[token] = self.size
            self._ids[at], self._counts[at] = token, 0
            self.size += 1
        self._counts[at] += 1

    def apply(self, row: Tensor, repetition: float, presence: float, frequency: float) -> None:
        """Penalise one row of logits [V] in place."""
        ids = torch.from_numpy(self._ids[: self.size]).to(row.device)
        values = row[ids]
        if repetition != 1.0:
            values = torch.where(values > 0, values / repetition, values * repetition)
        if presence != 0.0 or frequency != 0.0:
            counts = torch.from_numpy(self._counts[: self.size]).to(row.device)
            values = values - frequency * counts - presence * (counts > 0)
        row[ids] = values
