"""Keys whose norms differ from token to token, and what quantising them costs.

Random keys of 4 heads and 64 channels, 512 tokens: unit noise, 4 channels of magnitude 10 per head
(shared by all tokens, as models have them), and norms as in one of three regimes:

    sinks       one token in 32 is 20 times shorter, as attention sinks are
    rare-sinks  one in 128
    modalities  every other token is 8 times longer, as when pictures and text are mixed

The error of the whole tensor hardly sees small tokens, so it is not reported. Instead: the mean
over tokens of |k' - k| / |k|, the same over the short tokens, and the error of attention outputs,
|o' - o| / |o|, for queries that put 60 % of their mass on the short tokens (OScaR, arXiv
2605.19660, on token norm imbalance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serval import kernels
from serval.cache.layouts import layout_class
from serval.cache.layouts.oscar import OScaRLayout
from serval.errors import ConfigError
from serval.kernels.oscar import reference
from serval.models.attention import AttentionSpec

HEADS, DIM, TOKENS, OUTLIERS = 4, 64, 512, 4
SPEC = AttentionSpec("gqa", HEADS, HEADS, DIM, DIM)
REGIMES = ("sinks", "rare-sinks", "modalities")


@dataclass(frozen=True)
class KeyErrors:
    """Relative errors: of all tokens, of the short ones, of attention outputs."""

    token: float
    short_token: float
    output: float


@dataclass
class Keys:
    """k, v: [TOKENS, HEADS, DIM]; short: bool [TOKENS]; q: queries [n, HEADS, DIM]."""

    k: Tensor
    v: Tensor
    q: Tensor
    short: Tensor


def draw(regime: str, seed: int) -> Keys:
    """Keys of one regime; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k = normal(TOKENS, HEADS, DIM)
    for head in range(HEADS):
        channels = torch.randperm(DIM, generator=generator)[:OUTLIERS]
        k[:, head, channels] += 10 * torch.sign(normal(OUTLIERS))
    place = torch.arange(TOKENS)
    if regime == "modalities":
        short = place % 2 == 0
        k[~short] *= 8
    elif regime in REGIMES:
        every = 32 if regime == "sinks" else 128
        short = place % every == every // 2
        k[short] /= 20
    else:
        raise ConfigError(f"unknown regime {regime!r}; choose one of: {', '.join(REGIMES)}")
    v = normal(TOKENS, HEADS, DIM)
    return Keys(k, v, normal(16, HEADS, DIM), short)


def errors(kv: str, keys: Keys) -> KeyErrors:
    """What the layout `kv`, with its options, makes of `keys`; values are left as they are."""
    kind = layout_class(kv)
    if not issubclass(kind, OScaRLayout):
        raise ConfigError(f"{kv!r} is not a layout of few bits")
    k = kernels.hadamard(keys.k) if kind.rotate else keys.k
    read, _ = reference.dequantize(
        kind.format(SPEC), *reference.quantize(kind.format(SPEC), k, keys.v)
    )
    read = kernels.hadamard(read) if kind.rotate else read
    relative = (read - keys.k).flatten(1).norm(dim=1) / keys.k.flatten(1).norm(dim=1)
    shift = _sink_shift(keys)
    wanted, found = (_outputs(keys, x, shift) for x in (keys.k, read))
    return KeyErrors(
        relative.mean().item(),
        relative[keys.short].mean().item(),
        ((found - wanted).norm() / wanted.norm()).item(),
    )


def _logits(keys: Keys, k: Tensor) -> Tensor:
    return torch.einsum("qhd,khd->hqk", keys.q, k) / math.sqrt(DIM)


def _sink_shift(keys: Keys) -> Tensor:
    """[HEADS, n, 1], what to add to the logits of short tokens so that they receive 60 %."""
    z = _logits(keys, keys.k)
    short, other = (z[..., some].logsumexp(-1) for some in (keys.short, ~keys.short))
    return (other - short + math.log(0.6 / 0.4))[..., None]


def _outputs(keys: Keys, k: Tensor, shift: Tensor) -> Tensor:
    z = _logits(keys, k) + shift * keys.short
    return torch.einsum("hqk,khd->qhd", z.softmax(-1), keys.v)
