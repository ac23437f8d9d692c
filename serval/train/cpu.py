"""What makes training fast on a CPU without touching the model's code.

Products: PyTorch hands float32 products to MKL, which does not use AVX-512 on AMD processors;
oneDNN, which PyTorch also carries, does, and is about twice as fast there. Memory: the C library
returns every large block to the system and asks for it again, and the page faults of a training
step then cost as much as its element-wise operations.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serval.models.layers import Linear

_M_TRIM_THRESHOLD = -1  # mallopt's names in malloc.h
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let the allocator keep freed blocks for the rest of the process; False where it cannot."""
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):  # not glibc
        return False


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products should go to oneDNN: an AMD processor with AVX-512.

    Decided by the processor and not by a stopwatch, so that a resumed run computes the same bits.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkl.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for two matrices [M, K], [N, K], by the faster library; not differentiable."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if need_x else None,
            product(grad.t(), x.t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose float32 products of whole batches run in oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        if x.ndim != 2 or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """While entered, plain linears of a CPU `model` run in oneDNN where that is faster."""
    swapped: list[tuple[nn.Linear, type[nn.Linear]]] = []
    if onednn_is_faster():
        for module in model.modules():
            if type(module) in (nn.Linear, Linear) and module.weight.is_cpu:
                assert isinstance(module, nn.Linear)
                swapped.append((module, type(module)))
    for module, _ in swapped:
        module.__class__ = OneDnnLinear
    try:
        yield
    finally:
        for module, kind in swapped:
            module.__class__ = kind
