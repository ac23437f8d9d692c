"""Proof that an integer-scale product fits its int32 accumulator, whatever the activations.

Integer Scale (arXiv 2405.14597) sums everything in int32. With activations of at most 127,

    |sum_g I[n, g] sum_{k in g} x[t, k] q[n, k]|
        <=  127 sum_g |I[n, g]| sum_{k in g} |q[n, k]|  =  B_n

and x = 127 sign(I q) attains it: B_n <= 2^31 - 1 is exact, not an estimate. Sums in between may
wrap; int32 addition is exact modulo 2^32, so only the final value counts. A kernel that works on
multiples of the codes (16 q in the high nibble) must pass that `factor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
LARGEST_ACTIVATION = 127


def accumulator_bound(codes: Tensor, integer: Tensor | None = None, factor: int = 1) -> Tensor:
    """B_n [N] int64 of codes int8 [N, K] and integer scales [N, G] (None: all one), G dividing K.

    factor: what the kernel multiplies codes by. Raises ValueError for shapes that do not fit.
    """
    rows, columns = codes.shape
    groups = 1 if integer is None else integer.shape[1]
    if columns % groups or (integer is not None and integer.shape[0] != rows):
        raise ValueError(
            f"codes {tuple(codes.shape)} and integer scales "
            f"{None if integer is None else tuple(integer.shape)}: expected [N, K] and [N, G] with "
            "G dividing K"
        )
    # int16 magnitudes (|-128| needs nine bits), summed in int64
    sums = codes.view(rows, groups, columns // groups).to(torch.int16).abs_()
    total = sums.sum(-1, dtype=torch.int64)
    if integer is not None:
        total = total * integer.to(torch.int64).abs()
    return LARGEST_ACTIVATION * factor * total.sum(-1)


def fits_int32(codes: Tensor, integer: Tensor | None = None, factor: int = 1) -> bool:
    """Whether no activations in [-127, 127] can overflow the accumulator of any row."""
    bound = accumulator_bound(codes, integer, factor)
    return bound.numel() == 0 or int(bound.max()) <= INT32_MAX
