"""Several LoRA adapters in one decoder, chosen per sequence (as in S-LoRA, arXiv 2311.03285, and
Punica, arXiv 2310.18547).

    y[rows of adapter e] += (x[rows of e] A_e^T) (s_e B_e)^T

The rows of a step are sorted by adapter once; each layer then does two grouped products over the
rows that have an adapter. The others, and steps without any, compute exactly the base model. Ranks
that differ are padded with zeros, which change no value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serval import kernels
from serval.adapt.lora import adaptable, device_of, features, replace
from serval.adapt.peft_format import Adapter, read_adapter
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.models.layers import shared_input
from serval.models.value_rotation import restore_values


class Route:
    """Which rows of the current step have which adapter; one object for all layers of a decoder.

    counts: rows per adapter, or None when no row has one. rows: int64 [R], the rows that have one,
    sorted by adapter; None when these are all rows in order.
    """

    def __init__(self) -> None:
        self.counts: list[int] | None = None
        self.rows: Tensor | None = None

    def begin(self, batch: PackedBatch, adapters: int) -> None:
        """Take over a step's `adapters` and `query_starts`; indices above `adapters` raise."""
        chosen = batch.adapters
        self.counts = self.rows = None
        if chosen is None or not any(chosen):
            return
        if not 0 <= min(chosen) <= max(chosen) <= adapters:
            raise ConfigError(
                f"PackedBatch.adapters holds {min(chosen)} to {max(chosen)}; this decoder has "
                f"adapters 1 to {adapters}, and 0 for none"
            )
        starts = batch.query_starts.tolist()
        counts = [0] * adapters
        spans: list[Tensor] = []
        for sequence in sorted(range(len(chosen)), key=lambda n: chosen[n]):
            if not chosen[sequence]:
                continue
            first, last = starts[sequence], starts[sequence + 1]
            counts[chosen[sequence] - 1] += last - first
            spans.append(torch.arange(first, last))
        self.counts = counts
        rows = torch.cat(spans)
        if len(rows) < starts[-1] or not bool((rows[1:] > rows[:-1]).all()):
            self.rows = rows.to(batch.positions.device)


class ServedLinear(nn.Module):
    """A linear layer `base` [d_out, d_in] with E adapters.

    a: [E, r, d_in]; b: [E, d_out, r], each multiplied by its adapter's s.
    """

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, route: Route) -> None:
        super().__init__()
        self.base, self.route = base, route
        self.in_features, self.out_features = features(base)
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d_in], T the rows of the step, -> [T, d_out]."""
        return self._add(self.base(x), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        counts, rows = self.route.counts, self.route.rows
        if counts is None:
            return y
        part = x if rows is None else x[rows]
        code = kernels.grouped_linear(part.to(self.a.dtype), self.a, counts)
        delta = kernels.grouped_linear(code, self.b, counts).to(y.dtype)
        return y + delta if rows is None else y.index_add(0, rows, delta)

    @staticmethod
    def together(modules: Sequence[ServedLinear], x: Tensor) -> list[Tensor]:
        """All outputs of one input (see `models.layers.shared_input`)."""
        bases = shared_input(x, *(module.base for module in modules))
        return [module._add(y, x) for module, y in zip(modules, bases, strict=True)]

    def extra_repr(self) -> str:
        return f"adapters={self.a.shape[0]}, rank={self.a.shape[1]}"


class AdapterBank:
    """Plain LoRA adapters installed in `decoder`, in place, under names.

    Every later call of the decoder reads `PackedBatch.adapters`. The base may be quantised.

    Args: paths: name -> PEFT LoRA directory. Raises CheckpointError or ConfigError as
    `read_adapter`, before anything is changed.
    """

    def __init__(self, decoder: Decoder, paths: Mapping[str, str | Path]) -> None:
        if not paths:
            raise ConfigError("there is no adapter to serve")
        if any(isinstance(module, ServedLinear) for module in decoder.modules()):
            raise ConfigError("this decoder serves adapters already; load the model again")
        self._index = {name: number for number, name in enumerate(paths, 1)}
        self.route = Route()
        read = [read_adapter(path, decoder) for path in paths.values()]
        restore_values(decoder)  # adapters belong to the basis of the checkpoint
        _install(decoder, read, self.route)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return list(self._index)

    def index(self, name: str) -> int:
        """The number of an adapter in `PackedBatch.adapters`; raises KeyError."""
        return self._index[name]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.route.begin(kwargs["batch"] if "batch" in kwargs else args[1], len(self._index))


def _install(decoder: Decoder, read: Sequence[Adapter], route: Route) -> None:
    dtype = decoder.norm.weight.dtype
    linears = adaptable(decoder)
    for name in [n for n in linears if any(n in adapter.layers for adapter in read)]:
        base = linears[name]
        found = [adapter.layers.get(name) for adapter in read]
        rank = max(low.a.shape[0] for low in found if low is not None)
        d_in, d_out = features(base)
        a = torch.zeros(len(read), rank, d_in)
        b = torch.zeros(len(read), d_out, rank)
        for number, low in enumerate(found):
            if low is not None:
                a[number, : low.a.shape[0]] = low.a
                b[number, :, : low.a.shape[0]] = low.b * low.scaling
        at = device_of(base)
        replace(decoder, name, ServedLinear(base, a.to(at, dtype), b.to(at, dtype), route))
