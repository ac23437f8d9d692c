"""The online Hadamard rotation of queries and keys (QuaRot, arXiv:2404.00456; OScaR,
arXiv:2605.19660).

Floor: a row is read and written once, 8 D bytes; log2(block) additions per number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.kernels import jit
from serval.kernels.walsh_hadamard import reference

_KERNEL = jit.Kernel("walsh_hadamard", "walsh_hadamard", "pplll pplll l f i")


def _block(dim: int, block: int | None) -> int:
    block = reference.largest_block(dim) if block is None else block
    if block < 1 or block & (block - 1) or dim % block:
        raise ValueError(
            f"hadamard got rows of {dim} and block {block}; it expects a power of two that "
            f"divides the width, such as {reference.largest_block(dim)}"
        )
    return block


def _fast(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and not jit.differentiating(x)


def _runs(x: Tensor, block: int) -> tuple[Tensor, tuple[int, int, int]]:
    """x as the kernel can read it, copied if it must be: (blocks, dense ones in a run, numbers from
    one run to the next)."""
    count = x.numel() // block
    if x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]:  # heads of a wider matrix
        return x, (count, max(1, x.shape[1] * x.shape[2] // block), x.stride(0))
    return x.contiguous(), (count, max(1, count), 0)


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """x [..., D] times the normalised Sylvester-Hadamard matrix of order `block`, repeated along
    the diagonal (default: the largest power of two that divides D).

    The matrix is symmetric and its own inverse, so applying this twice returns x, and
    (x H)(y H)^T = x y^T. Raises ValueError unless block is a power of two that divides D.
    """
    block = _block(x.shape[-1], block)
    function = _KERNEL.get() if _fast(x) and jit.plain(x) else None
    if function is None:
        return reference.hadamard(x, block)
    x, given = _runs(x, block)
    out = torch.empty(x.shape)
    function(
        x.data_ptr(), out.data_ptr(), *given, None, None, 0, 1, 0, block, block**-0.5,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def hadamard_pair(x: Tensor, y: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """`hadamard` of x [..., D] and y [..., D], such as a step's queries and keys, in one call."""
    block = _block(x.shape[-1], block)
    usable = x.shape[-1] == y.shape[-1] and _fast(x) and _fast(y) and jit.plain(x, y)
    function = _KERNEL.get() if usable else None
    if function is None:
        return hadamard(x, block), hadamard(y, block)
    (x, x_runs), (y, y_runs) = _runs(x, block), _runs(y, block)
    outs = torch.empty(x.shape), torch.empty(y.shape)
    function(
        x.data_ptr(), outs[0].data_ptr(), *x_runs, y.data_ptr(), outs[1].data_ptr(), *y_runs,
        block, block**-0.5, torch.get_num_threads(),
    )  # fmt: skip
    return outs
