"""Batched float32 products for matrix iterations, half of each where the result is symmetric.

X X^T, and the product of two symmetric matrices that commute (powers and polynomials of one
matrix), are symmetric: only the lower half is computed, then mirrored. Floor: m^2 k multiply-adds
per X X^T of X [m, k] (a general product needs 2 m^2 k operations for the same), and m^3 for
a symmetric product. Batches of matrices are one call and one parallel region.

float32 on the CPU runs in C++; other dtypes and devices in PyTorch, whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serval.errors import ConfigError
from serval.kernels import jit
from serval.kernels.symmetric_product import reference

_PRODUCT = jit.Kernel("symmetric_product", "product_f32", "pll pll pp llll fff iii")
_TRANSPOSE = jit.Kernel("symmetric_product", "transpose_f32", "pll p lll i")


def _function(kernel: jit.Kernel, *tensors: Tensor) -> jit.Function | None:
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return kernel.get() if fits else None


def _check(name: str, a: Tensor, b: Tensor, *shapes: tuple[int, ...]) -> None:
    if a.ndim != 3 or b.ndim != 3 or any(s != tuple(b.shape) for s in shapes):
        raise ConfigError(
            f"{name}: got shapes {list(a.shape)} and {list(b.shape)}; expected batches of "
            "matrices [B, m, k] whose sizes fit"
        )


def _rows(x: Tensor) -> Tensor:
    """Rows may lie apart, a row's elements may not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(
    function: jit.Function,
    a: Tensor,
    b: Tensor,
    columns: int,
    *,
    transposed: bool,
    symmetric: bool,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    a, b = _rows(a), _rows(b)
    batch, m, k = a.shape
    if out is None:
        out = torch.empty(batch, m, columns)
    if out.shape != (batch, m, columns) or not out.is_contiguous():
        raise ConfigError(
            f"out has shape {list(out.shape)}; expected a contiguous {[batch, m, columns]}"
        )
    if out.numel() == 0 or k == 0:
        return out.zero_()
    add = None if add is None else add.contiguous()
    function(
        a.data_ptr(), a.stride(1), a.stride(0), b.data_ptr(), b.stride(1), b.stride(0),
        None if add is None else add.data_ptr(), out.data_ptr(), batch, m, columns, k,
        alpha, beta, diagonal, transposed, symmetric, torch.get_num_threads(),
    )  # fmt: skip
    return out


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [B, m, k], b [B, k, n] -> A B [B, m, n], into `out` (not a or b) when given."""
    _check("product", a, b, (a.shape[0], a.shape[-1], b.shape[-1]))
    function = _function(_PRODUCT, a, b)
    if function is None:
        return reference.product(a, b, out)
    return _run(function, a, b, b.shape[2], transposed=False, symmetric=False, out=out)


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [B, m, k] -> X X^T [B, m, m], exactly symmetric on the CPU; into `out` when given."""
    _check("gram", x, x)
    function = _function(_PRODUCT, x)
    if function is None:
        return reference.gram(x, out)
    return _run(function, x, x, x.shape[1], transposed=True, symmetric=True, out=out)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """alpha A B + beta D + diagonal I for a, b, add (D) [B, m, m] -> [B, m, m].

    A, B and D must be symmetric and A B = B A (two polynomials of one symmetric matrix); this is
    not checked, the upper half of A B is taken to be the mirrored lower one. `out` may not be one
    of them.
    """
    square = (a.shape[0], a.shape[-1], a.shape[-1])
    _check("symmetric_product", a, b, tuple(a.shape), square)
    tensors = (a, b) if add is None else (a, b, add)
    function = _function(_PRODUCT, *tensors)
    if function is None:
        return reference.symmetric_product(a, b, alpha, add, beta, diagonal, out)
    return _run(
        function, a, b, b.shape[2], transposed=False, symmetric=True,
        alpha=alpha, add=add, beta=beta, diagonal=diagonal, out=out,
    )  # fmt: skip


def transposed(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [B, m, n] -> X^T [B, n, m], contiguous; into `out` when given."""
    function = _function(_TRANSPOSE, x)
    if function is None or x.stride(-1) != 1 or x.numel() == 0:
        return x.mT.contiguous() if out is None else out.copy_(x.mT)
    batch, m, n = x.shape
    out = torch.empty(batch, n, m) if out is None else out
    function(
        x.data_ptr(), x.stride(1), x.stride(0), out.data_ptr(), batch, m, n,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
