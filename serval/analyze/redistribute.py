"""Inference-only changes of the weight that sinks receive, as hooks of `HookedMemory`.

Redistribution (survey arXiv 2604.10098, eq. 19), for sinks S and targets T_i of query i:
    A~_ij = alpha A_ij                                 for j in S,
    A~_ij = A_ij + beta (sum_{s in S} A_is) / |T_i|    for j in T_i;
alpha + beta = 1 keeps the row sums. alpha = 0, beta = 1 hands everything on (VAR, AttnReal), alpha
below 1 with beta = 0 only reduces (VASparse). ZeroTuning adds b to the logit of the first token:
with A its weight, A' = A e^b / (1 + A (e^b - 1)), the others over the same denominator.

All are computed from (o, lse, q, k, v) in closed form: o is finished attention, and weights of a
few keys are exp(q.k scale - lse). Decided here: a query that sees no target keeps its output, and a
sink never is a target.

    with applied(decoder, [ZeroTuning(-1.5)]):
        hidden = decoder(tokens, PackedBatch.from_lengths([len(tokens)]))
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from serval.analyze.attention import MASKED, Attention, Hook, HookedMemory
from serval.errors import ConfigError
from serval.models.decoder import Decoder
from serval.models.memory import CausalMemory


def redistributed(
    o: Tensor,
    sink_weights: Tensor,
    sink_values: Tensor,
    target_mean: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """Eq. 19 on a finished output.

    o [n, H, Dv], sink_weights A_is [n, H, s], sink_values [s, H, Dv], target_mean [n, H, Dv] the
    mean value of each query's targets. Returns [n, H, Dv].
    """
    taken = torch.einsum("nhs,shd->nhd", sink_weights, sink_values)
    return o - (1 - alpha) * taken + beta * sink_weights.sum(-1, keepdim=True) * target_mean


def zero_tuned(
    o: Tensor, lse: Tensor, weight: Tensor, value: Tensor, b: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Add b to one key's logit in a finished output.

    o [n, H, Dv], lse [n, H], weight [n, H] of the key, value [H, Dv], b a number or [H]. Returns
    the new output and lse.
    """
    gain = torch.expm1(torch.as_tensor(b, dtype=o.dtype, device=o.device))
    factor = 1 + weight * gain
    changed = (o + (weight * gain)[..., None] * value) / factor[..., None]
    return changed, lse + factor.log()


@dataclass(frozen=True)
class Where:
    """Which layers and heads a hook changes; None: all."""

    layers: Collection[int] | None = None
    heads: Collection[int] | None = None

    def only(self, attention: Attention, changed: Tensor) -> Tensor:
        """`changed` [n, H, Dv] in the chosen heads, the present output elsewhere."""
        if self.heads is None:
            return changed
        result = attention.o.clone()
        chosen = sorted(self.heads)
        result[:, chosen] = changed[:, chosen].to(result.dtype)
        return result

    def skips(self, attention: Attention) -> bool:
        return self.layers is not None and attention.layer not in self.layers


@dataclass(frozen=True)
class Redistribute:
    """Eq. 19 as a hook. sinks: key positions; targets: key positions (None: every other key)."""

    alpha: float = 0.0
    beta: float = 1.0
    sinks: Sequence[int] = (0,)
    targets: Sequence[int] | None = None
    where: Where = Where()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.beta < 0:
            raise ConfigError(
                f"redistribution got alpha {self.alpha} and beta {self.beta}; it expects alpha in "
                "[0, 1] and beta of at least 0 (alpha + beta = 1 keeps the row sums)"
            )

    def __call__(self, attention: Attention) -> Tensor | None:
        a = attention
        stored = a.k.shape[0]
        sinks = torch.tensor([s for s in self.sinks if s < stored], device=a.q.device)
        if self.where.skips(a) or not sinks.numel():
            return None
        weights = a.weights_of(sinks)
        mean, count = self._target_mean(a, stored)
        changed = redistributed(
            a.o.float(), weights, a.for_queries(a.v[sinks]).float(), mean, self.alpha, self.beta
        )
        if self.beta:
            changed = torch.where((count > 0)[:, None, None], changed, a.o.float())
        return self.where.only(a, changed)

    def _target_mean(self, a: Attention, stored: int) -> tuple[Tensor, Tensor]:
        """Mean value [n, H, Dv] of the targets that each query sees, and their number [n]."""
        is_target = torch.zeros(stored, dtype=torch.float64, device=a.q.device)
        if self.targets is None:
            is_target += 1
        else:
            is_target[[t for t in self.targets if t < stored]] = 1
        is_target[[s for s in self.sinks if s < stored]] = 0
        sums = (a.v.double() * is_target[:, None, None]).cumsum(0)  # a prefix sum per key position
        counts = is_target.cumsum(0)
        last = torch.arange(a.first, stored, device=a.q.device)
        total, count = sums[last], counts[last]
        if a.window is not None:
            before = last - a.window
            inside = (before >= 0).double()
            total = total - sums[before.clamp(min=0)] * inside[:, None, None]
            count = count - counts[before.clamp(min=0)] * inside
        mean = total / count.clamp(min=1)[:, None, None]
        group = a.q.shape[1] // a.v.shape[1]
        return mean.repeat_interleave(group, dim=1).float(), count


