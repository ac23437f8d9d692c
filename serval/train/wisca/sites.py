"""What WISCA needs to know of an attention layer, and the pairs that follow from it.

Which coordinates may have factors of their own (otherwise only position 0 looks right):

- q and k: rotary embedding mixes the two dimensions of a rotary pair, so they share a factor; so do
  the query heads that read one key head.
- v and o: one coordinate is a row of W_v and its column in W_o for each query head of the group.
- latent attention: k_rope is shared by all heads, so its rotary pairs are common to them; the other
  dimensions of a head are its own. The whole of [q_nope; q_rope] stands against the k rows of
  kv_b_proj together with the k_rope rows of kv_a_proj.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.train.wisca.pairs import Member, Pair

Rotary = Literal["half", "interleaved", "none"]


class UnusableError(ConfigError):
    """A layer that cannot be rescaled; the text says why."""


@dataclass(frozen=True)
class Projection:
    """A linear layer, or those of its output rows (int64) that make one of q, k and v. It may be
    wrapped in LoRA, PEFT's or Serval's."""

    module: nn.Module
    rows: Tensor | None = None

    @property
    def base(self) -> Any:
        """The layer itself; raises UnusableError for anything but plain floating-point linears."""
        layer = self.module
        base: Any = getattr(layer, "base_layer", layer)
        base = getattr(base, "base", base)
        weight = getattr(base, "weight", None)
        plain = isinstance(base, nn.Linear) or _is_conv1d(base)
        if not plain or not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise UnusableError(f"{type(base).__name__} is no plain floating-point linear layer")
        return base

    @property
    def width(self) -> int:
        """Number of its output rows."""
        weight = self.base.weight
        return len(self.rows) if self.rows is not None else weight.shape[self._out]

    @property
    def inputs(self) -> int:
        return self.base.weight.shape[1 - self._out]

    @property
    def _out(self) -> int:
        return 1 if _is_conv1d(self.base) else 0  # Conv1D keeps [in, out]

    def output_members(self, units: Tensor, inverse: bool) -> Iterator[Member]:
        """Scale its outputs; units: int64 [width]."""
        base, count = self.base, self.base.weight.shape[self._out]
        self._refuse_magnitudes()
        if self.rows is not None:
            spread = torch.full((count,), -1)
            spread[self.rows] = units
            units = spread
        shape = (count, 1) if self._out == 0 else (1, count)
        yield Member(base.weight, units.view(shape), inverse)
        if base.bias is not None:
            yield Member(base.bias, units, inverse, measured=False)
        for weight, bias in _adapters(self.module, "lora_B"):
            yield Member(weight, units.view(-1, 1), inverse, measured=False)
            if bias is not None:
                yield Member(bias, units, inverse, measured=False)

    def input_members(self, units: Tensor, inverse: bool) -> Iterator[Member]:
        """Scale its inputs; units: int64 [inputs]. Its bias stays."""
        self._refuse_magnitudes()
        shape = (1, -1) if self._out == 0 else (-1, 1)
        yield Member(self.base.weight, units.view(shape), inverse)
        for weight, _ in _adapters(self.module, "lora_A"):
            yield Member(weight, units.view(1, -1), inverse, measured=False)

    def _refuse_magnitudes(self) -> None:
        if len(getattr(self.module, "lora_magnitude_vector", ())):
            raise UnusableError("it has DoRA magnitudes, which normalise what would be scaled")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' linear of GPT-2


def _adapters(module: nn.Module, key: str) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of the matrices `key` of LoRA adapters on `module`."""
    found: Any = getattr(module, key, None)
    if isinstance(found, nn.Parameter):
        return [(found, None)]
    layers: list[Any] = list(found.values()) if isinstance(found, nn.ModuleDict) else []
    return [(layer.weight, layer.bias) for layer in layers]


class Site(Protocol):
    """An attention layer as `AttentionAdapter`s describe it."""

    def qk(self) -> Pair:
        """The pair of queries and keys; raises UnusableError."""
        ...

    def vo(self) -> Pair:
        """The pair of values and output; raises UnusableError."""
        ...


class AttentionAdapter(Protocol):
    """Describes the attention layers of a family of models, so that none needs patching."""

    def __call__(self, name: str, module: nn.Module) -> Site | None:
        """The site of `module`, None for what is not one of its attention layers; raises
        UnusableError for a layer that it knows but that must not be touched."""
        ...


def rotary_pairs(head_dim: int, rotary: Rotary | None, rotary_dim: int) -> Tensor:
    """int64 [head_dim]: dimensions with one number turn together. None, an unknown layout, ties
    the whole head."""
    index = torch.arange(head_dim)
    if rotary is None:
        return torch.zeros_like(index)
    if rotary == "none":
        return index
    half = (rotary_dim + 1) // 2  # a frequency for every two dimensions, begun ones included
    pair = index // 2 if rotary == "interleaved" else index % max(half, 1)
    return torch.where(index < 2 * half, pair, index - half)


