"""Rotary position embedding of queries and keys in one call, with gradients.

Floor: q and k are read and written once (8 bytes per float32 element). The gradient is the rotation
by the opposite angle. float32 and bfloat16 on the CPU run in C++, anything else in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.rope import reference

_KERNELS = {
    dtype: jit.Kernel("rope", f"rotary_{name}", "pllpll pllpll ppp lll f ii")
    for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16"))
}


def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    sign: float,
) -> tuple[Tensor, Tensor]:
    kernel = _KERNELS.get(q.dtype) if q.dtype == k.dtype and q.device.type == "cpu" else None
    function = kernel.get() if kernel else None
    if function is None:
        return reference.rotary(q, k, cos, sin * sign, positions, interleaved)
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    positions = positions.to(torch.int64).contiguous()
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
    status = function(
        q.data_ptr(), q.stride(0), q.stride(1), q_out.data_ptr(), q.shape[1], q.shape[2],
        k.data_ptr(), k.stride(0), k.stride(1), k_out.data_ptr(), k.shape[1], k.shape[2],
        cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), positions.numel(), cos.shape[1],
        cos.shape[0], sign, interleaved, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise ValueError(
            f"rotary got positions from {int(positions.min())} to {int(positions.max())}; "
            f"the tables hold positions 0 to {cos.shape[0] - 1}"
        )
    return q_out, k_out


jit.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool interleaved,"
    " float sign) -> (Tensor, Tensor)",
    _rotary,
    lambda q, k, cos, sin, positions, interleaved, sign: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
    ),
)
_op = torch.ops.serval


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return _op.rotary(q, k, cos, sin, positions, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:  # type: ignore[override]
        return (
            *_op.rotary(dq, dk, *ctx.saved_tensors, ctx.interleaved, -1.0),
            None,
            None,
            None,
            None,
        )


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, Hk, Dk]; cos, sin float32 [P, R/2]; positions int64 [T], each
    below P.

    The first R dims turn (R <= D, Dk), the rest pass through. Returns new tensors in the dtypes of
    q and k.
    """
    if q.shape[0] != positions.shape[0] or k.shape[0] != positions.shape[0]:
        raise ValueError(
            f"rotary got q {tuple(q.shape)}, k {tuple(k.shape)} and "
            f"{positions.shape[0]} positions; it expects one position per row"
        )
    if 2 * cos.shape[1] > min(q.shape[2], k.shape[2]):
        raise ValueError(
            f"rotary got tables for {2 * cos.shape[1]} dims and heads of {q.shape[2]} and "
            f"{k.shape[2]}; it expects tables no wider than a head"
        )
    if jit.differentiating(q, k):
        return _Rotary.apply(q, k, cos, sin, positions, interleaved)
    if jit.plain(q, k):
        return _rotary(q, k, cos, sin, positions, interleaved, 1.0)
    return _op.rotary(q, k, cos, sin, positions, interleaved, 1.0)