def var(targets: Sequence[int] | None = None, sinks: Sequence[int] = (0,)) -> Redistribute:
    """Hand all of the sinks' weight to the targets (alpha 0, beta 1)."""
    return Redistribute(0.0, 1.0, sinks, targets)


def vasparse(alpha: float = 0.5, sinks: Sequence[int] = (0,)) -> Redistribute:
    """Only reduce the sinks' weight (beta 0); rows then sum to less than 1."""
    return Redistribute(alpha, 0.0, sinks)


@dataclass(frozen=True)
class ZeroTuning:
    """Add `b` to the logit of key `key`: below 0 frees its weight for all others in proportion.
    b: a number, or one per head [H]."""

    b: float | Tensor = -1.0
    key: int = 0
    where: Where = Where()

    def __call__(self, attention: Attention) -> Tensor | None:
        a = attention
        if self.where.skips(a) or self.key >= a.k.shape[0]:
            return None
        if isinstance(self.b, float | int) and math.isinf(self.b):
            raise ConfigError(f"ZeroTuning takes a finite b, got {self.b}; use MaskKeys to remove")
        if a.function is not None:
            raise ConfigError(
                f"layer {a.layer} computes its weights with {type(a.function).__name__}; "
                "ZeroTuning's closed form holds for softmax attention"
            )
        key = torch.tensor([self.key], device=a.q.device)
        value = a.for_queries(a.v[key])[0].float()
        changed, _ = zero_tuned(a.o.float(), a.lse, a.weights_of(key)[..., 0], value, self.b)
        return self.where.only(a, changed)


@dataclass(frozen=True)
class ZeroValue:
    """The keys keep their weight but add nothing: their values count as 0."""

    keys: Sequence[int] = (0,)
    where: Where = Where()

    def __call__(self, attention: Attention) -> Tensor | None:
        a = attention
        keys = torch.tensor([s for s in self.keys if s < a.k.shape[0]], device=a.q.device)
        if self.where.skips(a) or not keys.numel():
            return None
        taken = torch.einsum("nhs,shd->nhd", a.weights_of(keys), a.for_queries(a.v[keys]).float())
        return self.where.only(a, a.o.float() - taken)


@dataclass(frozen=True)
class MaskKeys:
    """The keys are not seen, except by queries that see nothing else.

    Computed anew rather than from the lse: a sink may hold all but 1e-7 of a row.
    """

    keys: Sequence[int] = (0,)
    where: Where = Where()

    def __call__(self, attention: Attention) -> Tensor | None:
        a = attention
        keys = [s for s in self.keys if s < a.k.shape[0]]
        if self.where.skips(a) or not keys:
            return None
        bias = torch.zeros(a.k.shape[0], device=a.q.device)
        bias[keys] = MASKED
        return self.where.only(a, a.attend(a.k, a.v, bias))


@contextmanager
def applied(decoder: Decoder, hooks: Sequence[Hook]) -> Iterator[None]:
    """While the block runs, uncached forward passes of `decoder` go through the hooks.

    Batches come from `PackedBatch.from_lengths`; one whose memory is a cache raises ConfigError (a
    cache's layout decides how its keys are stored: grow a `HookedMemory` instead).
    """

    def replace(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = kwargs["batch"] if "batch" in kwargs else args[1]
        if not isinstance(batch.memory, CausalMemory):
            raise ConfigError(
                f"hooks apply to uncached passes, got a batch whose memory is a "
                f"{type(batch.memory).__name__}; use PackedBatch.from_lengths, or step through a "
                "HookedMemory"
            )
        starts = batch.memory.starts
        counts = [b - a for a, b in pairwise(starts)]
        batch.memory = HookedMemory(hooks).batch(counts).memory
        return args, kwargs

    handle = decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def greedy(
    decoder: Decoder, prompt: Sequence[int], count: int, hooks: Sequence[Hook] = ()
) -> list[int]:
    """`count` most likely tokens after `prompt`, with the hooks applied to every step."""
    memory = HookedMemory(hooks)
    device = decoder.norm.weight.device
    tokens, found = list(prompt), []
    for _ in range(count):
        batch = memory.batch([len(tokens)], device)
        batch.logits_rows = torch.tensor([len(tokens) - 1], device=device)
        hidden = decoder(torch.tensor(tokens, device=device), batch)
        tokens = [int(decoder.logits(hidden)[0].argmax())]
        found += tokens
    return found