@dataclass(frozen=True)
class AttentionSite:
    """Multi-head or grouped-query attention: H query heads in groups of H / K.

    rotary: how its rotary embedding pairs the first `rotary_dim` dimensions of a head (None:
    unknown). blocked: reasons against a pair, by "qk" or "vo".
    """

    name: str
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rotary: Rotary | None
    rotary_dim: int
    blocked: dict[str, str]

    def __post_init__(self) -> None:
        heads, kv = self.num_heads, self.num_key_value_heads
        widths = {
            "queries": (self.q.width, heads * self.head_dim),
            "keys": (self.k.width, kv * self.head_dim),
            "values": (self.v.width, kv * self.v_head_dim),
            "output inputs": (self.o.inputs, heads * self.v_head_dim),
        }
        for what, (found, expected) in widths.items():
            if found != expected:
                raise UnusableError(
                    f"{what} are {found} wide, expected {expected} of {heads} query and {kv} key "
                    f"heads of {self.head_dim}"
                )
        if kv < 1 or heads % kv:
            raise UnusableError(f"{heads} query heads do not share out over {kv} key heads")

    def _groups(self) -> Tensor:
        """int64 [H]: the key head each query head reads."""
        return torch.arange(self.num_heads) // (self.num_heads // self.num_key_value_heads)

    def qk(self) -> Pair:
        _refuse(self.blocked, "qk")
        pair = rotary_pairs(self.head_dim, self.rotary, self.rotary_dim)
        count, kv = int(pair.max()) + 1, self.num_key_value_heads
        keys = (torch.arange(kv)[:, None] * count + pair).flatten()
        queries = (self._groups()[:, None] * count + pair).flatten()
        members = [*self.q.output_members(queries, False), *self.k.output_members(keys, True)]
        return Pair(self.name, "qk", members, _levels(torch.arange(kv).repeat_interleave(count)))

    def vo(self) -> Pair:
        _refuse(self.blocked, "vo")
        count, kv = self.v_head_dim, self.num_key_value_heads
        outputs = (self._groups()[:, None] * count + torch.arange(count)).flatten()
        values = torch.arange(kv * count)
        members = [*self.v.output_members(values, False), *self.o.input_members(outputs, True)]
        return Pair(self.name, "vo", members, _levels(values // count))


@dataclass(frozen=True)
class LatentSite:
    """Multi-head latent attention; kv_a's last `rope` rows make k_rope, each head's rows of kv_b
    are [k_nope; v], of q [q_nope; q_rope]."""

    name: str
    q: Projection
    kv_a: Projection
    kv_b: Projection
    o: Projection
    num_heads: int
    nope: int
    rope: int
    v_head_dim: int
    rotary: Rotary | None
    blocked: dict[str, str]

    def _kv_b_rows(self) -> Tensor:
        """int64 [H, nope + v]."""
        width = self.nope + self.v_head_dim
        return torch.arange(self.num_heads * width).view(self.num_heads, width)

    def qk(self) -> Pair:
        _refuse(self.blocked, "qk")
        heads, nope = self.num_heads, self.nope
        own = torch.arange(heads * nope).view(heads, nope)
        shared = heads * nope + rotary_pairs(self.rope, self.rotary, self.rope)
        queries = torch.cat([own, shared.expand(heads, -1)], dim=1).flatten()
        k_part = Projection(self.kv_b.module, self._kv_b_rows()[:, :nope].flatten())
        width = self.kv_a.width
        rope_part = Projection(self.kv_a.module, torch.arange(width - self.rope, width))
        members = [
            *self.q.output_members(queries, False),
            *k_part.output_members(own.flatten(), True),
            *rope_part.output_members(shared, True),
        ]
        owner = torch.arange(heads).repeat_interleave(nope)
        rest = torch.full((int(shared.max()) + 1 - heads * nope,), heads)  # k_rope: a head more
        return Pair(self.name, "qk", members, _levels(torch.cat([owner, rest])))

    def vo(self) -> Pair:
        _refuse(self.blocked, "vo")
        values = torch.arange(self.num_heads * self.v_head_dim)
        v_part = Projection(self.kv_b.module, self._kv_b_rows()[:, self.nope :].flatten())
        members = [*v_part.output_members(values, False), *self.o.input_members(values, True)]
        return Pair(self.name, "vo", members, _levels(values // self.v_head_dim))


def _levels(heads: Tensor) -> dict[str, Tensor]:
    return {"head": heads, "tensor": torch.zeros_like(heads)}


def _refuse(blocked: dict[str, str], kind: str) -> None:
    if kind in blocked:
        raise UnusableError(blocked[kind])
