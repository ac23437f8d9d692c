"""What can be pruned: heads and channels of a decoder, what they cost, which widths are allowed.

A unit is a group of query heads with its key-value head (MLA: one head), or one intermediate
channel of a dense feed-forward layer. All layers keep the same number of units of a kind. Experts
keep their width; a mixture's dense layers and its attention are pruned.

    R(k) = (fixed + sum_i c_i k_i) / (fixed + sum_i c_i N_i)

with k_i units of kind i kept in every layer and c_i what one of them costs over all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from serval.errors import ConfigError
from serval.models.attention import GroupedQueryAttention, LatentAttention
from serval.models.decoder import Decoder
from serval.models.feedforward import GatedMLP
from serval.models.moe import MixtureOfExperts
from serval.train.throughput import ModelFlops

Kind = Literal["heads", "channels"]
Measure = Literal["parameters", "blocks", "flops"]
Widths = dict[Kind, int]

KINDS: tuple[Kind, ...] = get_args(Kind)
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Site:
    """One attention or feed-forward module whose units can be removed.

    name: of the module in the decoder. rows: its matrices (or vectors) that hold rows per unit,
    and how many. output: its matrix that holds `columns` input columns per unit; masks multiply
    what enters it. parameters, weights: of one unit, with and without biases; pairs: products of
    one unit per (query, key) pair.
    """

    kind: Kind
    name: str
    units: int
    rows: Mapping[str, int]
    output: str
    columns: int
    parameters: int
    weights: int
    pairs: int


def find_sites(decoder: Decoder) -> list[Site]:
    """Every site of `decoder`. Raises ConfigError for a model that cannot be pruned."""
    if decoder.quantization_config is not None:
        raise ConfigError(
            "the model is already quantised; prune the checkpoint it was made from, then quantise"
        )
    if decoder.mtp is not None:
        raise ConfigError(
            f"the model has a multi-token-prediction head (num_mtp_layers "
            f"{decoder.config.num_mtp_layers}), whose block shares the widths of the layers and is "
            "not trained here; pruning needs a model without one"
        )
    shared = {
        id(module.shared_experts)
        for module in decoder.modules()
        if isinstance(module, MixtureOfExperts)
    }
    sites = []
    for name, module in decoder.named_modules():
        if isinstance(module, GroupedQueryAttention):
            sites.append(_grouped(name, module))
        elif isinstance(module, LatentAttention):
            sites.append(_latent(name, module))
        elif isinstance(module, GatedMLP) and id(module) not in shared:
            width = module.down_proj.in_features
            sites.append(
                _site("channels", name, module, width, {"gate_proj": 1, "up_proj": 1}, 1, 0)
            )
    return sites


def _grouped(name: str, module: GroupedQueryAttention) -> Site:
    group, width = module.num_heads // module.num_key_value_heads, module.head_dim
    rows = {"q_proj": group * width, "k_proj": width, "v_proj": width}
    if module.sinks is not None:
        rows["sinks"] = group
    pairs = 2 * group * width
    return _site("heads", name, module, module.num_key_value_heads, rows, group * width, pairs)


def _latent(name: str, module: LatentAttention) -> Site:
    mla = module.mla
    queries = "q_proj" if mla.q_lora_rank is None else "q_b_proj"
    rows = {queries: module.q_width, "kv_b_proj": mla.qk_nope_head_dim + mla.v_head_dim}
    pairs = module.q_width + mla.v_head_dim
    return _site("heads", name, module, module.num_heads, rows, mla.v_head_dim, pairs)


def _site(
    kind: Kind,
    name: str,
    module: nn.Module,
    units: int,
    rows: dict[str, int],
    columns: int,
    pairs: int,
) -> Site:
    output = "down_proj" if kind == "channels" else "o_proj"
    weights: int = columns * getattr(module, output).out_features
    extra = 0
    for attribute, count in rows.items():
        part = getattr(module, attribute)
        if isinstance(part, nn.Linear):
            weights += count * part.in_features
            extra += count if part.bias is not None else 0
        else:
            extra += count
    return Site(kind, name, units, rows, output, columns, weights + extra, weights, pairs)


@dataclass(frozen=True)
class Costs:
    """The model R(k) of the module's text. per_unit, units: by kind."""

    fixed: float
    per_unit: dict[Kind, float]
    units: Widths

    @classmethod
    def of(cls, decoder: Decoder, sites: Sequence[Site], measure: Measure, context: int) -> Costs:
        """measure: "parameters" of the whole model; "blocks": those that can be pruned; "flops" of
        one token at `context` tokens. Call it while all parameters are trainable."""
        if measure not in MEASURES:
            raise ConfigError(f"budget is {measure!r}; expected one of {', '.join(MEASURES)}")
        per_unit: dict[Kind, float] = {}
        units: Widths = {}
        for site in sites:
            cost: float = site.parameters
            if measure == "flops":
                cost = 6.0 * (site.weights + site.pairs * (context + 1) / 2)
            per_unit[site.kind] = per_unit.get(site.kind, 0.0) + cost
            units[site.kind] = site.units
        prunable = sum(per_unit[kind] * units[kind] for kind in units)
        whole = prunable
        if measure == "parameters":
            whole = sum(p.numel() for p in decoder.parameters())
        elif measure == "flops":
            flops = ModelFlops.of(decoder)
            whole = flops.per_token + flops.per_pair * (context + 1) / 2
        return cls(whole - prunable, per_unit, units)

    def fraction(self, widths: Mapping[Kind, float]) -> float:
        """R: the share of the whole cost that `widths` leave."""
        kept = sum(self.per_unit[kind] * width for kind, width in widths.items())
        return (self.fixed + kept) / self.whole

    def share(self, kind: Kind) -> float:
        """w_i: the share of the whole cost that all units of `kind` have."""
        return self.per_unit[kind] * self.units[kind] / self.whole

    @property
    def whole(self) -> float:
        return self.fixed + sum(self.per_unit[kind] * n for kind, n in self.units.items())


