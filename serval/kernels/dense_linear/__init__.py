"""A linear layer for inference with few rows (decode), float32 or bfloat16 weights.

Floor: the weight is read once, `4 N K` bytes in float32. A general matrix product packs its
operands first, which for 2 to 32 rows costs more than the product itself; this kernel reads the
weight in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.dense_linear import reference

MAX_ROWS = 32  # above this a general matrix product is as fast
_KERNELS = {
    torch.float32: jit.Kernel("dense_linear", "linear_f32", "plll pp p l i"),
    torch.bfloat16: jit.Kernel("dense_linear", "linear_bf16", "plll pp p l i"),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`: x [..., K], weight [N, K], bias [N] -> [..., N].

    Exactly `torch.nn.functional.linear`, gradients and autocast included, except that up to 32 rows
    without gradients on the CPU run in a kernel that is bound by memory only, and that float32 rows
    may meet a bfloat16 weight, which is widened on the way.
    """
    columns = weight.shape[1]
    mixed = x.dtype == torch.float32 and weight.dtype == torch.bfloat16
    if (
        (x.dtype == weight.dtype or mixed)
        and x.shape[-1] == columns
        and 0 < x.numel() <= MAX_ROWS * columns
        and x.device.type == "cpu"
        and jit.plain(x, weight)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not jit.differentiating(x, weight, *(() if bias is None else (bias,)))
    ):
        kernel = _KERNELS.get(weight.dtype)
        function = kernel.get() if kernel else None
        if function is not None:
            rows = x if x.dim() == 2 else x.reshape(-1, columns)
            rows = rows.float()
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            n = weight.shape[0]
            out = torch.empty((*x.shape[:-1], n), dtype=torch.float32)
            if bias is not None:
                bias = bias.float().contiguous()
            function(
                rows.data_ptr(), rows.stride(0), rows.shape[0], columns, weight.data_ptr(),
                None if bias is None else bias.data_ptr(), out.data_ptr(), n,
                torch.get_num_threads(),
            )  # fmt: skip
            return out if x.dtype == torch.float32 else out.to(x.dtype)
    if mixed and not torch.is_autocast_enabled(x.device.type):
        return reference.linear_widened(x, weight, bias)
    return reference.linear(x, weight, bias)
