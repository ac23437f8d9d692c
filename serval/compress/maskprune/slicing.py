"""From units that stay to a smaller ordinary decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from serval.compress.maskprune.units import Site, Widths
from serval.errors import ConfigError
from serval.models.checkpoint.reading import empty_decoder
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


def narrowed(config: ModelConfig, widths: Widths) -> ModelConfig:
    """`config` with other widths; head_dim stays, and is written even where hidden / heads is
    another number."""
    changes: dict[str, int] = {}
    if "channels" in widths:
        changes["intermediate_size"] = widths["channels"]
    if "heads" in widths:
        assert config.num_key_value_heads is not None
        group = 1 if config.mla else config.num_attention_heads // config.num_key_value_heads
        changes["num_attention_heads"] = widths["heads"] * group
        changes["num_key_value_heads"] = widths["heads"]
    return replace(config, **changes)  # type: ignore[arg-type]


@torch.no_grad()
def slice_decoder(
    decoder: Decoder,
    sites: Sequence[Site],
    kept: Mapping[str, Tensor],
    factors: Mapping[str, Tensor] | None = None,
) -> Decoder:
    """A decoder of the kept units only, in eval mode; `decoder` is not changed.

    kept: int64 indices of units by site's name. factors: [units] by site's name, multiplied into
    the columns of the output matrices. Raises ConfigError unless all sites of a kind keep equally
    many.
    """
    widths: Widths = {}
    for site in sites:
        count = len(kept[site.name])
        if not count or widths.setdefault(site.kind, count) != count:
            raise ConfigError(
                f"{site.name} would keep {count} {site.kind}, another layer "
                f"{widths.get(site.kind)}; every layer must keep the same number, at least one"
            )
    state = dict(decoder.state_dict())
    for site in sites:
        units = kept[site.name].sort().values
        for attribute, rows in site.rows.items():
            for leaf in ("", ".weight", ".bias"):
                key = f"{site.name}.{attribute}{leaf}"
                if key in state:
                    state[key] = _pick(state[key], units, rows, 0)
        key = f"{site.name}.{site.output}.weight"
        weight = _pick(state[key], units, site.columns, 1)
        if factors is not None:
            factor = factors[site.name][units].repeat_interleave(site.columns)
            weight = (weight * factor.to(weight.device)).to(weight.dtype)
        state[key] = weight
    sliced = empty_decoder(narrowed(decoder.config, widths))
    sliced.load_state_dict(state, assign=True)
    return sliced.eval()


def _pick(tensor: Tensor, units: Tensor, width: int, dimension: int) -> Tensor:
    """The entries of `units`, `width` neighbours each, along a dimension; contiguous."""
    index = (units[:, None] * width + torch.arange(width)).flatten()
    return tensor.index_select(dimension, index.to(tensor.device)).contiguous()
