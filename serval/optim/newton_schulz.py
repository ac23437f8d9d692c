"""Newton-Schulz: the nearest semi-orthogonal matrix by products alone.

Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/), for X [m, n] with m <= n:

    X_0 = U / ||U||_F,    A = X X^T,    X <- a X + (b A + c A^2) X     five times

which moves every singular value towards one; a wider than tall matrix is taken as it is, a taller
one transposed. Coefficients: the original triple; Polar Express (arXiv:2505.16932), a triple per
step; Dion's five (arXiv:2504.05295).

Two forms, equal in exact arithmetic, m = the shorter side, multiply-adds for five steps:

- direct, as written. A and b A + c A^2 are symmetric, so half of each is computed:
  15 m^2 n + 5 m^3 instead of 20 m^2 n + 10 m^3.
- Gram: X_k = Q_k X_0, where Q_k is a polynomial of A_0 = X_0 X_0^T. With P = a I + b A + c A^2,
  Q <- P Q and A <- P A P all commute and are symmetric: 3 m^2 n + 17 m^3, less as soon as n > m.
  Squaring halves the digits of small singular values, which float32 has to spare and bfloat16 does
  not: rounding is amplified by at most a^2 per step, to 1e-3 of the result for matrices of low rank
  (8e-3 with the steeper coefficients).

float32 takes the Gram form unless the matrix is square; bfloat16 the direct form, in the order of
operations of `torch.optim.Muon`. float16 would overflow in the quintic and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serval.errors import ConfigError
from serval.kernels import symmetric_product as products

Triple = tuple[float, float, float]

COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "original": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
MARGINS = {"polar_express": 1.02}  # its polynomials need ||X|| < 1 with room for rounding
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

Coefficients = str | Sequence[float] | Sequence[Triple]


@dataclass(frozen=True)
class Iteration:
    """How a matrix is orthogonalised. triples: (a, b, c) of each step. eps: smallest norm divided
    by. margin: factor of the norm. dtype: of the iteration."""

    triples: tuple[Triple, ...]
    eps: float = 1e-7
    margin: float = 1.0
    dtype: torch.dtype = torch.float32

    @classmethod
    def make(
        cls,
        coefficients: Coefficients = "original",
        steps: int = 5,
        eps: float = 1e-7,
        dtype: torch.dtype = torch.float32,
    ) -> Iteration:
        """coefficients: a key of `COEFFICIENTS`, one (a, b, c), or one for each step (the last
        one repeats when there are more steps). Raises ConfigError."""
        if dtype not in DTYPES:
            raise ConfigError(
                f"ns_dtype is {dtype}; expected float32, bfloat16 or float64 "
                "(float16 overflows in the quintic)"
            )
        if not 0 < steps < 100:
            raise ConfigError(f"ns_steps is {steps}; expected 1 to 99")
        margin = 1.0
        if isinstance(coefficients, str):
            if coefficients not in COEFFICIENTS:
                known = ", ".join(COEFFICIENTS)
                raise ConfigError(f"ns_coefficients is {coefficients!r}; expected one of {known}")
            margin = MARGINS.get(coefficients, 1.0)
            triples = COEFFICIENTS[coefficients]
        else:
            triples = _triples(coefficients)
        repeated = triples[:steps] + triples[-1:] * (steps - len(triples))
        return cls(repeated, eps, margin, dtype)


def _triples(values: Sequence[float] | Sequence[Triple]) -> tuple[Triple, ...]:
    rows: Any = values if values and isinstance(values[0], Sequence) else [values]
    if any(not isinstance(row, Sequence) or len(row) != 3 for row in rows):
        raise ConfigError(
            f"ns_coefficients is {values!r}; expected three numbers (a, b, c), a list of such "
            f"triples, or one of {', '.join(COEFFICIENTS)}"
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


class Workspace:
    """Buffers that live from one call to the next: fresh memory costs the CPU a page fault per
    4 KB, which for small matrices is as much as the product that fills it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of `shape`; its memory is that of the last one of this name."""
        size = 1
        for length in shape:
            size *= length
        if like.device.type != "cpu":  # their allocators keep freed memory
            return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype)
        return buffer[:size].view(*shape)


def orthogonalise(x: Tensor, iteration: Iteration, workspace: Workspace | None = None) -> Tensor:
    """x [B, m, n] -> the orthogonalised matrices [B, m, n], in the iteration's dtype.

    A zero matrix gives zeros. `x` is not changed; the result may lie in `workspace` and then holds
    until the next call.
    """
    workspace = workspace or Workspace()
    if x.numel() == 0:
        return x.to(iteration.dtype)
    x = x.to(iteration.dtype)
    if iteration.dtype == torch.bfloat16:
        return _general(x, iteration)
    if x.shape[1] == x.shape[2]:
        return _direct(x, iteration, workspace)
    return _gram(x, iteration, workspace)


def _general(x: Tensor, iteration: Iteration) -> Tensor:
    """The direct form with whole products, operation for operation as in `torch.optim.Muon`."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=iteration.eps).mul(iteration.margin)
    for a, b, c in iteration.triples:
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if tall else x


def _direct(x: Tensor, iteration: Iteration, workspace: Workspace) -> Tensor:
    """Square matrices."""
    batch, m, _ = x.shape
    gram, factor, one, other = (workspace.take(f"direct{i}", (batch, m, m), x) for i in range(4))
    norm = x.norm(dim=(1, 2), keepdim=True).clamp(min=iteration.eps).mul(iteration.margin)
    x = torch.div(x, norm, out=one)
    for a, b, c in iteration.triples:
        products.gram(x, out=gram)
        products.symmetric_product(gram, gram, c, add=gram, beta=b, diagonal=a, out=factor)
        x, other = products.product(factor, x, out=other), x
    return x


def _gram(x: Tensor, iteration: Iteration, workspace: Workspace) -> Tensor:
    """Rectangular matrices."""
    batch, rows, columns = x.shape
    m = min(rows, columns)
    wide = x
    if rows > columns:
        wide = products.transposed(x, out=workspace.take("gram.x", (batch, columns, rows), x))
    gram, *free = (workspace.take(f"gram{i}", (batch, m, m), x) for i in range(5))
    products.gram(wide, out=gram)
    squared = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]  # ||U||_F^2
    norm = squared.sqrt().clamp_(min=iteration.eps).mul_(iteration.margin)
    gram.div_(norm).div_(norm)
    q = p = gram
    for step, (a, b, c) in enumerate(iteration.triples):
        if step > 0:
            t = products.symmetric_product(p, gram, out=free.pop())
            products.symmetric_product(p, t, out=gram)
            free.append(t)
        new = free.pop()
        products.symmetric_product(gram, gram, c, add=gram, beta=b, diagonal=a, out=new)
        if step == 0:
            q = p = new
            continue
        t = products.symmetric_product(new, q, out=free.pop())
        if q is not p:
            free.append(q)
        free.append(p)
        q, p = t, new
    q = torch.div(q, norm, out=free.pop())
    out = workspace.take("gram.out", x.shape, x)
    if rows > columns:
        return products.product(x, q, out=out)
    return products.product(q, x, out=out)
