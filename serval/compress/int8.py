"""W8A8: int8 weights per output channel and int8 activations per token, without calibration.

The vector-wise scheme of LLM.int8() (arXiv 2208.07339, section 3.1) without its outlier
decomposition, rounded as compressed-tensors does:

    s_n = max_k |W[n, k]| / 127.5        Q[n, k] = clamp(round(W[n, k] / s_n), -128, 127)
    y[t, n] = sx_t s_n sum_k X[t, k] Q[n, k],   sx_t = max_k |x[t, k]| / 127

Round to nearest with another default scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from serval.compress.rtn import RoundToNearest
from serval.compress.scheme import WeightScheme


@dataclass
class Int8(RoundToNearest):
    """No parameters, no calibration."""

    default_scheme: ClassVar[WeightScheme] = WeightScheme(bits=8)
