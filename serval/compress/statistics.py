"""What calibration remembers of the inputs of a linear."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Wanted = Literal["range", "hessian", "rows"]

MAX_ROWS = 512
_STRIPE = 1024


@dataclass
class InputStatistics:
    """Running statistics of inputs x [T, K]; `wanted` says which of them are kept.

    count: rows seen. "range": low, high: float32 [K], the smallest and largest value of each
    channel, and abs_sum: float64 [K], the sum of absolute values. "hessian": float32 [K, K], the
    sum of x^T x (GPTQ's H up to a factor). "rows": float32 [S, K], between MAX_ROWS / 2 and
    MAX_ROWS inputs spread evenly over those seen (all of them while there are fewer).
    """

    width: int
    wanted: frozenset[Wanted]
    count: int = 0
    low: Tensor | None = None
    high: Tensor | None = None
    abs_sum: Tensor | None = None
    hessian: Tensor | None = None
    rows: Tensor | None = None
    _stride: int = 1

    def update(self, x: Tensor) -> None:
        """Take in x [..., K]."""
        x = x.detach().reshape(-1, self.width).float()
        if not len(x):
            return
        if "range" in self.wanted:
            low, high = x.aminmax(dim=0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
            total = x.abs().sum(dim=0, dtype=torch.float64)
            self.abs_sum = total if self.abs_sum is None else self.abs_sum + total
        if "hessian" in self.wanted:
            if self.hessian is None:
                self.hessian = torch.zeros(self.width, self.width, device=x.device)
            _add_gram(self.hessian, x)
        if "rows" in self.wanted:
            self._keep_rows(x)
        self.count += len(x)

    def _keep_rows(self, x: Tensor) -> None:
        """Every `_stride`-th row of all that were seen; the stride doubles when they get many."""
        first = -self.count % self._stride
        kept = x[first :: self._stride].clone()
        self.rows = kept if self.rows is None else torch.cat([self.rows, kept])
        while len(self.rows) > MAX_ROWS:
            self.rows = self.rows[::2].clone()
            self._stride *= 2

    @property
    def abs_max(self) -> Tensor:
        """float32 [K], the largest absolute value of each channel; zeros when nothing was seen."""
        if self.low is None or self.high is None:
            return torch.zeros(self.width)
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def abs_mean(self) -> Tensor:
        """float32 [K], the mean absolute value of each channel; zeros when nothing was seen."""
        if self.abs_sum is None:
            return torch.zeros(self.width)
        return (self.abs_sum / self.count).float()

    def rescale(self, scale: Tensor) -> None:
        """What would have been seen had the inputs been x / scale; scale: [K], positive."""
        if self.low is not None and self.high is not None and self.abs_sum is not None:
            self.low, self.high = self.low / scale, self.high / scale
            self.abs_sum = self.abs_sum / scale.double()
        if self.hessian is not None:
            self.hessian.div_(scale).div_(scale.unsqueeze(1))
        if self.rows is not None:
            self.rows.div_(scale)


def _add_gram(total: Tensor, x: Tensor) -> None:
    """total += x^T x, in stripes of columns: what lies above the diagonal is mirrored, so half of
    it is computed."""
    for start in range(0, len(total), _STRIPE):
        stop = min(start + _STRIPE, len(total))
        made = x[:, start:].T @ x[:, start:stop]
        total[start:, start:stop] += made
        total[start:stop, stop:] += made[stop - start :].T


def merged_abs_max(parts: Iterable[InputStatistics]) -> Tensor:
    """float32 [K], the largest absolute value of each channel over several inputs."""
    return torch.stack([part.abs_max for part in parts]).amax(0)


def merged_abs_mean(parts: Iterable[InputStatistics]) -> Tensor:
    """float32 [K], the mean absolute value of each channel over all rows of several inputs."""
    parts = list(parts)
    total = sum(part.count for part in parts)
    weighted = torch.stack([part.abs_mean * (part.count / max(total, 1)) for part in parts])
    return weighted.sum(0)
