"""Round to nearest: each weight to the closest code of its group's largest value.

The baseline of every method, and what they fall back to without calibration data. Equations in
`serval.compress.scheme`. Asymmetric codes and searched scales are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from serval.compress.block import Matrix
from serval.compress.recipe import Recipe
from serval.compress.scheme import QuantizedWeight, quantize


@dataclass
class RoundToNearest(Recipe):
    """No parameters, no calibration."""

    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        return round_to_nearest(matrix)


def round_to_nearest(matrix: Matrix) -> QuantizedWeight:
    """`matrix.weight` rounded to nearest in `matrix.scheme`."""
    assert matrix.scheme is not None
    return quantize(matrix.weight, matrix.scheme, matrix.scale_dtype)
