"""FPTQ: Fine-grained Post-Training Quantization for Large Language Models (arXiv 2308.15987).

W4A8: group-wise 4-bit weights, rounded to nearest, and a policy that picks how each layer's inputs
become int8 from the range v = max |X| that calibration saw (algorithm 1, with v0 = 15, v1 = 150):

    v <= v0        static      one scale v / 127, known beforehand
    v0 < v < v1    lae         logarithmic activation equalization, then static
    v >= v1        token       one scale per token, computed at run time

Logarithmic activation equalization (LAE) divides channel j of the input by s_j and multiplies
column j of every consumer by it; the division is folded into the norm before:

    m_j = max_t |X[t, j]|      s_j = m_j / log2(2 + m_j)      then channel j peaks at log2(2 + m_j)

q, k, v share an input and so a decision; so do gate and up, and a router and all its experts. The
static scale is that of the equalized input. Inputs of the middle class that no norm produces
(o_proj, down_proj) stay static without equalization, as in the paper.

Decided here: v is the largest absolute value; s_j is at least 1e-5 (a dead channel); an input that
calibration never saw is quantised per token. `policy="extended"` is not in the paper: it equalizes
every norm-fed input with v > v0, decides on the range after that, and takes every other input with
v > v0 per token; it does not fail when ranges exceed v1. `lae_down` folds into up_proj's rows:
silu(gate) * up is linear in up. `gptq` replaces round-to-nearest (the paper's table 7 found that it
hurts). The thresholds are absolute numbers tuned for LLaMA and BLOOM: read the printed ranges
before trusting them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from rich.table import Table
from torch import Tensor

from serval.compress.block import Block, Matrix, Site
from serval.compress.gptq import GPTQ
from serval.compress.recipe import Recipe
from serval.compress.rtn import round_to_nearest
from serval.compress.scheme import QuantizedWeight
from serval.compress.statistics import Wanted
from serval.errors import ConfigError

Policy = Literal["static", "lae", "token"]

SMALLEST_SCALE = 1e-5


def equalization_scale(largest: Tensor) -> Tensor:
    """LAE's s [K] of the channels' largest magnitudes m [K]: m / log2(2 + m), at least 1e-5."""
    return (largest / torch.log2(2 + largest)).clamp_min(SMALLEST_SCALE)


@dataclass(frozen=True)
class Decision:
    """What the policy does with one input.

    range: v, before equalization. equalized: whether LAE is folded. after: the range then. policy:
    the class of algorithm 1. activations: how the input is rounded.
    """

    policy: Policy
    range: float
    equalized: bool
    after: float
    activations: Literal["static", "token"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "policy": self.policy,
            "range": round(self.range, 4),
            "equalized": self.equalized,
            "after": round(self.after, 4),
            "activations": self.activations,
        }


@dataclass
class FPTQ(Recipe):
    """Parameters: v0, v1: the bounds of the three classes. policy: "paper" or "extended". stat: a
    channel's magnitude m_j: "abs_max" (paper) or "range", its largest minus its smallest value
    (llm-compressor). mid_mode: how an equalized input is rounded. lae_down: equalize the inputs of
    down_proj too. gptq: GPTQ instead of round-to-nearest."""

    v0: float = 15.0
    v1: float = 150.0
    policy: Literal["paper", "extended"] = "paper"
    stat: Literal["abs_max", "range"] = "abs_max"
    mid_mode: Literal["static", "token"] = "static"
    lae_down: bool = False
    gptq: bool = False

    statistics: ClassVar[frozenset[Wanted]] = frozenset({"range"})

    def __post_init__(self) -> None:
        if self.gptq:
            self.statistics = frozenset({"range", "hessian"})  # type: ignore[misc]  # of this one
        self._solver = GPTQ()
        if not self.v0 <= self.v1:
            raise ConfigError(f"FPTQ needs v0 <= v1, got v0={self.v0} and v1={self.v1}")

    def magnitudes(self, site: Site) -> Tensor | None:
        """m [K] of a site's inputs, or None when calibration saw none."""
        seen = site.statistics
        if not seen:
            return None
        if self.stat == "abs_max":
            return site.abs_max
        low = torch.stack([part.low for part in seen if part.low is not None]).amin(0)
        high = torch.stack([part.high for part in seen if part.high is not None]).amax(0)
        return high - low

    def decide(self, v: float, after: float, foldable: bool) -> Decision:
        """Algorithm 1, or its extension, for an input of range `v` (0: calibration saw nothing).

        foldable: whether LAE can be folded into what produces it; after: its range if it is.
        """
        if v == 0.0:
            return Decision("token", v, False, v, "token")
        if v <= self.v0:
            return Decision("static", v, False, v, "static")
        if self.policy == "extended":
            if foldable and after <= self.v0:
                return Decision("lae", v, True, after, self.mid_mode)
            return Decision("token", v, foldable, after if foldable else v, "token")
        if v >= self.v1:
            return Decision("token", v, False, v, "token")
        return Decision("lae", v, foldable, after if foldable else v, self.mid_mode)

    def can_fold(self, site: Site) -> bool:
        """Whether LAE may be folded before this input."""
        if not site.place.foldable:
            return False
        down = site.place.name.endswith("down_proj")
        return site.place.norm is not None or (self.lae_down and down)

    def plan_block(self, block: Block) -> dict[str, Decision]:
        """The decision of each input of a block, by its site's checkpoint name."""
        return {site.name: self._decide_site(site) for site in block.sites}

    def _decide_site(self, site: Site) -> Decision:
        magnitudes, largest = self.magnitudes(site), site.abs_max
        if magnitudes is None or largest is None:
            return self.decide(0.0, 0.0, False)
        after = float((largest / equalization_scale(magnitudes)).max())
        return self.decide(float(magnitudes.max()), after, self.can_fold(site))

    def apply_plan(self, block: Block, plan: dict[str, Decision]) -> None:
        """Fold LAE where the plan says so and set each matrix's activation scheme."""
        for site in block.sites:
            decision = plan[site.name]
            magnitudes = self.magnitudes(site)
            if decision.equalized and magnitudes is not None:
                site.fold(equalization_scale(magnitudes))
            for matrix in site.matrices:
                if matrix.scheme is not None and matrix.scheme.activations != "none":
                    matrix.scheme = replace(matrix.scheme, activations=decision.activations)

    def prepare_block(self, block: Block) -> dict[str, Any]:
        plan = self.plan_block(block)
        self.apply_plan(block, plan)
        return {name: decision.to_dict() for name, decision in plan.items()}

    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        return self._solver.quantize(matrix) if self.gptq else round_to_nearest(matrix)

    def reround(self, matrix: Matrix, scales: Tensor) -> Tensor:
        if self.gptq:
            return self._solver.reround(matrix, scales)
        return super().reround(matrix, scales)

    def table(self, plan: dict[str, Any]) -> Table:
        return plan_table(plan)


def plan_table(plan: dict[str, dict[str, Any]]) -> Table:
    """A plan (entries of `Decision.to_dict` by name) as a table, with a histogram of the ranges in
    its caption: whether v0 and v1 suit the model shows there."""
    table = Table(caption=f"ranges: {range_histogram(plan)}", caption_justify="left")
    table.add_column("input of", overflow="fold")
    for name in ("range", "policy", "equalized to", "activations"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name, entry in plan.items():
        after = f"{entry['after']:.2f}" if entry["equalized"] else ""
        stuck = entry["policy"] == "lae" and not entry["equalized"]
        policy = "lae, no norm" if stuck else entry["policy"]
        values = (f"{entry['range']:.2f}", policy, after, entry["activations"])
        table.add_row(name, *values)
    return table


def range_histogram(plan: dict[str, dict[str, Any]]) -> str:
    """How many inputs have a range up to 1, 2, 4, ... for example "<=8: 3, <=16: 5"."""
    edges: dict[int, int] = {}
    for entry in plan.values():
        edge = 1
        while edge < entry["range"]:
            edge *= 2
        edges[edge] = edges.get(edge, 0) + 1
    return ", ".join(f"<={edge}: {count}" for edge, count in sorted(edges.items()))
