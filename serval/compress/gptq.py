"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(arXiv 2210.17323).

Codes of a matrix W [N, K] that keep its outputs on calibration inputs X [T, K]:

    minimise ||(W - Q) X^T||^2 row by row, H = X^T X + damping mean(diag H) I   (section 3)
    column by column: e = (w_i - quant(w_i)) / U_ii, then w_j -= e U_ij for the columns j > i still
    in float, where U is upper triangular with U^T U = H^-1                     (algorithm 1)

Columns are taken in blocks whose effect on later columns is one matrix product (lazy batches), so
the result does not depend on the block size but for rounding. A group's scale is taken from its
weights when its first column is reached (`static_groups=False`), or from the original weights.
`act_order` takes the columns with the largest H_ii first; with static groups the codes stay in
place, without them the column order is stored (`weight_g_idx`).

Decided here, where the paper is silent: U comes from one Cholesky factor of H with its axes
reversed and one triangular inverse (2/3 K^3 operations in all); when that fails in float32 it is
tried in float64, then with ten times the damping, up to 1, and then H = I (rounding to nearest). A
channel that is zero in all calibration inputs is rounded to nearest, where the paper's code sets
its weights to zero.
`search="mse"` shrinks each scale by 0 to 79 % to minimise sum |error|^2.4, as that code does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from serval.compress.block import Matrix
from serval.compress.recipe import Count, Positive, Recipe
from serval.compress.rtn import round_to_nearest
from serval.compress.scheme import QuantizedWeight, WeightScheme
from serval.compress.statistics import InputStatistics, Wanted
from serval.errors import ConfigError

Search = Literal["max", "mse"]

_COLUMNS = 8
_INVERTED_AT_ONCE = 256


@dataclass
class GPTQ(Recipe):
    """Parameters. damping: fraction of H's mean diagonal added to it. act_order: largest H_ii
    first. static_groups: group scales from the original weights. search: "max" takes a group's
    largest weight, "mse" searches a smaller scale. block: columns of one lazy batch.
    """

    damping: Positive = 0.01
    act_order: bool = True
    static_groups: bool = True
    search: Search = "max"
    block: Count = 128

    statistics: ClassVar[frozenset[Wanted]] = frozenset({"hessian"})
    inputs: ClassVar[Literal["float", "quantized"]] = "quantized"
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._factor: tuple[InputStatistics, Factor] | None = None

    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        assert matrix.scheme is not None
        statistics = matrix.statistics
        if statistics is None or statistics.hessian is None:
            return round_to_nearest(matrix)
        return gptq(
            matrix.weight,
            self.factor(statistics),
            matrix.scheme,
            matrix.scale_dtype,
            static_groups=self.static_groups,
            search=self.search,
            block=self.block,
        )

    def reround(self, matrix: Matrix, scales: Tensor) -> Tensor:
        statistics = matrix.statistics
        if statistics is None or statistics.hessian is None:
            return super().reround(matrix, scales)
        if self.act_order and not self.static_groups:
            raise ConfigError("scales can be refitted with static_groups=true only")
        assert matrix.scheme is not None
        factor = self.factor(statistics)
        return gptq(matrix.weight, factor, matrix.scheme, scales=scales, block=self.block).codes

    def factor(self, statistics: InputStatistics) -> Factor:
        """The factor for an input, kept until another one is asked for: q, k and v share it."""
        if self._factor is None or self._factor[0] is not statistics:
            assert statistics.hessian is not None
            self._factor = None  # frees the last one first
            made = Factor.of(statistics.hessian, self.damping, act_order=self.act_order)
            self._factor = (statistics, made)
        return self._factor[1]


@dataclass(frozen=True)
class Factor:
    """upper: float32 [K, K], U of the columns in the order they are taken. order: int64 [K], the
    column taken at each step; None: from left to right. damping: what it took."""

    upper: Tensor
    order: Tensor | None
    damping: float

    @classmethod
    def of(cls, hessian: Tensor, damping: float = 0.01, *, act_order: bool = False) -> Factor:
        """Of H [K, K], which is not changed."""
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True) if act_order else None
        reached = diagonal[diagonal > 0]
        mean = float(reached.double().mean()) if len(reached) else 1.0
        given = max(damping, 1e-8)
        while given <= 1.0:
            for dtype in (torch.float32, torch.float64):
                upper = _upper(hessian, order, given * mean, mean, dtype)
                if upper is not None:
                    return cls(upper.float(), order, given)
            given *= 10
        return cls(torch.eye(len(hessian)), order, float("inf"))


def _upper(
    hessian: Tensor, order: Tensor | None, damping: float, dead: float, dtype: torch.dtype
) -> Tensor | None:
    """U with U^T U = (H + damping I)^-1, or None when H is not positive definite in `dtype`.

    With J the reversal of axes and J H J = L L^T, R = J L J is upper and H = R R^T, so U = R^-1.
    """
    taken = torch.arange(len(hessian), device=hessian.device) if order is None else order
    back = taken.flip(0)
    h = hessian[back][:, back].to(dtype)
    diagonal = h.diagonal()
    diagonal.add_((diagonal == 0).to(dtype) * dead).add_(damping)
    lower, failed = torch.linalg.cholesky_ex(h)
    del h
    if failed or not torch.isfinite(lower.diagonal()).all():
        return None
    upper = lower.flip(0, 1)
    del lower
    _invert_upper(upper)
    return upper if torch.isfinite(upper.diagonal()).all() else None


