"""RMSNorm and RMSNorm fused with the residual addition, with gradients.

Floor: `rms_norm` reads and writes each element once (8 bytes per float32 element); `add_rms_norm`
reads two and writes two (16 bytes). Statistics in float32. float32 and bfloat16 on the CPU run in
C++, anything else in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.norm import reference

_FORWARD = {
    n: jit.Kernel("norm", f"rms_norm_{n}", "ppppp ll f i") for n in ("f32", "bf16", "mixed")
}
_BACKWARD = {
    n: jit.Kernel("norm", f"rms_norm_backward_{n}", "pppppp ll f i")
    for n in ("f32", "bf16", "mixed")
}
_NAMES = {
    (torch.float32, torch.float32): "f32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "mixed",
}


def _name(x: Tensor, residual: Tensor) -> str | None:
    """Which C++ instance takes these dtypes, if any."""
    return _NAMES.get((x.dtype, residual.dtype)) if x.device.type == "cpu" else None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    name = _name(x, x)
    function = _FORWARD[name].get() if name else None
    if function is None:
        return reference.rms_norm(x, weight, eps)
    x, weight = x.contiguous(), weight.float().contiguous()
    out = torch.empty_like(x)
    d = x.shape[-1]
    rows = x.numel() // d if d else 0
    threads = torch.get_num_threads()
    function(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, rows, d, eps, threads)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    name = _name(x, residual)
    function = _FORWARD[name].get() if name else None
    if function is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.float().contiguous()
    normed, summed = torch.empty_like(residual), torch.empty_like(residual)
    d = x.shape[-1]
    rows = x.numel() // d if d else 0
    function(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), summed.data_ptr(),
        rows, d, eps, torch.get_num_threads(),
    )  # fmt: skip
    return normed, summed


def _backward(
    dy: Tensor, extra: Tensor | None, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the normed input (plus `extra`, the gradient of the sum) as `dtype`, and of the
    weight."""
    name = _NAMES.get((dtype, x.dtype)) if x.device.type == "cpu" else None
    function = _BACKWARD[name].get() if name else None
    if function is None:
        dx, dw = reference.rms_norm_backward(dy, x, weight, eps)
        return (dx if extra is None else dx + extra).to(dtype), dw
    x, wide = x.contiguous(), weight.float().contiguous()
    dy = dy.to(x.dtype).contiguous()
    extra = None if extra is None else extra.to(x.dtype).contiguous()
    dx, dw = torch.empty_like(x, dtype=dtype), torch.empty_like(wide)
    d = x.shape[-1]
    rows = x.numel() // d if d else 0
    function(
        dy.data_ptr(), None if extra is None else extra.data_ptr(), x.data_ptr(), wide.data_ptr(),
        dx.data_ptr(), dw.data_ptr(), rows, d, eps, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw.to(weight.dtype)


jit.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
jit.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    lambda x, residual, weight, eps: (
        torch.empty_like(x + residual),
        torch.empty_like(x + residual),
    ),
)
jit.define(
    "rms_norm_backward(Tensor dy, Tensor? extra, Tensor x, Tensor weight, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    _backward,
    lambda dy, extra, x, weight, eps, dtype: (
        torch.empty_like(x, dtype=dtype),
        torch.empty_like(weight),
    ),
)
_op = torch.ops.serval


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _op.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx, dw = _op.rms_norm_backward(dy, None, x, weight, ctx.eps, x.dtype)
        return dx, dw, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, summed = _op.add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight)
        ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)
        return normed, summed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, extra: Tensor) -> Any:  # type: ignore[override]
        summed, weight = ctx.saved_tensors
        dx, dw = _op.rms_norm_backward(dy, extra, summed, weight, ctx.eps, summed.dtype)
        return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last dim: x [..., D], weight [D] -> [..., D] in x's dtype."""
    if jit.differentiating(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, weight, eps) if jit.plain(x, weight) else _op.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(x + residual), x + residual)`; x and residual [..., D], weight [D].

    Both results have the promoted dtype of `x` and `residual`, so a float32 residual stream stays
    float32 under bf16 autocast.
    """
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm got x {tuple(x.shape)} and residual {tuple(residual.shape)}"
        )
    if jit.differentiating(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, eps)
    if jit.plain(x, residual, weight):
        return _add_rms_norm(x, residual, weight, eps)
    return _op.add_rms_norm(x, residual, weight, eps)
