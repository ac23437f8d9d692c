"""Integer Scale: A Free Lunch for Faster Fine-grained Quantization of LLMs (arXiv 2405.14597).

Float group scales s[n, g] become integers I[n, g] times one factor r[n] per output channel, so that
a product stays in int32 across groups and is converted to float once per output:

    float scale    Y[t, n] = s_x[t] sum_g FLOAT(sum_{k in g} x q) s[n, g]
    integer scale  Y[t, n] = s_x[t] FLOAT(sum_g (sum_{k in g} x q) I[n, g]) r[n]

It is a step after any symmetric group-wise quantiser: codes are kept, a scale moves by at most
r / 2. The amplifier 1 / r is

    pow2_fixed      alpha = 1024 everywhere (the paper's recommendation)
    pow2_heuristic  the smallest power of two that lifts the matrix's smallest scale to 1 (paper)
    row_normalized  `largest` / max_g s[n, g], one per row (default: every row uses all its bits)

Decided here, where the paper checks maxima empirically: `kernels.w4a8.overflow` proves that int32
holds every result, and the amplifier of a row that fails is halved until it passes. If its largest
integer would then fall under 127 (in practice: 8-bit codes and more than 4,096 inputs) the matrix
keeps float scales, and the report says so. A scale that would round to 0 becomes 1 (the paper's
heuristic guarantees this, a fixed alpha does not). Row factors have 8 significant bits, so that
I * r is exact in float32 and an engine that reads float scales computes the same model. `refit`
rounds weights again with the new scales.

Sources: equations (1) and (2) and the heuristic are recalled; the normalised form is that of
vLLM's int8 Marlin kernel, per row instead of per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from serval.compress.scheme import QuantizedWeight
from serval.errors import ConfigError
from serval.kernels.w4a8.overflow import INT32_MAX, accumulator_bound

Mode = Literal["row_normalized", "pow2_fixed", "pow2_heuristic"]
Reround = Callable[[Tensor], Tensor]

INT16_MAX = 32767
COARSEST = 127  # the largest integer of a row whose amplifier had to be halved is at least this


@dataclass(frozen=True)
class IntegerScaleReport:
    """What became of one matrix.

    bound: the largest possible magnitude of an accumulator, at most 2^31 - 1. smallest: the
    smallest |I|; below 8 a scale may be off by more than 6 %. lifted: scales that would have been 0
    and became 1. halved: rows whose amplifier was halved. kept_float: why scales stayed float, or
    "".
    """

    bound: int = 0
    smallest: int = 0
    lifted: int = 0
    halved: int = 0
    kept_float: str = ""


@dataclass(frozen=True)
class IntegerScale:
    """The conversion and its parameters.

    mode: how the amplifier is chosen. alpha: of pow2_fixed, a power of two. largest: the largest
    integer of row_normalized, 127 to 32767. refit: compute codes again from the original weights
    with the new scales. Raises ConfigError.
    """

    mode: Mode = "row_normalized"
    alpha: int = 1024
    largest: int = 1023
    refit: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("row_normalized", "pow2_fixed", "pow2_heuristic"):
            raise ConfigError(
                f"integer scale mode {self.mode!r}: expected row_normalized, pow2_fixed or "
                "pow2_heuristic"
            )
        if self.alpha < 1 or self.alpha & (self.alpha - 1):
            raise ConfigError(f"integer scale alpha={self.alpha}: expected a power of two")
        if not COARSEST <= self.largest <= INT16_MAX:
            raise ConfigError(
                f"integer scale largest={self.largest}: expected {COARSEST} to {INT16_MAX}"
            )

    def apply(
        self, weight: QuantizedWeight, reround: Reround | None = None
    ) -> tuple[QuantizedWeight, IntegerScaleReport]:
        """Convert `weight`; it is not modified.

        reround: codes int8 [N, K] for given scales [N, G], needed by `refit` (rounding to nearest,
        or GPTQ with those scales frozen). A matrix with one scale per output channel, or one that
        cannot be certified, comes back with float scales. Raises ConfigError when refit lacks
        `reround`, ValueError for scales that are not finite.
        """
        if self.refit and reround is None:
            raise ConfigError("refit needs the original weights; pass reround, or refit=False")
        floats = replace(weight, scheme=replace(weight.scheme, scales="float"))
        if weight.scheme.group_size is None:
            return floats, IntegerScaleReport(kept_float="one scale per output channel")
        if weight.zero_points is not None:
            return floats, IntegerScaleReport(kept_float="codes have zero points")
        if not torch.isfinite(weight.scales).all():
            raise ValueError("integer scales need finite float scales")
        scales, factor = weight.scales.double(), self._row_factor(weight)
        codes, halved = weight.codes, torch.zeros_like(factor, dtype=torch.bool)
        while True:
            integer, lifted = _integers(scales, factor)
            if self.refit and reround is not None:
                codes = reround((integer * factor[:, None]).float())
            tops = integer.abs().amax(1)
            bound = accumulator_bound(codes, integer)
            wrong = (bound > INT32_MAX) | (tops > INT16_MAX)
            if not wrong.any():
                break
            if (tops[wrong] < 2 * COARSEST).any():
                reason = (
                    f"int32 could overflow ({int(wrong.sum())} of {len(wrong)} rows) unless scales "
                    "had fewer than 7 bits"
                )
                return floats, IntegerScaleReport(kept_float=reason)
            factor = torch.where(wrong, factor * 2, factor)
            halved |= wrong
        report = IntegerScaleReport(
            bound=int(bound.max()),
            smallest=int(integer.abs().min()),
            lifted=int(lifted.sum()),
            halved=int(halved.sum()),
        )
        converted = replace(
            weight,
            codes=codes,
            scales=(integer * factor[:, None]).float(),
            scheme=replace(weight.scheme, scales="integer"),
            scale_dtype=torch.float32,
            integer=integer.to(torch.int16),
            row_factor=factor.float(),
        )
        return converted, report

    def _row_factor(self, weight: QuantizedWeight) -> Tensor:
        """r [N] float64, one over the amplifier, with at most 8 significant bits."""
        rows, groups = weight.scales.shape
        size = weight.scales.double().abs()
        if self.mode == "pow2_fixed":
            return torch.full((rows,), 1.0 / self.alpha, dtype=torch.float64)
        if self.mode == "pow2_heuristic":
            # a group of zero codes multiplies nothing: its scale must not set the amplifier
            used = weight.codes.view(rows, groups, -1).ne(0).any(-1) & (size > 0)
            least = float(size[used].min()) if used.any() else 1.0
            exponent = max(0, math.ceil(-math.log2(least)))
            return torch.full((rows,), 2.0**-exponent, dtype=torch.float64)
        top = size.amax(1)
        top = torch.where(top > 0, top, 1.0)
        wanted = top / self.largest
        unit = torch.exp2(wanted.log2().floor() - 7)
        return (wanted / unit).ceil() * unit  # 8 bits, rounded up: I <= largest


def _integers(scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(I float64 [N, G] with the scales' signs, which of them were lifted from 0 to 1)."""
    exact = (scales / factor[:, None]).round()
    lifted = (exact == 0) & (scales != 0)
    return torch.where(lifted, scales.sign(), exact), lifted
