"""MaskPrune's minimax: masks, widths and multipliers learnt together (arXiv 2502.14008).

    min over m, theta, s  max over y >= 0, z >= 0:
        Loss(m, theta) + sum_{i,l} y_{i,l} S_{i,l}(ceil s_i, m) + z (R(s) - B)

    S_{i,l}(s, m)   sum of m^2 over the ceil(s_i) units of layer l with the least energy
    e = c (m I)^2   energy that ranks units; I: importance, mean 1 per layer; c: weight of the kind
    R(s)            share of the cost that N_i - ceil(s_i) units of each kind i leave

s_i is one number per kind, shared by all layers; rho_i = s_i / N_i is what moves. Per step, after
the optimizer moved masks (normalised momentum) and low-rank updates (AdamW) down the loss:

    prox    m <- m / (1 + 2 eta y) for the ceil(s_i) units of least energy
    rho_i  -= lr_rho clip(mean_l y e_next - z w_i, -1, 1)      e_next: the next smallest energy
    y_{i,l} += lr_y S_{i,l} / N_i
    z       = max(0, z + lr_z (R - B_t))

Phases of a run: warm-up (s = 0); ramp (B_t falls from 1 to the budget over its first 80 %; rho
stops once R <= B); kill (s fixed, y grows until the dropped masks are gone); cut; recovery.

The paper's text was only read in part. The recursion is that of UVC (ICLR 2022), from which the
method descends. Decided here: fractions instead of counts, the energy's importance (masks that
start at one have no order), the weight of a kind (measured: a head's first-order importance says
little about losing half of the heads), normalised momentum, the phases, y that starts at 1, and
that widths which miss the budget or an allowed multiple at the end of the ramp are settled by
energy per cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serval.compress.maskprune.masks import MaskedDecoder
from serval.compress.maskprune.units import Costs, Kind, Levels, Widths, settle
from serval.optim import MixedOptimizer
from serval.train.loss import LanguageModelLoss
from serval.train.reporting import Callback, Metrics
from serval.train.stream import Targets

# Where the multipliers start. With y at 1e-3, as in UVC, nothing resists a kind's first cut,
# whatever it costs the loss; at 1 the first to go is what has least energy per share of the budget.
Y_START, Z_START = 1.0, 1e-3
FAINT = 1e-4  # nats, and energy, below which nothing is told apart


def least_energy(energy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(indices int64 [L, count] of the smallest entries of each row of energy [L, N], the next
    smallest entry [L]; infinite when none is left). Among equals the first come first."""
    order = energy.argsort(dim=1, stable=True)
    if count >= energy.shape[1]:
        return order, energy.new_full((energy.shape[0],), math.inf)
    return order[:, :count], energy.gather(1, order[:, count : count + 1]).squeeze(1)


def prox(values: Tensor, indices: Tensor, strength: Tensor) -> Tensor:
    """argmin over x of |x - v|^2 / 2 + strength |x|^2 at the chosen entries: v / (1 + 2 strength).

    values [L, N], indices int64 [L, C], strength [L]: learning rate times multiplier.
    """
    shrunk = values.gather(1, indices) / (1 + 2 * strength[:, None])
    return values.scatter(1, indices, shrunk)


def dropped(rho: float, units: int) -> int:
    """ceil(s) of s = rho N, deaf to rounding errors; at least one unit always stays."""
    return min(max(0, math.ceil(rho * units - 1e-6)), units - 1)


@dataclass(frozen=True)
class Phases:
    """Last step of warm-up, ramp and kill, of a run of `total` steps."""

    warmup: int
    ramp: int
    kill: int
    total: int

    @classmethod
    def of(cls, total: int, warmup: float, ramp: float, kill: float) -> Phases:
        """From fractions of `total`; recovery takes the rest."""
        ends = (warmup, warmup + ramp, warmup + ramp + kill)
        first, second, third = (round(total * end) for end in ends)
        return cls(first, second, third, total)


@dataclass(frozen=True)
class Rates:
    """mask: learning rate of masks; rho, y, z: of widths and multipliers. growth, cap: of y in the
    kill phase, until the largest dropped mask is `residual` of the median kept one. A ramp of fewer
    than 200 steps moves rho and z faster in proportion; a short kill phase lets y grow faster, so
    that it can reach the cap after two thirds."""

    mask: float = 0.02
    rho: float = 0.01
    y: float = 0.2
    z: float = 0.2
    growth: float = 1.06
    cap: float = 500.0
    residual: float = 0.02


