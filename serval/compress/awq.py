"""AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration
(arXiv 2306.00978).

Input channels that carry large activations matter most, so their weights are scaled up before
rounding and the activations down by as much (section 3.2). For ratios r = 0, 1/20, ..., 19/20:

    s = mean_t |X|^r,  s / sqrt(max s min s);   L(r) = || (Q(W diag(s)) diag(s)^-1 - W) X^T ||^2

and the best r is folded into what produces the channels: a norm's gain, the rows of up_proj, the
rows of v_proj where each query head has its own. Then, but for q_proj and k_proj, each group's
largest weight is shrunk by up to 50 % in steps of 5 % where that lowers the same error (`clip`).

Decided here: L is the error of the matrices that read the channels, summed, where the paper's code
takes the attention's or the MLP's output for some of them; the experts of a mixture share one s,
each weighted by its tokens. Codes are symmetric, as all of Serval's. X are up to 512 inputs spread
over the calibration text, from the float model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from serval.compress.block import Block, LinearInput, Matrix, Site
from serval.compress.recipe import Count, Recipe
from serval.compress.rtn import round_to_nearest
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.compress.statistics import Wanted

_NOT_CLIPPED = ("q_proj", "k_proj")


@dataclass
class AWQ(Recipe):
    """Parameters. steps: ratios tried. clip: search smaller scales as well. clip_steps: of 5 %."""

    steps: Count = 20
    clip: bool = True
    clip_steps: Count = 10

    statistics: ClassVar[frozenset[Wanted]] = frozenset({"range", "rows"})

    @torch.no_grad()
    def prepare_block(self, block: Block) -> dict[str, Any]:
        plan = {}
        for site in block.sites:
            quantised = any(matrix.scheme is not None for matrix in site.matrices)
            if site.place.foldable and site.statistics and quantised:
                ratio, scale, gain = self._best(site)
                if ratio:
                    site.fold(scale)
                plan[site.name] = {"ratio": ratio, "error": round(gain, 4)}
        return plan

    def _best(self, site: Site) -> tuple[float, Tensor, float]:
        """(ratio, scale [K], error relative to no scaling)."""
        mean = site.abs_mean
        assert mean is not None
        mean = mean.clamp(min=1e-4)
        best_ratio, best_scale, least, first = 0.0, torch.ones_like(mean), 0.0, 0.0
        for step in range(self.steps):
            ratio = step / self.steps
            scale = mean**ratio
            scale /= (scale.max() * scale.min()).sqrt()
            error = sum(_scaled_error(part, scale) for part in site.inputs)
            if step == 0:
                least = first = error
            elif error < least:
                best_ratio, best_scale, least = ratio, scale, error
        return best_ratio, best_scale, least / first if first else 1.0

    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        assert matrix.scheme is not None
        statistics = matrix.statistics
        rows = None if statistics is None else statistics.rows
        if not self.clip or rows is None or matrix.name.endswith(_NOT_CLIPPED):
            return round_to_nearest(matrix)
        scales = clipped_scales(
            matrix.weight, rows, matrix.scheme, matrix.scale_dtype, self.clip_steps
        )
        return quantize(matrix.weight, matrix.scheme, matrix.scale_dtype, scales)


def _scaled_error(part: LinearInput, scale: Tensor) -> float:
    """L of the quantised matrices that read one input, per calibration token."""
    statistics = part.statistics
    if statistics is None or statistics.rows is None or not statistics.count:
        return 0.0
    total = 0.0
    for matrix in part.matrices:
        if matrix.scheme is not None:
            weight = matrix.weight
            made = quantize(weight * scale, matrix.scheme, matrix.scale_dtype).dequantize()
            difference = made.div_(scale).sub_(weight)
            total += float((statistics.rows @ difference.T).square_().sum(dtype=torch.float64))
    return total * statistics.count / len(statistics.rows)


@torch.no_grad()
def clipped_scales(
    weight: Tensor,
    rows: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    steps: int = 10,
    shrink: float = 0.05,
) -> Tensor:
    """float32 [N, G]: of the scales 1, 1 - shrink, 1 - 2 shrink, ... times the full one, `steps` in
    all, the one that changes each group's part of the outputs of `rows` [S, K] least."""
    n, k = weight.shape
    groups = scheme.groups(k)
    inputs = rows.reshape(len(rows), groups, k // groups).transpose(0, 1)  # [G, S, g]
    small = k // groups <= len(rows)
    metric = inputs.transpose(1, 2) @ inputs if small else inputs.transpose(1, 2).contiguous()
    full = quantize(weight, scheme, scale_dtype).scales
    best, least = full, torch.full_like(full, torch.inf)
    for step in range(steps):
        tried = full * (1 - step * shrink)
        made = quantize(weight, replace(scheme, scales="float"), scale_dtype, tried)
        difference = (made.dequantize() - weight).view(n, groups, -1).transpose(0, 1)  # [G, N, g]
        product = difference @ metric
        error = (product * difference if small else product.square_()).sum(-1).T  # [N, G]
        better = error < least
        best = torch.where(better, made.scales, best)
        least = torch.where(better, error, least)
    return best
