"""Masks and low-rank updates inside a decoder, taken out again when it is pruned.

    masks:     W_o (m * a), W_down (m * h)    one m per unit, before the matrix and its update
    updates:   W x + (alpha / r) B A x        LoRA, `serval.adapt.lora`

The decoder's own weights are frozen. `original` switches masks and updates off, which gives the
teacher of a distillation on the same weights. After `cut` the dropped units' masks are zero for
good; `finish` merges the updates, folds the masks into the output matrices and slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from serval.adapt.lora import LoraOptions, adapters, adapters_disabled, add_adapters, merge
from serval.compress.maskprune.slicing import slice_decoder
from serval.compress.maskprune.units import Kind, Site
from serval.models.decoder import Decoder
from serval.optim.groups import Role


@dataclass
class Switch:
    """Shared by all masks of one decoder: whether they act."""

    on: bool = True


class MaskedLinear(nn.Module):
    """A layer whose input columns are scaled by one mask per unit.

    mask: float32 [units], trainable, starts at one. kept: bool [units], false where a unit is cut.
    """

    parameter_roles = {"mask": Role.BIAS}  # noqa: RUF012
    kept: Tensor

    def __init__(self, inner: nn.Module, site: Site, device: torch.device, switch: Switch) -> None:
        super().__init__()
        self.inner, self.columns, self.switch = inner, site.columns, switch
        self.mask = nn.Parameter(torch.ones(site.units, device=device))
        self.register_buffer("kept", torch.ones(site.units, dtype=torch.bool, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., units * columns] -> what the inner layer makes of the masked x."""
        if self.switch.on:
            mask = (self.mask * self.kept).to(x.dtype)
            x = (x.unflatten(-1, (-1, self.columns)) * mask[:, None]).flatten(-2)
        return self.inner(x)


class MaskedDecoder:
    """`decoder` with a mask at every site and low-rank updates on its layers' matrices, in place.

    lora: the updates' shape; None: there are none.
    """

    def __init__(
        self, decoder: Decoder, sites: Sequence[Site], lora: LoraOptions | None = None
    ) -> None:
        self.decoder, self.sites, self.switch = decoder, list(sites), Switch()
        decoder.requires_grad_(False)
        if lora is not None:
            add_adapters(decoder, lora)
        self.masks: dict[str, MaskedLinear] = {}
        for site in self.sites:
            owner = decoder.get_submodule(site.name)
            inner = getattr(owner, site.output)
            device = next(inner.parameters()).device
            self.masks[site.name] = MaskedLinear(inner, site, device, self.switch)
            setattr(owner, site.output, self.masks[site.name])

    @contextmanager
    def original(self) -> Iterator[Decoder]:
        """The decoder as it was, while entered."""
        self.switch.on = False
        try:
            with adapters_disabled(self.decoder):
                yield self.decoder
        finally:
            self.switch.on = True

    def of_kind(self, kind: Kind) -> list[MaskedLinear]:
        """The masked layers of one kind, in order of depth."""
        return [self.masks[site.name] for site in self.sites if site.kind == kind]

    def kinds(self) -> list[Kind]:
        return list(dict.fromkeys(site.kind for site in self.sites))

    def stacked(self, kind: Kind) -> Tensor:
        """A copy of all masks of a kind, float32 [layers, units]."""
        return torch.stack([module.mask.detach() for module in self.of_kind(kind)])

    @torch.no_grad()
    def write(self, kind: Kind, values: Tensor) -> None:
        """Set all masks of a kind from [layers, units]."""
        for module, row in zip(self.of_kind(kind), values, strict=True):
            module.mask.copy_(row)

    @torch.no_grad()
    def cut(self, kept: Mapping[str, Tensor]) -> None:
        """Drop all units but those whose indices are given, by site's name."""
        for name, module in self.masks.items():
            module.kept.zero_()
            module.kept[kept[name]] = True
            module.mask.mul_(module.kept)

    def kept(self) -> dict[str, list[int]]:
        """The units that were not cut, ascending, by site's name."""
        return {
            name: torch.nonzero(module.kept).flatten().tolist()
            for name, module in self.masks.items()
        }

    @torch.no_grad()
    def finish(self) -> Decoder:
        """The pruned decoder, an ordinary one. This object and its decoder are spent."""
        factors = {name: module.mask.detach() for name, module in self.masks.items()}
        kept = {name: torch.tensor(units) for name, units in self.kept().items()}
        for site in self.sites:
            owner = self.decoder.get_submodule(site.name)
            setattr(owner, site.output, self.masks[site.name].inner)
        if adapters(self.decoder):
            merge(self.decoder)
        return slice_decoder(self.decoder, self.sites, kept, factors)