class MaskOptimizer(torch.optim.Optimizer):
    """Momentum descent with one normalisation per kind of mask.

    v <- b2 v + (1 - b2) mean(g^2) over all masks of a group; u <- b1 u + (1 - b1) g / sqrt(v);
    m <- m - lr u. Adam's normalisation by coordinate would hide which units matter.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], momentum: float = 0.9, decay: float = 0.99
    ) -> None:
        super().__init__(list(groups), {"momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; masks without a gradient stay."""
        for group in self.param_groups:
            masks = [mask for mask in group["params"] if mask.grad is not None]
            if not masks:
                continue
            count = sum(mask.numel() for mask in masks)
            square = sum(mask.grad.square().sum() for mask in masks) / count
            for mask in masks:
                state = self.state[mask]
                if not state:
                    state["momentum"] = torch.zeros_like(mask)
                    state["square"] = torch.zeros_like(square)
                    state["steps"] = torch.zeros_like(square)
                state["steps"] += 1
                state["square"].lerp_(square, 1 - group["decay"])
                unbiased = state["square"] / (1 - group["decay"] ** state["steps"])
                scaled = mask.grad / (unbiased.sqrt() + 1e-12)
                state["momentum"].lerp_(scaled, 1 - group["momentum"])
                mask.sub_(state["momentum"], alpha=group["lr"])


def mask_importance(masked: MaskedDecoder, batches: Sequence[Targets]) -> dict[Kind, Tensor]:
    """I: first-order Taylor importance |m dL/dm| at the present masks, summed over batches, mean 1
    per layer; float32 [layers, units] by kind."""
    loss = LanguageModelLoss(masked.decoder)
    total = {kind: torch.zeros_like(masked.stacked(kind)) for kind in masked.kinds()}
    for batch in batches:
        masked.decoder.zero_grad(set_to_none=True)
        (loss(batch)[0] / batch.weights.sum().clamp(min=1e-9)).backward()
        for kind, sums in total.items():
            slopes = [
                torch.zeros_like(module.mask) if module.mask.grad is None else module.mask.grad
                for module in masked.of_kind(kind)
            ]
            sums += (torch.stack(slopes) * masked.stacked(kind)).abs()
    masked.decoder.zero_grad(set_to_none=True)
    tiny = torch.finfo(torch.float32).tiny
    return {kind: sums / sums.mean(1, keepdim=True).clamp(min=tiny) for kind, sums in total.items()}


@torch.no_grad()
def measured_weights(
    masked: MaskedDecoder,
    batches: Sequence[Targets],
    costs: Costs,
    levels: Levels,
    keep: float,
    importance: dict[Kind, Tensor],
) -> dict[Kind, float]:
    """c by kind: what losing its least important units costs the loss, over their energy.

    Of each kind as many units are dropped from every layer as would meet the budget alone, or as
    many as may go. The weights are scaled so that their mean, weighted by the kinds' costs, is 1.
    """
    loss = LanguageModelLoss(masked.decoder).eval()
    rows = max(1e-9, sum(float(batch.weights.sum()) for batch in batches))

    def measure() -> float:
        return sum(float(loss(batch)[1]) for batch in batches) / rows

    whole, least = measure(), levels.least()
    found: dict[Kind, float] = {}
    for kind, units in costs.units.items():
        alone = math.ceil(units * (1 - keep) / costs.share(kind) - 1e-6)
        count = min(max(1, alone), units - least[kind])
        if count <= 0:
            continue
        masks = masked.stacked(kind)
        energy = importance[kind].to(masks.device).square()
        indices, _ = least_energy(energy, count)
        masked.write(kind, masks.scatter(1, indices, 0.0))
        lost = measure() - whole
        masked.write(kind, masks)
        spent = float(energy.gather(1, indices).sum(1).mean()) / units
        found[kind] = max(lost, FAINT) / max(spent, FAINT)
    total = sum(costs.share(kind) for kind in found)
    mean = sum(costs.share(kind) * weight for kind, weight in found.items()) / max(total, 1e-9)
    return {kind: found.get(kind, mean) / mean if found else 1.0 for kind in costs.units}


