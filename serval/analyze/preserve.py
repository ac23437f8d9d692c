"""Keeping sinks exact in a quantised cache (survey arXiv 2604.10098, eq. 17), and which to keep.

cache = {k, v of the kept tokens, as computed} and Quant(rest). Selectors:

* `first_tokens`: the first N (preserve-first-N, N = 1..5);
* `outlier_tokens` (KVSink, arXiv 2508.04257): at the layer where outliers emerge, the tokens whose
  hidden state is largest on the channels that carry outliers in all layers; kept in every layer;
* `attended_tokens`: those with alpha_k > eps in some head of every layer from the third on, at
  most 8.

`SinkPreserving` is a `Store` of `HookedMemory`: it quantises and dequantises keys and values on
their way in, so that what a cache layout would cost can be measured without its storage.
Left open by the papers and decided here: how many channels (4) and which layer (the first at half
of the largest peak).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serval.errors import ConfigError

GROUP = 32
MAX_BITS = 8


def first_tokens(count: int, length: int) -> list[int]:
    """Positions of the first `count` tokens of `length`."""
    return list(range(min(count, length)))


def outlier_channels(peaks: Tensor, count: int = 4) -> tuple[int, list[int]]:
    """Where outliers emerge, and the channels that carry them.

    peaks: [L, D], the largest |h| of each channel after each layer, over calibration text. Returns
    (layer, channels): the first layer whose largest peak, in units of its median one, is at least
    half of any layer's; the channels largest in these units on average from there on.
    """
    size = peaks / peaks.median(dim=1, keepdim=True).values.clamp(min=1e-12)
    top = size.amax(1)
    layer = int((top >= top.max() / 2).nonzero()[0])
    return layer, size[layer:].mean(0).topk(min(count, size.shape[1])).indices.tolist()


def outlier_tokens(hidden: Tensor, channels: Sequence[int], count: int = 5) -> list[int]:
    """KVSink: positions of the `count` tokens of hidden [T, D] largest on `channels`."""
    size = hidden.float().abs()[:, list(channels)].amax(-1)
    return sorted(size.topk(min(count, hidden.shape[0])).indices.tolist())


def attended_tokens(
    alpha: Tensor, epsilon: float = 0.3, first_layer: int = 2, most: int = 8, queries: int = 16
) -> list[int]:
    """Positions that some head of every layer from `first_layer` on attends to by more than
    `epsilon`: alpha [L, H, T], the mean weight over queries that see a key. At most `most`, those
    with the largest mean. Layers 0 and 1 attend locally and do not count, unless there are no
    others; neither do the last tokens, which fewer than `queries` queries see."""
    deep = alpha[first_layer:] if alpha.shape[0] > first_layer else alpha
    deep = deep[..., : max(1, alpha.shape[-1] - queries + 1)]
    chosen = (deep > epsilon).any(1).all(0)
    size = deep.mean((0, 1)).where(chosen, torch.tensor(-1.0))
    best = size.topk(min(most, size.numel()))
    return sorted(best.indices[best.values >= 0].tolist())


def fake_quantise(x: Tensor, bits: int, kept: Tensor) -> Tensor:
    """Quantise groups along the last axis and back: x [..., n], round to 2^bits levels between each
    group's extremes, in groups of 32.

    kept: bool, broadcasts to x; such numbers are left alone and out of the extremes.
    """
    levels = 2**bits - 1
    kept = kept.expand_as(x)
    parts = []
    for part, keep in zip(x.split(GROUP, -1), kept.split(GROUP, -1), strict=True):
        infinity = torch.tensor(float("inf"), dtype=x.dtype, device=x.device)
        low = torch.where(keep, infinity, part).amin(-1, keepdim=True)
        high = torch.where(keep, -infinity, part).amax(-1, keepdim=True)
        step = ((high - low) / levels).clamp(min=1e-12)
        rounded = low + ((part - low) / step).round().clamp(0, levels) * step
        parts.append(torch.where(keep, part, rounded))
    return torch.cat(parts, -1)


def kivi(k: Tensor, v: Tensor, bits: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """KIVI's grouping (arXiv 2402.02750): keys per channel over 32 tokens, values per token over 32
    channels. k, v [n, Hkv, D], kept bool [n]."""
    keys = fake_quantise(k.permute(1, 2, 0), bits, kept).permute(2, 0, 1)
    return keys, fake_quantise(v, bits, kept[:, None, None])


def per_token(k: Tensor, v: Tensor, bits: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values per token over 32 channels."""
    rows = kept[:, None, None]
    return fake_quantise(k, bits, rows), fake_quantise(v, bits, rows)


Quantiser = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]
QUANTISERS: dict[str, Quantiser] = {"kivi": kivi, "per-token": per_token}


@dataclass(frozen=True)
class SinkPreserving:
    """Keys and values as a cache of `bits` would hand them out, but for the kept tokens.

    keep: positions, the same in every layer; a mapping gives each document its own. quantiser: a
    name of `QUANTISERS`.
    """

    bits: int = 2
    keep: Sequence[int] | Mapping[int, Sequence[int]] = ()
    quantiser: str = "kivi"

    def __post_init__(self) -> None:
        if self.quantiser not in QUANTISERS or not 1 <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"a quantised cache takes 1 to {MAX_BITS} bits and one of {', '.join(QUANTISERS)}, "
                f"got {self.bits} bits and {self.quantiser!r}"
            )

    def __call__(
        self, layer: int, document: int, first: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """k, v [n, Hkv, D] at positions first.. -> what the cache would hand out."""
        keep = self.keep.get(document, ()) if isinstance(self.keep, Mapping) else self.keep
        kept = torch.zeros(k.shape[0], dtype=torch.bool, device=k.device)
        inside = [p - first for p in keep if first <= p < first + k.shape[0]]
        kept[inside] = True
        return QUANTISERS[self.quantiser](k, v, self.bits, kept)
