"""Reciprocal rescaling: what is multiplied on one side is divided on the other.

A pair has two sides between which a network is linear: the rows that make an inner vector and the
columns (or, for attention logits, the rows) that meet it. The inner vector's coordinates are its
units; one factor per unit, or per group of units, leaves the function as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from serval.optim.covariant import AnyOptimizer, multiply_, rescale_state

Kind = Literal["qk", "vo", "mlp", "lora"]
Level = Literal["tensor", "head", "row"]
Norm = Literal["l1", "l2"]
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Member:
    """A parameter's part in a pair.

    units: int64, broadcastable to the parameter: the unit of every row or column, -1 for those that
    take no part. inverse: it is divided by the factor. measured: it counts in its side's norm,
    which biases do not.
    """

    parameter: Tensor
    units: Tensor
    inverse: bool
    measured: bool = True


@dataclass(frozen=True)
class Pair:
    """Two sides. levels: groupings of the U units coarser than one by one ("row"), int64 [U]."""

    name: str
    kind: Kind
    members: list[Member]
    levels: dict[str, Tensor]

    def groups(self, level: str) -> Tensor:
        """int64 [U]: the group of every unit at `level`; "tensor" where the pair lacks it."""
        if level == "row":
            return torch.arange(len(self.levels["tensor"]))
        return self.levels.get(level, self.levels["tensor"])

    def key(self) -> tuple[int, ...]:
        """Which parameters it holds: equal for the same weights seen through two modules."""
        return tuple(sorted(id(member.parameter) for member in self.members))


@dataclass
class PairReport:
    """What was done to a pair. factors: float64 [groups], the left side's multiplier. before,
    residual: the largest |log(left norm / right norm)| of a group, before and after."""

    name: str
    kind: Kind
    factors: Tensor
    before: float
    residual: float


@dataclass
class Report:
    """pairs: rescaled, in the model's order. skipped: why others were left, by their name."""

    pairs: list[PairReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def imbalance(self, kind: Kind) -> float | None:
        """Mean over the pairs of `kind` of the imbalance before; None without such pairs."""
        found = [pair.before for pair in self.pairs if pair.kind == kind]
        return sum(found) / len(found) if found else None


def norms(pair: Pair, groups: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Norms of the left and the right side, float64 [groups]; the sum over entries, not their
    mean, which for equal initialisation would see no difference between q and k under GQA."""
    sides = torch.zeros(2, int(groups.max()) + 1, dtype=torch.float64)
    for member in pair.members:
        if not member.measured:
            continue
        weight = member.parameter.detach()
        size = weight.abs() if norm == "l1" else weight.double().square()
        others = [dim for dim, count in enumerate(member.units.shape) if count == 1]
        sums = size.sum(others, keepdim=True, dtype=torch.float64)
        if isinstance(sums, DTensor):
            sums = sums.full_tensor()
        units = member.units.flatten()
        kept = units >= 0
        values = sums.flatten().cpu()[kept]
        sides[int(member.inverse)].index_add_(0, groups[units[kept]], values)
    if norm == "l2":
        sides = sides.sqrt()
    return sides[0], sides[1]


def balance(
    pair: Pair, level: str, norm: Norm, optimizer: AnyOptimizer | None, covariant: bool
) -> PairReport | None:
    """Equalise the norms of both sides; None when no group can be (a side is zero or not finite).

    16-bit weights take the nearest power of two, which they can be multiplied by exactly.
    """
    groups = pair.groups(level)
    left, right = norms(pair, groups, norm)
    log = 0.5 * (right / left).log()
    usable = log.isfinite()
    if not bool(usable.any()):
        return None
    if any(member.parameter.dtype in NARROW for member in pair.members):
        factors = torch.where(usable, (log / torch.log(torch.tensor(2.0))).round().exp2(), 1.0)
    else:
        factors = torch.where(usable, log.exp(), 1.0)
    for member in pair.members:
        factor = torch.ones(member.units.shape, dtype=torch.float64)
        kept = member.units >= 0
        factor[kept] = factors[groups[member.units[kept]]]
        _scale(member, 1.0 / factor if member.inverse else factor, optimizer, covariant)
    after_left, after_right = norms(pair, groups, norm)
    after = (after_left / after_right).log()[usable]
    return PairReport(
        pair.name,
        pair.kind,
        factors,
        float(2.0 * log[usable].abs().max()),
        float(after.abs().max()),
    )


def _scale(member: Member, factor: Tensor, optimizer: AnyOptimizer | None, covariant: bool) -> None:
    parameter = member.parameter
    multiply_(parameter, factor)
    if parameter.grad is not None:
        multiply_(parameter.grad, 1.0 / factor)
    if optimizer is not None and covariant:
        rescale_state(optimizer, parameter, factor)


def distinct(pairs: list[Pair], skip: Callable[[str, str], None]) -> list[Pair]:
    """Each pair once, without those that share a weight with another pair of their kind: what
    balances one would change the function of the other. `skip` hears name and reason."""
    owners: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for pair in pairs:
        for member in pair.members:
            owners.setdefault((pair.kind, id(member.parameter)), set()).add(pair.key())
    kept: dict[tuple[str, tuple[int, ...]], Pair] = {}
    for pair in pairs:
        if any(len(owners[pair.kind, id(m.parameter)]) > 1 for m in pair.members):
            skip(f"{pair.name} {pair.kind}", "shares a weight with another layer")
        else:
            kept.setdefault((pair.kind, pair.key()), pair)
    return list(kept.values())