class Minimax(Callback):
    """Learns which units go and how many of each kind, and cuts them at the end of the kill phase.

    importance: I by kind; weights: c by kind (None: all 1). widths: None until they are decided,
    then units kept by kind. residual: largest dropped mask at the cut, as a share of the median
    kept one.
    """

    def __init__(
        self,
        masked: MaskedDecoder,
        costs: Costs,
        levels: Levels,
        keep: float,
        importance: dict[Kind, Tensor],
        phases: Phases,
        rates: Rates | None = None,
        weights: dict[Kind, float] | None = None,
    ) -> None:
        self.masked, self.costs, self.levels, self.keep = masked, costs, levels, keep
        self.importance, self.phases, self.rates = importance, phases, rates or Rates()
        self.weights = weights or dict.fromkeys(importance, 1.0)
        self.hurry = max(1.0, 200 / max(1, phases.ramp - phases.warmup))
        killing = max(1, phases.kill - phases.ramp)
        self.growth = max(self.rates.growth, self.rates.cap ** (1.5 / killing))
        self.rho: dict[Kind, float] = dict.fromkeys(masked.kinds(), 0.0)
        self.y = {
            kind: torch.full((len(masked.of_kind(kind)),), Y_START) for kind in masked.kinds()
        }
        self.z = Z_START
        self.widths: Widths | None = None
        self.residual: float | None = None

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        """One iteration of the module's text, by phase."""
        if self.residual is not None or step <= self.phases.warmup:
            return
        if step <= self.phases.ramp:
            self._ramp(step)
        else:
            self._kill()
        metrics["kept"] = self.costs.fraction(self._widths())
        if step >= self.phases.kill:
            self._cut()

    # -- pieces -----------------------------------------------------------------------------

    def energy(self, kind: Kind) -> Tensor:
        """e [layers, units]."""
        masks = self.masked.stacked(kind)
        return self.weights[kind] * (masks * self.importance[kind].to(masks.device)).square()

    def count(self, kind: Kind) -> int:
        """Units of `kind` that go: ceil(s)."""
        units = self.costs.units[kind]
        if self.widths is not None:
            return units - self.widths[kind]
        return min(dropped(self.rho[kind], units), units - self.levels.least()[kind])

    def _widths(self) -> Widths:
        return {kind: n - self.count(kind) for kind, n in self.costs.units.items()}

    def _shrink(self, kind: Kind) -> None:
        indices, _ = least_energy(self.energy(kind), self.count(kind))
        strength = self.rates.mask * self.y[kind].to(indices.device)
        self.masked.write(kind, prox(self.masked.stacked(kind), indices, strength))

    def _ramp(self, step: int) -> None:
        rates, phases = self.rates, self.phases
        done = (step - phases.warmup) / max(1.0, 0.8 * (phases.ramp - phases.warmup))
        target = 1 - (1 - self.keep) * min(1.0, done)
        for kind in self.rho:
            self._shrink(kind)
        if self.widths is None:
            for kind in self.rho:
                self.rho[kind] = self._moved(kind)
        for kind in self.rho:
            indices, _ = least_energy(self.energy(kind), self.count(kind))
            left = self.masked.stacked(kind).gather(1, indices).square().sum(1).cpu()
            self.y[kind] += rates.y * left / self.costs.units[kind]
        excess = self.costs.fraction(self._widths()) - target
        self.z = max(0.0, self.z + rates.z * self.hurry * min(0.5, max(-0.5, excess)))
        reached = self.costs.fraction(self._widths()) <= self.keep
        if self.widths is None and (reached or step >= phases.ramp):
            self._decide()

    def _moved(self, kind: Kind) -> float:
        """rho after its straight-through step: ceil counts as the identity in the gradient."""
        _, following = least_energy(self.energy(kind), self.count(kind))
        pull = float((self.y[kind] * following.cpu()).mean())
        slope = min(1.0, max(-1.0, pull - self.z * self.costs.share(kind)))
        moved = self.rho[kind] - self.rates.rho * self.hurry * slope
        units = self.costs.units[kind]
        return min(max(0.0, moved), 1 - self.levels.least()[kind] / units)

    def _decide(self) -> None:
        """Fix the widths: allowed ones that meet the budget, nearest to what was learnt."""
        ranked = {
            kind: self.energy(kind).sort(dim=1).values.mean(0).cpu().double() for kind in self.rho
        }

        def loss(kind: Kind, low: int, high: int) -> float:
            units = self.costs.units[kind]
            return float(ranked[kind][units - high : units - low].sum()) / units

        start = {kind: self.levels.at_least(kind, w) for kind, w in self._widths().items()}
        self.widths = settle(self.costs, self.levels, start, self.keep, loss)

    def _kill(self) -> None:
        if self.widths is None:
            self._decide()
        if self._residual() > self.rates.residual:
            for kind in self.y:
                self.y[kind] = (self.y[kind] * self.growth).clamp(max=self.rates.cap)
        for kind in self.rho:
            self._shrink(kind)

    def _residual(self) -> float:
        worst = 0.0
        for kind in self.rho:
            count = self.count(kind)
            masks = self.masked.stacked(kind).abs()
            indices, _ = least_energy(self.energy(kind), count)
            gone = torch.zeros_like(masks, dtype=torch.bool).scatter(1, indices, True)
            if count:
                typical = float(masks[~gone].median())
                worst = max(worst, float(masks[gone].max()) / max(typical, 1e-12))
        return worst

    def _cut(self) -> None:
        if self.widths is None:
            self._decide()
        self.residual = self._residual()
        kept: dict[str, Tensor] = {}
        for kind in self.rho:
            sites = [site for site in self.masked.sites if site.kind == kind]
            order = self.energy(kind).argsort(dim=1, stable=True)[:, self.count(kind) :]
            kept |= {site.name: row for site, row in zip(sites, order, strict=True)}
        self.masked.cut(kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves but the masks, which are the model's."""
        return {
            "rho": self.rho,
            "y": {kind: y.tolist() for kind, y in self.y.items()},
            "z": self.z,
            "widths": self.widths,
            "residual": self.residual,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.rho, self.z = state["rho"], state["z"]
        self.y = {kind: torch.tensor(y) for kind, y in state["y"].items()}
        self.widths, self.residual = state["widths"], state["residual"]
