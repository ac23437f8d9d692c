"""The online Hadamard rotation of queries and keys (QuaRot, arXiv:2404.00456; OScaR,
arXiv:2605.19660).

Floor: a row is read and written once, 8 D bytes; log2(block) additions per number.
"""

from __future__ import annotations

from torch import Tensor

from serval.kernels.walsh_hadamard import reference


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """x [..., D] times the normalised Sylvester-Hadamard matrix of order `block`, repeated along
    the diagonal (default: the largest power of two that divides D).

    The matrix is symmetric and its own inverse, so applying this twice returns x, and
    (x H)(y H)^T = x y^T. Raises ValueError unless block is a power of two that divides D.
    """
    dim = x.shape[-1]
    block = reference.largest_block(dim) if block is None else block
    if block < 1 or block & (block - 1) or dim % block:
        raise ValueError(
            f"hadamard got rows of {dim} and block {block}; it expects a power of two that "
            f"divides the width, such as {reference.largest_block(dim)}"
        )
    return reference.hadamard(x, block)