def _invert_upper(matrix: Tensor) -> None:
    """Invert an upper triangular matrix in place:
    [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1], a third of the work of solving for I."""
    size = len(matrix)
    if size <= _INVERTED_AT_ONCE:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, eye, upper=True))
        return
    half = size // 2
    a, b, c = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    right = torch.linalg.solve_triangular(c, b, upper=True, left=False)
    b.copy_(torch.linalg.solve_triangular(a, right, upper=True).neg_())
    _invert_upper(a)
    _invert_upper(c)


@torch.no_grad()
def gptq(
    weight: Tensor,
    factor: Factor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    *,
    scales: Tensor | None = None,
    static_groups: bool = True,
    search: Search = "max",
    block: int = 128,
) -> QuantizedWeight:
    """Quantise `weight` [N, K], which is not changed.

    scales: float32 [N, G] to use as they are (learnt clipping), instead of finding them. Raises
    ConfigError when groups do not divide K.
    """
    rows, columns = weight.shape
    size = columns // scheme.groups(columns)
    order, upper = factor.order, factor.upper
    w = weight.detach().float()
    stored_order = None
    if scales is not None:
        scales = rounded_scales(scales.float(), scale_dtype)
    elif static_groups or scheme.group_size is None:
        scales = find_scales(w, scheme, scale_dtype, search)
    elif order is not None:
        stored_order = order
    w = (w if order is None else w[:, order]).T.contiguous()  # [K, N]: columns are contiguous
    group = torch.arange(columns) // size
    if order is not None and stored_order is None:
        group = group[order]
    found = None if scales is None else scales.T.contiguous()  # [G, N]
    made = torch.empty(columns // size, rows) if found is None else found
    codes = torch.empty(columns, rows, dtype=torch.int8)
    step = block if found is not None else min(block, size)
    start = 0
    while start < columns:
        stop = min(start + step, columns)
        if found is None:
            stop = min(stop, (start // size + 1) * size)  # a group's scale needs all updates
            if start % size == 0:
                piece = w[start : start + size].T
                whole = replace(scheme, group_size=None, scales="float")
                made[start // size] = find_scales(piece, whole, scale_dtype, search)[:, 0]
        errors = _quantize_block(w, codes, upper, made, group, scheme, start, stop)
        if stop < columns:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    codes = codes.T
    if order is not None and stored_order is None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    return QuantizedWeight(
        codes.contiguous(), made.T.contiguous(), scheme, scale_dtype, order=stored_order
    )


def _quantize_block(
    w: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    group: Tensor,
    scheme: WeightScheme,
    start: int,
    stop: int,
) -> Tensor:
    """Columns start to stop, each spreading its error over those after it in the block. Returns
    the errors divided by U_ii, [stop - start, N]."""
    errors = torch.empty(stop - start, w.shape[1])
    for first in range(start, stop, _COLUMNS):  # few columns at a time stay in the cache
        last = min(first + _COLUMNS, stop)
        part = errors[first - start : last - start]
        _quantize_columns(
            w[first:last],
            codes[first:last],
            upper[first:last, first:last],
            scales,
            group[first:last].tolist(),
            scheme,
            part,
        )
        if last < stop:
            w[last:stop].addmm_(upper[first:last, last:stop].T, part, alpha=-1)
    return errors


def _quantize_columns(
    w: Tensor,
    codes: Tensor,
    upper: Tensor,
    scales: Tensor,
    groups: list[int],
    scheme: WeightScheme,
    errors: Tensor,
) -> None:
    """A few columns w [C, N], one after the other; fills codes and errors [C, N]."""
    for i, diagonal in enumerate(upper.diagonal().tolist()):
        scale = scales[groups[i]]
        code = (w[i] / scale).round_().clamp_(scheme.lowest, scheme.highest)
        codes[i] = code
        torch.sub(w[i], code.mul_(scale), out=errors[i]).div_(diagonal)
        if i + 1 < len(w):
            w[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)


def find_scales(
    weight: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, search: Search = "max"
) -> Tensor:
    """float32 [N, G] for `weight` [N, K], rounded to `scale_dtype`."""
    rows, columns = weight.shape
    grouped = weight.detach().float().reshape(rows, scheme.groups(columns), -1)
    full = grouped.abs().amax(-1) / (scheme.highest + 0.5)
    if search == "max":
        return rounded_scales(full, scale_dtype)
    best = rounded_scales(full, scale_dtype)
    least = _error(grouped, best, scheme)
    for i in range(1, 80):
        tried = rounded_scales(full * (1 - i / 100), scale_dtype)
        error = _error(grouped, tried, scheme)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best


def _error(grouped: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    """sum |error|^2.4 of each group [N, G]."""
    wide = scales.unsqueeze(-1)
    codes = (grouped / wide).round_().clamp_(scheme.lowest, scheme.highest)
    return codes.mul_(wide).sub_(grouped).abs_().pow_(2.4).sum(-1)


def rounded_scales(scales: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """float32 of the values that `scale_dtype` can store; zeros become its epsilon."""
    scales = scales.to(scale_dtype).float()
    return torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
