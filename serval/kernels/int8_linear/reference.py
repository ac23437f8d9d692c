"""Linear layer with int8 weights (per output channel) and int8 activations (per token), in plain
PyTorch.

`y[t, n] = x_scale[t] * scale[n] * sum_k x_int8[t, k] * w_int8[n, k] + bias[n]`, the W8A8 scheme of
LLM.int8() (arXiv:2208.07339) and SmoothQuant (arXiv:2211.10438): symmetric, x_scale = max|x| / 127.
"""

from __future__ import annotations

from torch import Tensor

from serval.kernels.cache_write.reference import quantize_rows


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight int8 [N, K], scale float32 [N], bias [N] -> float32 [..., N] (x's dtype if
    narrower).

    Integer sums are exact: products in float64, whose 53 bits hold any sum up to K = 2^38.
    """
    codes, x_scale = quantize_rows(x)
    total = (codes.double() @ weight.double().T).float()
    out = total * (x_scale[..., None] * scale)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)
