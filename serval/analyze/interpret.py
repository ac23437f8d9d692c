"""Why a sink is there: tests and views of the survey's interpretation part (arXiv 2604.10098).

No-op test: taking a sink's value away changes little, taking its key away changes much (its weight
then falls on tokens that mean something). Bias view: p_is v_s, what the sink adds, is nearly the
same vector for every query. Outlier circuit: a spike at a feed-forward layer's down projection, and
the one weight behind it (super weight, arXiv 2411.07191). Super experts (arXiv 2507.23279): experts
whose output spikes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serval.analyze.attention import Attention, Hook, HookedMemory, Store
from serval.models.decoder import Decoder
from serval.models.moe import Experts

ROWS = 256  # rows of logits that exist at a time
PERCENTILE, SHARE = 0.995, 0.1  # of a super expert


@torch.inference_mode()
def hidden_states(
    decoder: Decoder,
    tokens: Sequence[int],
    hooks: Sequence[Hook] = (),
    store: Store | None = None,
) -> Tensor:
    """Final hidden states [T, D] of one document, with hooks on its attention."""
    device = decoder.norm.weight.device
    batch = HookedMemory(hooks, store).batch([len(tokens)], device)
    return decoder(torch.tensor(list(tokens), device=device), batch)


@dataclass
class Divergence:
    """How far predictions moved: KL(before || after) in nats per token, share of positions with
    the same most likely token, over `rows` positions."""

    kl: float = 0.0
    same_top: float = 0.0
    rows: int = 0

    def add(self, other: Divergence) -> None:
        """Merge in other rows."""
        total = self.rows + other.rows
        if total:
            for name in ("kl", "same_top"):
                mine, theirs = getattr(self, name) * self.rows, getattr(other, name) * other.rows
                setattr(self, name, (mine + theirs) / total)
        self.rows = total


@torch.inference_mode()
def divergence(decoder: Decoder, before: Tensor, after: Tensor) -> Divergence:
    """Compare next-token predictions of final hidden states [R, D]."""
    kl, same = 0.0, 0
    for a in range(0, before.shape[0], ROWS):
        log_p = F.log_softmax(decoder.logits(before[a : a + ROWS]).float(), -1)
        log_q = F.log_softmax(decoder.logits(after[a : a + ROWS]).float(), -1)
        kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").double().item()
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    rows = before.shape[0]
    return Divergence(kl / rows, same / rows, rows) if rows else Divergence()


@dataclass
class BiasView:
    """What one key adds per head, b_i = A_is v_s over the queries i after it.

    norm: |mean_i b_i|; spread: sqrt(mean_i |b_i - mean b|^2) / norm, 0 for a constant bias; share:
    norm / mean_i |o_i|; correlation: of A_is with |o_i|. Each [H].
    """

    norm: Tensor
    spread: Tensor
    share: Tensor
    correlation: Tensor


def bias_view(attention: Attention, key: int = 0) -> BiasView:
    """The bias view of one layer over one whole document."""
    a = attention
    where = torch.tensor([key], device=a.q.device)
    rows = slice(max(0, key + 1 - a.first), None)
    weight = a.weights_of(where)[rows, :, 0]  # [n, H]
    value = a.for_queries(a.v[where])[0].float()
    size = a.o[rows].float().norm(dim=-1)
    mean = weight.mean(0)
    norm = mean * value.norm(dim=-1)
    spread = weight.std(0, unbiased=False) / mean.clamp(min=1e-12)
    centred = weight - mean, size - size.mean(0)
    scale = (centred[0].norm(dim=0) * centred[1].norm(dim=0)).clamp(min=1e-12)
    correlation = (centred[0] * centred[1]).sum(0) / scale
    return BiasView(norm, spread, norm / size.mean(0).clamp(min=1e-12), correlation)


@dataclass
class Spike:
    """The largest input and output of one layer's down projection.

    Channels and values of both, and the token at which the output spikes. weight: that entry
    W[output channel, input channel] (None: not stored in float); share: weight * input /
    output at the output's token: near 1 when this one weight makes the spike.
    """

    layer: int
    input_channel: int
    input_value: float
    output_channel: int
    output_value: float
    token: int
    weight: float | None = None
    share: float | None = None


@dataclass
class Circuits:
    """What `watch_circuits` finds: the greatest spike per layer, and per layer of experts the
    largest |output| of each [E]."""

    spikes: dict[int, Spike] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)

    def super_experts(self) -> list[tuple[int, int, float]]:
        """(layer, expert, peak) of experts above the 99.5th percentile of all peaks and above a
        tenth of the largest."""
        if not self.experts:
            return []
        peaks = torch.cat(list(self.experts.values()))
        bar = max(peaks.quantile(PERCENTILE).item(), SHARE * peaks.max().item())
        return [
            (layer, expert, peak)
            for layer, row in self.experts.items()
            for expert, peak in enumerate(row.tolist())
            if peak >= bar
        ]


@contextmanager
def watch_circuits(decoder: Decoder, into: Circuits | None = None) -> Iterator[Circuits]:
    """Watch every feed-forward down projection and expert stack while the block runs. into: keep
    what it holds where that is greater."""
    found = Circuits() if into is None else into
    handles = []
    for layer, block in enumerate(decoder.layers):
        for name, module in block.named_modules():
            if name.endswith("down_proj"):
                handles.append(module.register_forward_hook(_down(found, layer)))
            elif isinstance(module, Experts):
                handles.append(module.register_forward_hook(_experts(found, layer)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _down(found: Circuits, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y = inputs[0].detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        token, channel = divmod(int(y.abs().argmax()), y.shape[1])
        value = y[token, channel].item()
        known = found.spikes.get(layer)
        if known is not None and abs(known.output_value) >= abs(value):
            return
        source = int(x[token].abs().argmax())
        spike = Spike(layer, source, x[token, source].item(), channel, value, token)
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point():
            spike.weight = weight[channel, source].item()
            spike.share = spike.weight * spike.input_value / value if value else 0.0
        found.spikes[layer] = spike

    return hook


def _experts(found: Circuits, layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        counts = inputs[1]
        parts = output.detach().float().abs().split(counts)
        peaks = torch.tensor([part.max().item() if part.numel() else 0.0 for part in parts])
        known = found.experts.get(layer)
        found.experts[layer] = peaks if known is None else torch.maximum(known, peaks)

    return hook
