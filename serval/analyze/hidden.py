"""Hidden states: massive activations and outliers, layer by layer.

Massive activations: Sun et al., arXiv 2402.17762. Kurtosis and largest absolute value of a layer's
output: Bondarenko et al., arXiv 2306.12929 (mu4 / (std^4 + 1e-6), 3 for a Gaussian).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serval.models.decoder import Decoder

LARGE, RATIO = 100.0, 1000.0  # Sun et al.: |h| > 100 and > 1000 times the median


@dataclass(frozen=True)
class Activation:
    """One number of a hidden state."""

    token: int  # position in its document
    channel: int
    value: float


@dataclass
class HiddenStats:
    """One layer's hidden states of one document.

    median: of |h|; largest: the three numbers of largest magnitude; massive: how many satisfy Sun
    et al.'s definition; kurtosis: over channels, averaged over tokens; peak: max |h|; channels:
    max over tokens of |h| per channel [D]; first_norm, typical_norm: |h_0| and the median |h_t|.
    """

    median: float
    largest: list[Activation]
    massive: int
    kurtosis: float
    peak: float
    channels: Tensor
    first_norm: float
    typical_norm: float


def kurtosis(x: Tensor) -> Tensor:
    """mu4 / (std^4 + 1e-6) along the last axis: [..., D] -> [...]; 3 for a Gaussian."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.pow(4).mean(-1) / (variance.square() + 1e-6)


def massive(x: Tensor, large: float = LARGE, ratio: float = RATIO) -> Tensor:
    """Which numbers of hidden states [T, D] are massive activations: bool [T, D]."""
    size = x.float().abs()
    return (size > large) & (size > ratio * size.median())


def describe(x: Tensor) -> HiddenStats:
    """Statistics of one document's hidden states [T, D] after one layer."""
    x = x.detach().float()
    size = x.abs()
    top = size.flatten().topk(min(3, size.numel())).indices.tolist()
    width = x.shape[1]
    norms = x.norm(dim=-1)
    return HiddenStats(
        median=size.median().item(),
        largest=[Activation(i // width, i % width, x[i // width, i % width].item()) for i in top],
        massive=int(massive(x).sum()),
        kurtosis=kurtosis(x).mean().item(),
        peak=size.max().item(),
        channels=size.amax(0).cpu(),
        first_norm=norms[0].item(),
        typical_norm=norms.median().item(),
    )


@contextmanager
def watch_layers(decoder: Decoder, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call see(layer, hidden [T, D]) with the residual stream after each block."""

    def hook(layer: int) -> Callable[..., None]:
        def call(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            x, residual = output
            see(layer, x.detach() + residual.detach())

        return call

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(decoder.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
