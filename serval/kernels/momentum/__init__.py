"""What Muon and MONA do element by element, in one pass over memory each.

Floor per float32 element: `momentum_update` moves 16 bytes, with MONA's mean 24 (20 when it is
bfloat16), `descend` 12. float32 on the CPU runs in C++, with the arithmetic of `torch.lerp`;
anything else in the reference. Nothing here writes to a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.momentum import reference
from serval.kernels.momentum.reference import round_stochastically

__all__ = ["descend", "momentum_update", "round_stochastically"]

_MOMENTUM = jit.Kernel("momentum", "momentum_f32", "pppp l ff i fff l ii")
_DESCEND = jit.Kernel("momentum", "descend_f32", "pp l ff i")


def _fits(*tensors: Tensor) -> bool:
    return all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def momentum_update(
    grad: Tensor,
    momentum: Tensor,
    out: Tensor,
    *,
    mu: float,
    nesterov: bool,
    mean: Tensor | None = None,
    beta: float = 0.0,
    weight: float = 0.0,
    correction: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Update `momentum` in place from `grad` (all of one shape) and write the direction to `out`.

    M <- mu M + (1 - mu) G; out = (1 - mu) G + mu M with nesterov, else M. With `mean` (MONA's m,
    float32 or bfloat16) G is replaced by G + weight (G - correction m), and then
    m <- beta m + (1 - beta) G from the gradient as it was given; a bfloat16 m is rounded
    stochastically with `seed`. Returns `out`.
    """
    full = mean is None or mean.dtype != torch.bfloat16
    others = [mean] if mean is not None and full else []
    function = _MOMENTUM.get() if _fits(grad, momentum, out, *others) else None
    if function is None or not (mean is None or mean.is_contiguous()):
        if mean is not None:
            grad = reference.accelerate(grad, mean, weight, correction, beta, seed)
        return reference.momentum_update(grad, momentum, out, mu, nesterov)
    function(
        grad.data_ptr(), momentum.data_ptr(), None if mean is None else mean.data_ptr(),
        out.data_ptr(), grad.numel(), 1 - mu, mu, nesterov, weight, correction, 1 - beta,
        seed & 0x7FFFFFFF, not full, torch.get_num_threads(),
    )  # fmt: skip
    return out


def descend(parameter: Tensor, update: Tensor, *, decay: float, scale: float) -> None:
    """parameter <- decay * parameter - scale * update, in place; both of one shape."""
    function = _DESCEND.get() if _fits(parameter, update) else None
    if function is None:
        reference.descend(parameter, update, decay, scale)
        return
    function(
        parameter.data_ptr(), update.data_ptr(), parameter.numel(), decay, scale,
        torch.get_num_threads(),
    )  # fmt: skip
