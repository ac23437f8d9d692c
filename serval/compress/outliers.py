"""Give a model the activation outliers of a large one without changing what it computes.

Small models have no channels that are a hundred times larger than the rest, so every activation
quantiser looks lossless on them. Here a few channels of each norm's output, and a few hidden units
of each MLP, are multiplied by a gain, and what reads them is divided by it: norm gain against
consumers' columns, rows of up_proj against columns of down_proj. With gains that are powers of two
the result is the same bit for bit; the ranges of activations become like LLaMA's, as FPTQ (arXiv
2308.15987) describes them.
"""

from __future__ import annotations

import torch

from serval.compress.sites import input_sites
from serval.models.decoder import Decoder


@torch.no_grad()
def inject_outliers(
    decoder: Decoder,
    norm_gain: float = 32.0,
    up_gain: float = 128.0,
    channels: int = 2,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Scale `channels` channels of every norm's output by `norm_gain` and as many hidden units of
    every MLP by `up_gain`, in place. Returns the channels chosen, by site (a path in the decoder);
    a site whose channels cannot be scaled (`serval.compress.sites`) is left out."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[int]] = {}
    for index, block in enumerate(decoder.layers):
        for site in input_sites(block):
            gain = norm_gain if site.norm is not None else up_gain
            if not site.foldable or site.name.endswith("o_proj"):
                continue
            picked = torch.randperm(site.width, generator=generator)[:channels]
            scale = torch.ones(site.width)
            scale[picked] = 1.0 / gain
            site.fold(scale)
            chosen[f"layers.{index}.{site.name}"] = sorted(picked.tolist())
    return chosen
