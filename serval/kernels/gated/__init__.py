"""SwiGLU, `silu(gate) * up`, with gradients.

Floor: forward reads two elements and writes one (12 bytes per float32 element), backward reads
three and writes two. float32 and bfloat16 on the CPU run in C++, anything else in the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.gated import reference

_DTYPES = ((torch.float32, "f32"), (torch.bfloat16, "bf16"))
_FORWARD = {d: jit.Kernel("gated", f"swiglu_{n}", "plpl p ll i") for d, n in _DTYPES}
_BACKWARD = {d: jit.Kernel("gated", f"swiglu_backward_{n}", "p plpl pp ll i") for d, n in _DTYPES}


def _rows(x: Tensor) -> Tensor:
    """A 2-d view [rows, F] with contiguous rows, copied only when the layout leaves no other
    way."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _pick(kernels: dict[torch.dtype, jit.Kernel], gate: Tensor, up: Tensor) -> Any:
    """The C++ function for these tensors, or None."""
    if gate.dtype != up.dtype or gate.device.type != "cpu":
        return None
    kernel = kernels.get(gate.dtype)
    return kernel.get() if kernel else None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    function = _pick(_FORWARD, gate, up)
    if function is None:
        return reference.swiglu(gate, up)
    out = gate.new_empty(gate.shape)
    g, u = _rows(gate), _rows(up)
    function(
        g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), out.data_ptr(),
        g.shape[0], g.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    function = _pick(_BACKWARD, gate, up)
    if function is None:
        return reference.swiglu_backward(dy, gate, up)
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    dy, g, u = dy.to(gate.dtype).contiguous(), _rows(gate), _rows(up)
    function(
        dy.data_ptr(), g.data_ptr(), g.stride(0), u.data_ptr(), u.stride(0), d_gate.data_ptr(),
        d_up.data_ptr(), g.shape[0], g.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return d_gate, d_up


jit.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _swiglu,
    lambda gate, up: gate.new_empty(gate.shape),
)
jit.define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
_op = torch.ops.serval


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _op.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return _op.swiglu_backward(dy, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` for gate, up [..., F] of one shape, in gate's dtype."""
    if gate.shape != up.shape:
        raise ValueError(f"swiglu got gate {tuple(gate.shape)} and up {tuple(up.shape)}")
    if jit.differentiating(gate, up):
        return _SwiGLU.apply(gate, up)
    return _swiglu(gate, up) if jit.plain(gate, up) else _op.swiglu(gate, up)
