"""OdysseyLLM: A Speed Odyssey for Deployable Quantization of LLMs (arXiv 2311.09550).

Per-channel symmetric 4-bit weights, the granularity fast W4A8 kernels like, made accurate in two
steps. First symmetric learnable weight clipping, one gamma and beta per output channel (or group):

    S = max(|gamma max(W_n)|, |beta min(W_n)|) / 7       gamma = sigmoid(u), beta = sigmoid(l)
    W_q = S clamp(round(W / S), -8, 7)                   u, l start at 4; rounding straight through

and then GPTQ with S frozen. Activations are int8 per token. Two ways to learn u and l:

    clip="block"    AdamW on the error of the whole block's output, on the inputs that the quantised
                    blocks before produce, with rounded activations (OmniQuant's training, which the
                    paper follows)
    clip="hessian"  per matrix, Adam on tr((W_q - W) H (W_q - W)^T), H = X^T X; rows are independent
    clip="grid"     the same error for 80 shrinks of the scale from 1 to 0.2; "none": no clipping

Decided here: "hessian" is the default, for its cost. Of all (u, l) visited, and no clipping, each
row keeps the best, so clipping never does worse than its start. Up to 512 calibration inputs stand
for H where K is large. A clip value learnt in a block is thrown away if the block's error did not
fall. -8 stays a code, as the equation has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from serval.compress.awq import clipped_scales
from serval.compress.block import Block, Matrix
from serval.compress.gptq import GPTQ, gptq
from serval.compress.recipe import Count, Positive, Recipe
from serval.compress.rtn import round_to_nearest
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.compress.statistics import InputStatistics, Wanted
from serval.errors import ConfigError

START = 4.0
SMALLEST, LARGEST = 1e-5, 1e4  # of a scale, as OmniQuant clamps it
_ROWS_AT_ONCE = 1024


@dataclass
class Odyssey(Recipe):
    """Parameters: clip: "hessian", "grid", "block" or "none". steps, rate: of Adam for "hessian";
    epochs, block_rate: passes over the samples and learning rate for "block". compensate: GPTQ with
    the learnt scales (otherwise rounding to nearest). damping: of GPTQ."""

    clip: Literal["hessian", "grid", "block", "none"] = "hessian"
    steps: Count = 60
    rate: Positive = 0.1
    epochs: Count = 10
    block_rate: Positive = 0.01
    compensate: bool = True
    damping: Positive = 0.01
    _scales: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    default_scheme: ClassVar[WeightScheme] = WeightScheme(bits=4, group_size=None)
    statistics: ClassVar[frozenset[Wanted]] = frozenset({"hessian", "rows"})
    inputs: ClassVar[Literal["float", "quantized"]] = "quantized"
    stepwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"odyssey {name}={getattr(self, name)}: expected at least 1")
        self.wants_data = self.clip == "block"  # type: ignore[misc]  # of this one
        self._solver = GPTQ(damping=self.damping, act_order=False)

    def prepare_block(self, block: Block) -> dict[str, Any]:
        """Learns the clipping of the whole block when `clip="block"`."""
        self._scales = {}
        if self.clip != "block" or block.data is None:
            return {}
        matrices = {m.path: m for m in block.matrices if m.scheme is not None}
        data = block.data

        def loss(weights: dict[str, Tensor], sample: int) -> Tensor:
            made = data.run(data.inputs[sample], weights)
            return (made - data.targets[sample]).square().mean()

        weights = {path: matrix.weight for path, matrix in matrices.items()}
        schemes = {path: m.scheme for path, m in matrices.items() if m.scheme is not None}
        self._scales, before, after = learn_block(
            weights, schemes, loss, len(data.inputs), self.epochs, self.block_rate
        )
        return {block.name: {"error before clipping": before, "after": after}}

    def quantize(self, matrix: Matrix) -> QuantizedWeight:
        statistics = matrix.statistics
        assert matrix.scheme is not None
        if statistics is None or statistics.hessian is None:
            return round_to_nearest(matrix)
        scales = self._clip(matrix, matrix.scheme, statistics)
        if not self.compensate:
            return quantize(matrix.weight, matrix.scheme, matrix.scale_dtype, scales)
        factor = self._solver.factor(statistics)
        return gptq(matrix.weight, factor, matrix.scheme, matrix.scale_dtype, scales=scales)

    def reround(self, matrix: Matrix, scales: Tensor) -> Tensor:
        if self.compensate:
            return self._solver.reround(matrix, scales)
        return super().reround(matrix, scales)

    def _clip(self, matrix: Matrix, scheme: WeightScheme, seen: InputStatistics) -> Tensor | None:
        assert seen.hessian is not None
        if self.clip == "hessian":
            metric = Metric.of(seen)
            return learn_clipping(matrix.weight, metric, scheme, self.steps, self.rate)
        if self.clip == "grid":
            assert seen.rows is not None
            return clipped_scales(
                matrix.weight, seen.rows, scheme, matrix.scale_dtype, steps=80, shrink=0.01
            )
        return self._scales.get(matrix.path)


@dataclass(frozen=True)
class Metric:
    """H [K, K], or a root of it [K, S] with H = root root^T when S is much smaller than K."""

    hessian: Tensor | None = None
    root: Tensor | None = None

    @classmethod
    def of(cls, seen: InputStatistics) -> Metric:
        """Of calibration inputs: the kept rows where two thin products cost less than one by H."""
        if seen.rows is not None and 2 * len(seen.rows) < seen.width:
            return cls(root=seen.rows.T * (seen.count / len(seen.rows)) ** 0.5)
        return cls(hessian=seen.hessian)

    def times(self, error: Tensor) -> Tensor:
        """error [N, K] times H."""
        if self.root is not None:
            return (error @ self.root) @ self.root.T
        assert self.hessian is not None
        return error @ self.hessian


def clipped_scale(top: Tensor, bottom: Tensor, u: Tensor, lower: Tensor, highest: int) -> Tensor:
    """S [N, G] of the groups' largest and smallest weights and the learnt u, l, all [N, G]."""
    reach = torch.maximum((u.sigmoid() * top).abs(), (lower.sigmoid() * bottom).abs())
    return (reach / highest).clamp(SMALLEST, LARGEST)