@dataclass(frozen=True)
class Levels:
    """Which widths are allowed, ascending, by kind; the last is the unpruned one."""

    allowed: dict[Kind, list[int]]

    @classmethod
    def of(cls, costs: Costs, multiple: int) -> Levels:
        """Any number of heads; channels in multiples of `multiple`."""
        if multiple < 1:
            raise ConfigError(f"multiple is {multiple}; expected at least 1 (8 or 64 suit kernels)")
        steps: dict[Kind, int] = {"heads": 1, "channels": multiple}
        allowed = {}
        for kind, units in costs.units.items():
            allowed[kind] = [*range(steps[kind], units, steps[kind]), units]
        return cls(allowed)

    def least(self) -> Widths:
        return {kind: widths[0] for kind, widths in self.allowed.items()}

    def at_most(self, kind: Kind, width: float) -> int:
        """The largest allowed width that is not above `width`; the least one if all are."""
        below = [w for w in self.allowed[kind] if w <= width + 1e-6]
        return below[-1] if below else self.allowed[kind][0]

    def at_least(self, kind: Kind, width: int) -> int:
        return next(w for w in self.allowed[kind] if w >= width)

    def neighbour(self, kind: Kind, width: int, step: int) -> int | None:
        """The allowed width `step` (-1 or 1) further; None past the ends."""
        index = self.allowed[kind].index(width) + step
        return self.allowed[kind][index] if 0 <= index < len(self.allowed[kind]) else None


def check_budget(costs: Costs, levels: Levels, keep: float) -> None:
    """Raises ConfigError when no allowed widths meet the budget `keep`."""
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; expected a share above 0, at most 1")
    least = levels.least()
    floor = costs.fraction(least)
    if floor > keep:
        narrowest = ", ".join(f"{width} {kind}" for kind, width in least.items())
        raise ConfigError(
            f"keep {keep} cannot be met: with {narrowest} per layer, the least there can be, "
            f"{floor:.3f} of the cost remains; give at least that, or a smaller multiple"
        )


def even_widths(costs: Costs, levels: Levels, keep: float) -> Widths:
    """The same share of every kind, as nearly as allowed; the finest kind takes up the rest."""
    check_budget(costs, levels, keep)
    prunable = sum(costs.share(kind) for kind in costs.units)
    share = 1 - (1 - keep) / prunable
    widths: Widths = {}
    for kind, units in costs.units.items():
        allowed = levels.allowed[kind]
        widths[kind] = min(allowed, key=lambda width: abs(width - share * units))
    return settle(costs, levels, widths, keep, lambda kind, low, high: (high - low) / high)


def settle(
    costs: Costs,
    levels: Levels,
    widths: Widths,
    keep: float,
    loss: Callable[[Kind, int, int], float],
) -> Widths:
    """Allowed widths near `widths` that meet the budget and leave no step of it unused.

    widths: allowed ones. loss(kind, low, high): what a layer loses when `high` units become `low`.
    While the budget is exceeded the step that loses least per cost is taken, then those steps back
    that fit and win most.
    """
    check_budget(costs, levels, keep)
    widths = dict(widths)

    def price(kind: Kind, low: int, high: int) -> float:
        return loss(kind, low, high) / (costs.per_unit[kind] * (high - low))

    while costs.fraction(widths) > keep + 1e-9:
        steps = [
            (price(kind, below, width), kind, below)
            for kind, width in widths.items()
            if (below := levels.neighbour(kind, width, -1)) is not None
        ]
        _, kind, below = min(steps)
        widths[kind] = below
    while True:
        steps = [
            (price(kind, width, above), kind, above)
            for kind, width in widths.items()
            if (above := levels.neighbour(kind, width, 1)) is not None
            and costs.fraction({**widths, kind: above}) <= keep + 1e-9
        ]
        if not steps:
            return widths
        _, kind, above = max(steps)
        widths[kind] = above
