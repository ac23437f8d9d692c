"""One-shot rankings of units, the baselines of MaskPrune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serval.compress.maskprune.masks import MaskedDecoder, MaskedLinear
from serval.compress.maskprune.pruner import OneShot, Task
from serval.compress.maskprune.units import Site
from serval.models.batch import PackedBatch
from serval.train.loss import LanguageModelLoss


class Magnitude(OneShot):
    """The Euclidean norm of all a unit's weights."""

    def scores(self, task: Task) -> dict[str, Tensor]:
        """See the class."""
        return {
            site.name: unit_sums(task.masked, site, lambda w: w.float().square()).sqrt()
            for site in task.masked.sites
        }


class Wanda(OneShot):
    """sum_ij |W_ij| |x_j| over a unit's columns of its output matrix, |x_j| the norm of an input
    over the calibration tokens: Wanda's score (arXiv 2306.11695, eq. 1), summed by unit."""

    def scores(self, task: Task) -> dict[str, Tensor]:
        """See the class."""
        squares: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                seen = args[0].detach().float().flatten(0, -2).square().sum(0)
                squares[name] = squares.get(name, 0) + seen

            return hook

        masked = task.masked
        handles = [m.register_forward_pre_hook(watch(n)) for n, m in masked.masks.items()]
        try:
            with torch.no_grad():
                for batch in task.batches:
                    packed = PackedBatch.from_lengths(batch.lengths, batch.tokens.device)
                    masked.decoder(batch.tokens, packed)
        finally:
            for handle in handles:
                handle.remove()
        scores = {}
        for site in masked.sites:
            weight = _plain(masked.masks[site.name]).weight.detach().float()
            columns = weight.abs().sum(0) * squares[site.name].sqrt()
            scores[site.name] = columns.view(site.units, site.columns).sum(1)
        return scores


class Taylor(OneShot):
    """sum |w dL/dw| over all a unit's weights, gradients summed over the calibration batches: the
    first-order, element-wise importance of LLM-Pruner (arXiv 2305.11627, eq. 5), by group."""

    def scores(self, task: Task) -> dict[str, Tensor]:
        """See the class."""
        masked = task.masked
        tensors = [t for site in masked.sites for t, _ in _tensors(masked, site)]
        loss = LanguageModelLoss(masked.decoder)
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            for batch in task.batches:
                (loss(batch)[0] / batch.weights.sum().clamp(min=1e-9)).backward()

        def importance(weight: Tensor) -> Tensor:
            slope = torch.zeros_like(weight) if weight.grad is None else weight.grad
            return (weight.detach() * slope).float().abs()

        scores = {site.name: unit_sums(masked, site, importance) for site in masked.sites}
        masked.decoder.zero_grad(set_to_none=True)
        for tensor in tensors:
            tensor.requires_grad_(False)
        return scores


@dataclass
class Random(OneShot):
    """Units by lot, drawn with the run's seed."""

    def scores(self, task: Task) -> dict[str, Tensor]:
        """See the class."""
        generator = torch.Generator().manual_seed(task.seed)
        return {s.name: torch.rand(s.units, generator=generator) for s in task.masked.sites}


class Uniform(OneShot):
    """No ranking: evenly spaced units of every layer, whatever they hold."""

    def scores(self, task: Task) -> dict[str, Tensor]:
        """The bit-reversed index: any number of highest scores is spread over the layer."""
        return {site.name: 1 - _bit_reversed(site.units) for site in task.masked.sites}


def unit_sums(masked: MaskedDecoder, site: Site, value: Callable[[Tensor], Tensor]) -> Tensor:
    """`value` of each tensor of a site (of its shape), summed over each unit's entries: [units]."""
    total = torch.zeros(site.units, device=masked.masks[site.name].mask.device)
    for tensor, by_column in _tensors(masked, site):
        values = value(tensor).detach()
        if by_column:
            total += values.view(-1, site.units, site.columns).sum((0, 2))
        else:
            total += values.reshape(site.units, -1).sum(1)
    return total


def _tensors(masked: MaskedDecoder, site: Site) -> Iterator[tuple[Tensor, bool]]:
    """(weight or bias, whether units lie along its columns) of a site's matrices."""
    owner = masked.decoder.get_submodule(site.name)
    for attribute in site.rows:
        part = getattr(owner, attribute)
        if isinstance(part, nn.Parameter):
            yield part, False
            continue
        linear = _plain(part)
        yield linear.weight, False
        if linear.bias is not None:
            yield linear.bias, False
    yield _plain(getattr(owner, site.output)).weight, True


def _plain(module: nn.Module) -> nn.Linear:
    """The linear layer inside a mask and a low-rank update."""
    while not isinstance(module, nn.Linear):
        inner = module.inner if isinstance(module, MaskedLinear) else module.base
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def _bit_reversed(count: int) -> Tensor:
    """Van der Corput's sequence in base 2: float32 [count] in [0, 1)."""
    index, place, found = torch.arange(count), 0.5, torch.zeros(count)
    while index.any():
        found += place * (index & 1)
        index, place = index >> 1, place / 2
    return found
