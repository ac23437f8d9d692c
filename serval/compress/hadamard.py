"""Orthogonal matrices that spread outliers: random Hadamard matrices, applied without being built.

A Hadamard matrix has entries of +-1 and orthogonal rows. For n = 2^k m it is a Kronecker product
of small ones, H_2 x ... x H_2 x H_m, so that a product costs n times the sum of the factors' sizes,
not n^2. H_m comes from Paley's two constructions over the integers modulo a prime q:

    q = 3 mod 4    H = I + S,                       S = [[0, 1], [-1, Q]],  order q + 1
    q = 1 mod 4    H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],
                   C = [[0, 1], [1, Q]],            order 2 (q + 1)

with Q_ij the quadratic character of i - j. That covers the widths of published models (m = 12, 20,
28, 36, 180, ...); for other sizes a dense random orthogonal matrix takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serval.kernels.walsh_hadamard.reference import sylvester

LARGEST_FACTOR = 64  # 2^k is split into factors of at most this size
LARGEST_PALEY = 2048


@dataclass(frozen=True)
class Orthogonal:
    """Q = diag(signs) (F_1 x F_2 x ...) [n, n], all float64, Q^T Q = I."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @classmethod
    def random(cls, size: int, seed: int = 0) -> Orthogonal:
        """A random Hadamard matrix (random signs) over sqrt(size), or a random orthogonal matrix
        when no Hadamard matrix of that size is known here."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        factors = hadamard_factors(size)
        if factors is None:
            normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(normal)
            return cls(signs, (q * r.diagonal().sign(),))
        return cls(signs, tuple(factor / len(factor) ** 0.5 for factor in factors))

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def right(self, x: Tensor) -> Tensor:
        """x Q: float64 [..., n] of x [..., n] in any dtype."""
        out = x.double() * self.signs
        done = 1
        for factor in self.factors:
            size = len(factor)
            out = out.reshape(-1, size, x.shape[-1] // (done * size))
            out = torch.einsum("...ia,ij->...ja", out, factor)
            done *= size
        return out.reshape(x.shape)


def hadamard_factors(size: int) -> list[Tensor] | None:
    """float64 matrices of +-1 whose Kronecker product is a Hadamard matrix of `size`, or None."""
    twos = (size & -size).bit_length() - 1
    for power in range(twos, -1, -1):
        rest = size >> power
        paley = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else paley_matrix(rest)
        if paley is None:
            continue
        factors = [] if rest == 1 and power else [paley]
        while power:
            step = min(power, LARGEST_FACTOR.bit_length() - 1)
            factors.append(sylvester(1 << step))
            power -= step
        return factors
    return None


def paley_matrix(size: int) -> Tensor | None:
    """A Hadamard matrix of `size` by one of Paley's constructions over a prime, or None."""
    if size % 4 or size > LARGEST_PALEY:
        return None
    q = size - 1
    if q % 4 == 3 and _is_prime(q):
        skew = torch.zeros(size, size, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _character(q)
        return torch.eye(size, dtype=torch.float64) + skew
    q = size // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[0, 1:] = conference[1:, 0] = 1
        conference[1:, 1:] = _character(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(q + 1, dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(identity, minus)
    return None


def _character(q: int) -> Tensor:
    """Q [q, q]: 1 where i - j is a square modulo q, -1 where it is not, 0 where i = j."""
    values = torch.full((q,), -1.0, dtype=torch.float64)
    values[torch.arange(1, q).square() % q] = 1
    values[0] = 0
    index = torch.arange(q)
    return values[(index[:, None] - index[None, :]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
