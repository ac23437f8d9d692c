"""Running calibration samples through one block, with activations rounded where they will be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from serval.compress.block import Block, Site
from serval.compress.scheme import WeightScheme
from serval.models.attention import Rotary
from serval.models.batch import PackedBatch

_TOKENS_AT_ONCE = 4096


@dataclass
class BlockRunner:
    """Computes a block on samples [T, D] of the residual stream. rotary: the model's tables."""

    block: Block
    rotary: Rotary

    @torch.no_grad()
    def outputs(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """The residual stream after the block, one [T, D] per sample."""
        made: list[Tensor] = []
        for group in _groups(samples):
            lengths = [len(sample) for sample in group]
            made += self._run(torch.cat(group), lengths).split(lengths)
        return made

    @torch.no_grad()
    def observe(self, samples: Sequence[Tensor], before: list[Site]) -> None:
        """Run the samples for what hooks see, only until a linear of `before` is called."""
        with _stopping_at(before):
            for group in _groups(samples):
                with suppress(_ReachedError):
                    self._run(torch.cat(group), [len(sample) for sample in group])

    def run(self, sample: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """One sample [T, D] -> [T, D]; see `BlockData.run`. Gradients flow if they are enabled."""
        schemes = [(m.linear, m.scheme, None) for m in self.block.matrices if m.scheme]
        with rounded_inputs(schemes):
            named = {f"{path}.weight": weight for path, weight in (weights or {}).items()}
            return self._run(sample, [len(sample)], named)

    def _run(
        self, x: Tensor, lengths: list[int], weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        batch = PackedBatch.from_lengths(lengths, x.device)
        arguments = (x, None, batch, self.rotary)
        branch, residual = functional_call(self.block.module, weights or {}, arguments)
        return branch + residual


def _groups(samples: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for sample in samples:
        if group and sum(map(len, group)) + len(sample) > _TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


class _ReachedError(Exception):
    """Everything that was to be observed has been computed."""


@contextmanager
def _stopping_at(sites: list[Site]) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _ReachedError

    linears = [part.matrices[0].linear for site in sites for part in site.inputs]
    hooks = [linear.register_forward_pre_hook(stop) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def next_sites(block: Block) -> list[tuple[list[Site], list[Site]]]:
    """Each stage of a block, with the sites whose call means that the stage has been computed; none
    for experts, which call the later stage one by one."""
    stages = block.stages()
    pairs = [*pairwise(stages), (stages[-1], [])]
    return [
        (stage, after if all(len(site.inputs) == 1 for site in stage) else [])
        for stage, after in pairs
    ]


@contextmanager
def rounded_inputs(
    linears: Iterable[tuple[nn.Linear, WeightScheme, float | None]],
) -> Iterator[None]:
    """Round the inputs of linears to int8 as their schemes say while the context is open. The
    float: a static scale; None: one per token all the same."""
    hooks = [
        linear.register_forward_pre_hook(_rounder(scale))
        for linear, scheme, scale in linears
        if scheme.activations != "none"
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounder(scale: float | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(arguments[0], scale), *arguments[1:])

    return before


def rounded(x: Tensor, scale: float | None = None) -> Tensor:
    """x [..., K] as int8 reproduces it: with one scale (amax / 127) per row, or the given one.
    Gradients pass straight through."""
    with torch.no_grad():
        step = x.abs().amax(-1, keepdim=True).clamp_(min=1e-8) / 127 if scale is None else scale
        values = (x / step).round_().clamp_(-127, 127).mul_(step)
    return x + (values - x).detach() if x.requires_grad else values