@torch.no_grad()
def learn_clipping(
    weight: Tensor, metric: Metric, scheme: WeightScheme, steps: int = 60, rate: float = 0.1
) -> Tensor:
    """The scales float32 [N, G] that Adam finds to lower tr((W_q - W) H (W_q - W)^T) for `weight`
    [N, K]; each row keeps the best it visited."""
    groups = scheme.groups(weight.shape[1])
    parts = [
        _learn_rows(part.float().view(len(part), groups, -1), metric, scheme, steps, rate)
        for part in weight.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(parts)


def _learn_rows(
    weight: Tensor, metric: Metric, scheme: WeightScheme, steps: int, rate: float
) -> Tensor:
    """`learn_clipping` for rows [N, G, g]. The gradient is written out: rounding passes straight
    through and the clamp cuts it off, so dW_q / dS is the code, less W / S where not clamped."""
    top, bottom = weight.amax(-1), weight.amin(-1)
    u, lower = (torch.full_like(top, START) for _ in range(2))
    optimizer = torch.optim.Adam([u, lower], lr=rate)
    best = (torch.maximum(top.abs(), bottom.abs()) / scheme.highest).clamp(SMALLEST, LARGEST)
    least = _row_losses(weight, best, metric, scheme)[0]
    for _ in range(steps):
        scale = clipped_scale(top, bottom, u, lower, scheme.highest)
        losses, product, slope = _row_losses(weight, scale, metric, scheme)
        better = losses < least
        least = torch.where(better, losses, least)
        best = torch.where(better[:, None], scale, best)
        # rows differ by orders of magnitude; Adam divides each one's size out
        upstream = (product * slope).sum(-1) / losses.clamp_min(1e-30)[:, None] / scheme.highest
        for parameter, edge in ((u, top), (lower, bottom)):
            gate = parameter.sigmoid()
            largest = (gate * edge).abs() >= scale * scheme.highest * (1 - 1e-6)
            parameter.grad = upstream * largest * edge.abs() * gate * (1 - gate)
        optimizer.step()
    scale = clipped_scale(top, bottom, u, lower, scheme.highest)
    better = _row_losses(weight, scale, metric, scheme)[0] < least
    return torch.where(better[:, None], scale, best)


def _row_losses(
    weight: Tensor, scale: Tensor, metric: Metric, scheme: WeightScheme
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], their gradient by W_q and dW_q / dS, both [N, G, g])."""
    ratio = weight / scale.unsqueeze(-1)
    rounded = ratio.round()
    code = rounded.clamp(scheme.lowest, scheme.highest)
    error = code * scale.unsqueeze(-1) - weight
    product = metric.times(error.flatten(1)).view_as(error)
    slope = torch.where(rounded == code, code - ratio, code)
    return (product * error).sum((-1, -2)), 2 * product, slope


def learn_block(
    weights: dict[str, Tensor],
    schemes: dict[str, WeightScheme],
    loss: Callable[[dict[str, Tensor], int], Tensor],
    samples: int,
    epochs: int = 10,
    rate: float = 0.01,
) -> tuple[dict[str, Tensor], float, float]:
    """Scales of several matrices that lower a loss of all of them together.

    weights: name -> float32 [N, K]. loss: of fake-quantised weights on one sample, differentiable.
    Returns (name -> scales [N, G], mean loss with the scales at the start, and with those found);
    the scales are those at the start when training did not lower it.
    """
    edges: dict[str, tuple[Tensor, Tensor]] = {}
    learnt: dict[str, tuple[Tensor, Tensor]] = {}
    for name, weight in weights.items():
        grouped = weight.view(len(weight), schemes[name].groups(weight.shape[1]), -1)
        edges[name] = (grouped.amax(-1), grouped.amin(-1))
        start = torch.full_like(edges[name][0], START)
        learnt[name] = (start.clone().requires_grad_(), start.requires_grad_())

    def scales() -> dict[str, Tensor]:
        return {
            name: clipped_scale(*edges[name], *learnt[name], schemes[name].highest)
            for name in weights
        }

    def fake(made: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: fake_quantize(weights[name], made[name], schemes[name]) for name in weights}

    def mean_loss(made: dict[str, Tensor]) -> float:
        with torch.no_grad():
            rounded = fake(made)
            return sum(float(loss(rounded, sample)) for sample in range(samples)) / samples

    parameters = [parameter for pair in learnt.values() for parameter in pair]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    first = {name: made.detach() for name, made in scales().items()}
    before = mean_loss(first)
    with torch.enable_grad():
        for _ in range(epochs):
            for sample in range(samples):
                optimizer.zero_grad()
                loss(fake(scales()), sample).backward()
                optimizer.step()
    last = {name: made.detach() for name, made in scales().items()}
    after = mean_loss(last)
    return (last, before, after) if after < before else (first, before, before)


def fake_quantize(weight: Tensor, scales: Tensor, scheme: WeightScheme) -> Tensor:
    """`weight` [N, K] rounded with `scales` [N, G]; gradients reach the scales through the rounding
    (straight through) and the clamp."""
    grouped = weight.view(*scales.shape, -1)
    ratio = grouped / scales.unsqueeze(-1)
    rounded = ratio + (ratio.round() - ratio).detach()
    code = rounded.clamp(scheme.lowest, scheme.highest)
    return (code * scales.unsqueeze(-1)).view_as(weight)
