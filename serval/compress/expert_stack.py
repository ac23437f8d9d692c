"""Quantised expert stacks: every expert's product in one grouped call, each stored apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serval import kernels
from serval.compress.modules import PackedModule, empty, pack, unpack
from serval.compress.scheme import QuantizedWeight
from serval.compress.storage import Spec, Storage
from serval.errors import CheckpointError, ConfigError
from serval.models.feedforward import gated_activation
from serval.models.moe import Experts

LEAVES = ("gate_proj", "up_proj", "down_proj")


class _Stack(PackedModule):
    """x [R, K] sorted by expert -> [R, N] with one matrix [N, K] for each of E experts."""

    def __init__(self, storage: Storage, experts: int, rows: int, columns: int) -> None:
        super().__init__(storage, empty(storage, rows, columns, experts=experts))
        self.input_scales: list[float] = [0.0] * experts

    def allocate(self, device: torch.device | str) -> None:
        """Storage for all experts, to be filled by `put`."""
        packed = self.packed
        shape = (packed.outputs, packed.inputs)
        self.hold(empty(self.storage, *shape, experts=packed.experts, device=device))

    def put(self, expert: int, weight: QuantizedWeight) -> None:
        """Fill in one expert."""
        place = self.packed.expert(expert)
        made = pack(weight).to(place.data.device)
        place.data.copy_(made.data)
        place.factor.copy_(made.factor)
        if place.group_scales is not None and made.group_scales is not None:
            place.group_scales.copy_(made.group_scales)
        self.input_scales[expert] = weight.input_scale or 0.0

    def get(self, expert: int) -> QuantizedWeight:
        weight = unpack(self.packed.expert(expert), self.storage)
        if self.storage.scheme.activations == "static":
            weight.input_scale = self.input_scales[expert]
        return weight

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        activations = self.storage.scheme.activations
        if activations != "static":
            return kernels.quantized_grouped_linear(x, self.packed, counts, activations=activations)
        out = x.new_empty(x.shape[0], self.packed.outputs)  # each expert has a scale of its own
        start = 0
        for expert, count in enumerate(counts):
            if count:
                out[start : start + count] = kernels.quantized_linear(
                    x[start : start + count],
                    self.packed.expert(expert),
                    activations=activations,
                    input_scale=self.input_scales[expert],
                )
                start += count
        return out


class QuantizedExperts(nn.Module):
    """A stack of gated experts without biases. storage: of gate_proj and up_proj, and of down_proj,
    which may differ."""

    def __init__(
        self,
        count: int,
        hidden: int,
        width: int,
        activation: str,
        storage: tuple[Storage, Storage],
    ) -> None:
        super().__init__()
        self.hidden, self.width, self.activation = hidden, width, activation
        self.gate_up = _Stack(storage[0], count, 2 * width, hidden)
        self.down = _Stack(storage[1], count, hidden, width)

    @classmethod
    def like(cls, module: nn.Module, storage: tuple[Storage, Storage]) -> QuantizedExperts:
        """Without values, in the shape of a stack of `Experts`."""
        assert isinstance(module, Experts)
        count, hidden, width = module.down_proj.shape
        for one in storage:
            if one.zero_points or one.group_index:
                raise ConfigError(
                    "config.json: quantization_config gives experts zero points or an activation "
                    "order; Serval reads symmetric experts whose groups are consecutive inputs"
                )
        return cls(count, hidden, width, module.activation, storage)

    def take(self, weights: Sequence[QuantizedWeight], device: torch.device | str) -> None:
        """Hold gate_proj, up_proj and down_proj of each expert, in this order, expert by expert."""
        self.gate_up.allocate(device)
        self.down.allocate(device)
        for expert in range(len(self.down.input_scales)):
            self._put(expert, *weights[3 * expert : 3 * expert + 3])

    def _put(
        self, expert: int, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight
    ) -> None:
        if gate.input_scale != up.input_scale:
            raise CheckpointError(
                f"expert {expert}: gate_proj and up_proj have input_scale {gate.input_scale} and "
                f"{up.input_scale}; they read the same input and need the same scale"
            )
        self.gate_up.put(expert, _stacked(gate, up))
        self.down.put(expert, down)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x: [R, D] sorted by expert, counts: rows per expert. Returns [R, D]."""
        gate, up = self.gate_up(x, counts).chunk(2, dim=-1)
        return self.down(gated_activation(self.activation, gate, up), counts)

    def storages(self) -> dict[str, Storage]:
        """The storage of each of an expert's matrices, by leaf name."""
        gate_up = self.gate_up.storage
        return dict(zip(LEAVES, (gate_up, gate_up, self.down.storage), strict=True))

    def checkpoint_spec(self) -> Spec:
        shapes = ((self.width, self.hidden),) * 2 + ((self.hidden, self.width),)
        return {
            f"{expert}.{leaf}.{name}": value
            for expert in range(len(self.down.input_scales))
            for (leaf, storage), shape in zip(self.storages().items(), shapes, strict=True)
            for name, value in storage.spec(*shape).items()
        }

    def checkpoint_tensors(self) -> Mapping[str, Tensor]:
        return _Encoded(self)

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.gate_up.allocate(device)
        self.down.allocate(device)
        for expert in range(len(self.down.input_scales)):
            decoded = []
            for leaf, storage in self.storages().items():
                name = f"{expert}.{leaf}"
                down = leaf == "down_proj"
                shape = (self.hidden, self.width) if down else (self.width, self.hidden)
                decoded.append(storage.decode(_Below(tensors, name), name, shape))
            self._put(expert, *decoded)

    def matrix(self, expert: int, leaf: str) -> QuantizedWeight:
        """gate_proj, up_proj or down_proj of one expert."""
        if leaf == "down_proj":
            return self.down.get(expert)
        part = slice(0, self.width) if leaf == "gate_proj" else slice(self.width, None)
        return _rows(self.gate_up.get(expert), part)


class _Below(Mapping[str, Tensor]):
    """The tensors of a mapping whose names begin with a prefix, without it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self.tensors, self.prefix = tensors, f"{prefix}."

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        found = (name for name in self.tensors if name.startswith(self.prefix))
        return (name.removeprefix(self.prefix) for name in found)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Encoded(Mapping[str, Tensor]):
    """The stored tensors of an expert stack, each matrix unpacked when it is asked for."""

    def __init__(self, experts: QuantizedExperts) -> None:
        self.experts = experts
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts.checkpoint_spec())

    def __len__(self) -> int:
        return len(self.experts.checkpoint_spec())

    def __getitem__(self, name: str) -> Tensor:
        matrix, _, kind = name.rpartition(".")
        if self._last[0] != matrix:
            expert, leaf = matrix.split(".")
            weight = self.experts.matrix(int(expert), leaf)
            self._last = (matrix, self.experts.storages()[leaf].encode(weight))
        return self._last[1][kind]


def _stacked(first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """One matrix of the rows of both."""
    return _with_rows(first, lambda a, name: torch.cat([a, getattr(second, name)]))


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some rows of a matrix."""
    return _with_rows(weight, lambda tensor, name: tensor[rows])


def _with_rows(weight: QuantizedWeight, make: Callable[[Tensor, str], Tensor]) -> QuantizedWeight:
    """`weight` with each tensor that has one row per output replaced by what `make` returns."""
    tensors = {name: getattr(weight, name) for name in ("codes", "scales", "integer", "row_factor")}
    made: dict[str, Any] = {k: make(v, k) for k, v in tensors.items() if v is not None}
    return dataclasses.replace(weight, **made)
