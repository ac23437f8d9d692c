"""Allocators: how many entries each layer keeps, given importance and a total for all layers.

Every allocator meets the total exactly (or the nearest that the bounds allow), and keeps every
layer within its bounds.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BISECTIONS = 60  # of an interval of floats


class Allocator(ABC):
    """Splits a budget of entries over layers."""

    @abstractmethod
    def allocate(
        self, importance: Tensor, total: int, lower: Sequence[int], upper: Sequence[int]
    ) -> list[int]:
        """Entries per layer.

        Args:
            importance: [L, N], not negative: what each token of a prompt is worth to each layer.
            total: entries of all layers, met exactly where sum(lower) <= total <= sum(upper).
            lower, upper: bounds per layer, 1 <= lower <= upper <= N.
        """


class PrefixAllocator(Allocator):
    """PrefixKV (arXiv 2412.03409, section 3): one information threshold p for all layers.

    Sort a layer's normalised importance in falling order; P_l[o] is the share that its first o
    tokens (a "prefix" of that order) hold. With o_l(p) = min{o : P_l[o] >= p}, the layers keep
    o_l(p) at the p where their sum is the budget. sum o_l(p) grows with p, so p is bisected. Slots
    that remain, because o_l jumps, go one by one to the layer that holds the smallest share. No
    other split of the same total has a larger min_l P_l[o_l].
    """

    def allocate(
        self, importance: Tensor, total: int, lower: Sequence[int], upper: Sequence[int]
    ) -> list[int]:
        shares = sorted_shares(importance)  # P, [L, N]
        low = torch.tensor(lower)
        high = torch.tensor(upper)

        def reaching(p: float) -> Tensor:
            wanted = torch.full((len(shares), 1), p, dtype=shares.dtype)
            return (torch.searchsorted(shares, wanted)[:, 0] + 1).clamp(low, high)

        below, above = 0.0, 1.0
        kept = reaching(1.0)
        if int(kept.sum()) > total:
            for _ in range(_BISECTIONS):
                middle = (below + above) / 2
                if int(reaching(middle).sum()) <= total:
                    below = middle
                else:
                    above = middle
            kept = reaching(below)
        counts: list[int] = kept.tolist()
        queue = [
            (float(shares[layer, count - 1]), count, layer)
            for layer, count in enumerate(counts)
            if count < upper[layer]
        ]
        heapq.heapify(queue)
        left = total - sum(counts)
        while left > 0 and queue:
            _, count, layer = heapq.heappop(queue)
            counts[layer] = count + 1
            left -= 1
            if count + 1 < upper[layer]:
                heapq.heappush(queue, (float(shares[layer, count]), count + 1, layer))
        return counts


def sorted_shares(importance: Tensor) -> Tensor:
    """P [L, N] in float64: the share of a layer's importance that its most important 1, 2 ... N
    tokens hold. A layer without any importance counts as flat."""
    wide = importance.double().cpu()
    wide = torch.where(wide.sum(1, keepdim=True) > 0, wide, torch.ones_like(wide))
    shares = wide.sort(dim=1, descending=True).values.cumsum(1)
    shares = (shares / shares[:, -1:]).clamp(max=1.0)
    shares[:, -1] = 1.0
    return shares


@dataclass(frozen=True)
class ProportionalAllocator(Allocator):
    """Entries in proportion to fixed weights per layer; importance plays no part. Equal weights
    (the default) are the uniform allocation."""

    weights: Sequence[float] = field(default=())

    def allocate(
        self, importance: Tensor, total: int, lower: Sequence[int], upper: Sequence[int]
    ) -> list[int]:
        weights = self.weights or [1.0] * len(lower)
        return proportional(weights, total, lower, upper)


class PyramidAllocator(Allocator):
    """PyramidKV's shape (arXiv 2406.02069): entries fall linearly from the first layer to the last.

    With m entries per layer on average the last keeps m / beta and the first 2 m - m / beta; beta
    is 20, as in its code.
    """

    beta = 20.0

    def allocate(
        self, importance: Tensor, total: int, lower: Sequence[int], upper: Sequence[int]
    ) -> list[int]:
        layers = len(lower)
        last, first = 1 / self.beta, 2 - 1 / self.beta
        step = (first - last) / max(1, layers - 1)
        weights = [first - step * layer for layer in range(layers)] if layers > 1 else [1.0]
        return proportional(weights, total, lower, upper)


def proportional(
    weights: Sequence[float], total: int, lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """Counts within the bounds that are proportional to `weights` where no bound is hit, and whose
    sum is `total` (or the nearest bound): what rounding down leaves goes to the largest remainders.
    """

    def wanted(t: float) -> list[float]:
        bounds = zip(weights, lower, upper, strict=True)
        return [min(max(weight * t, low), high) for weight, low, high in bounds]

    below, above = (
        0.0,
        max(
            high / weight if weight > 0 else 0.0
            for weight, high in zip(weights, upper, strict=True)
        ),
    )
    if sum(wanted(above)) > total:
        for _ in range(_BISECTIONS):
            middle = (below + above) / 2
            if sum(wanted(middle)) <= total:
                below = middle
            else:
                above = middle
    else:
        below = above
    exact = wanted(below)
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    left = total - sum(counts)
    while left > 0:
        open_layers = [layer for layer in by_remainder if counts[layer] < upper[layer]]
        if not open_layers:
            break
        for layer in open_layers[:left]:
            counts[layer] += 1
        left -= min(left, len(open_layers))
    return counts
