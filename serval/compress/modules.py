"""Quantised modules: the call of what they replace, over weights packed for `kernels/w4a8`.

One set of modules serves every `WeightScheme`: 4 or 8 bits, scales per channel or group (floats or
integers), activations rounded per token, by a static scale, or not at all. Each is a
`CheckpointModule`, stored as its `Storage` says and packed when loaded. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from serval import kernels
from serval.compress.scheme import QuantizedWeight
from serval.compress.storage import Spec, Storage
from serval.kernels import PackedWeight


def pack(weight: QuantizedWeight) -> PackedWeight:
    """`weight` as the kernels take it; zero points and column order are the module's business."""
    return kernels.pack_weight(
        weight.codes,
        weight.scales,
        bits=weight.scheme.bits,
        group_size=weight.scheme.group_size,
        integer=weight.integer,
        row_factor=weight.row_factor,
    )


def unpack(packed: PackedWeight, storage: Storage) -> QuantizedWeight:
    """The inverse of `pack`."""
    codes, scales, integer, row_factor = kernels.unpack_weight(packed)
    kind = storage.scale_dtype
    return QuantizedWeight(codes, scales, storage.scheme, kind, integer, row_factor)


def empty(storage: Storage, rows: int, columns: int, **where: Any) -> PackedWeight:
    """Of the shapes of a packed matrix [rows, columns], without values."""
    scheme = storage.scheme
    scales = "integer" if scheme.scales == "integer" else "float"
    return kernels.empty_packed_weight(
        rows,
        columns,
        bits=scheme.bits,
        group_size=scheme.group_size,
        mode="channel" if scheme.group_size is None else scales,  # type: ignore[arg-type]
        **where,
    )


class PackedModule(nn.Module):
    """Holds a packed weight as buffers; float32 scales stay so when the decoder changes dtype."""

    data: Tensor
    factor: Tensor
    group_scales: Tensor | None

    def __init__(self, storage: Storage, packed: PackedWeight) -> None:
        super().__init__()
        self.storage = storage
        self.hold(packed)

    def hold(self, packed: PackedWeight) -> None:
        self.register_buffer("data", packed.data)
        self.register_buffer("factor", packed.factor)
        self.register_buffer("group_scales", packed.group_scales)
        self.packed = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype and not old.is_meta:
                setattr(self, name, old.to(new.device))
        moved = self.packed._replace(
            data=self.data, factor=self.factor, group_scales=self.group_scales
        )
        self.hold(moved.native())  # CPUs and GPUs read different layouts
        return self


class QuantizedLinear(PackedModule):
    """x [..., K] -> [..., N] with a quantised matrix [N, K].

    order: input order[j] meets column j of the packed matrix, for groups of scattered inputs.
    shift: float32 [N, G], zero point times scale: y -= (sums of x over groups) shift^T.
    """

    order: Tensor | None
    shift: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, storage: Storage, bias: bool = False
    ) -> None:
        super().__init__(storage, empty(storage, out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.activations: str = storage.scheme.activations
        self.input_scale: float | None = None
        self.register_buffer("order", None)
        self.register_buffer("shift", None)
        self.bias: nn.Parameter | None = None
        if bias:
            values = torch.empty(out_features, device="meta")
            self.bias = nn.Parameter(values, requires_grad=False)

    @classmethod
    def like(cls, module: nn.Module, storage: Storage) -> QuantizedLinear:
        """Without values, in the shape of an nn.Linear."""
        assert isinstance(module, nn.Linear)
        return cls(module.in_features, module.out_features, storage, module.bias is not None)

    def take(self, weight: QuantizedWeight, device: torch.device | str) -> None:
        """Hold `weight`, which must have this module's scheme."""
        self.hold(pack(weight).to(device))
        self.input_scale = weight.input_scale
        self.order = None if weight.order is None else weight.order.to(device)
        self.shift = None
        if weight.zero_points is not None:
            self.shift = (weight.zero_points.float() * weight.scales).to(device)

    def quantized(self) -> QuantizedWeight:
        """The matrix held."""
        weight = unpack(self.packed, self.storage)
        device = weight.codes.device
        weight.input_scale = self.input_scale
        weight.order = None if self.order is None else self.order.to(device)
        if self.shift is not None:
            shift = self.shift.to(device)
            weight.zero_points = (shift / weight.scales).round().to(torch.int8)
        elif self.storage.zero_points:
            weight.zero_points = torch.zeros_like(weight.scales, dtype=torch.int8)
        if self.storage.group_index and self.order is None:
            weight.order = torch.arange(self.in_features, device=device)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        if self.order is not None:
            x = x[..., self.order]
        out = kernels.quantized_linear(
            x, self.packed, self.bias, activations=self.activations, input_scale=self.input_scale
        )
        if self.shift is None:
            return out
        sums = x.unflatten(-1, (self.shift.shape[1], -1)).sum(-1, dtype=torch.float32)
        return out - (sums @ self.shift.T).to(out.dtype)

    @staticmethod
    def together(modules: Sequence[QuantizedLinear], x: Tensor) -> list[Tensor] | None:
        """All outputs of one input by one call, or None when the modules treat it differently (see
        `models.layers.shared_input`)."""
        first = modules[0]
        for module in modules:
            if module.activations != first.activations or module.input_scale != first.input_scale:
                return None
            if module.order is not None or module.shift is not None:
                return None
        return kernels.quantized_linear_multi(
            x,
            [module.packed for module in modules],
            [module.bias for module in modules],
            activations=first.activations,
            input_scale=first.input_scale,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.storage.scheme}"

    def checkpoint_spec(self) -> Spec:
        spec = self.storage.spec(self.out_features, self.in_features)
        if self.bias is not None:
            spec["bias"] = ((self.out_features,), self.storage.scale_dtype)
        return spec

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = self.storage.encode(self.quantized())
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().to(self.storage.scale_dtype)
        return tensors

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        shape = (self.out_features, self.in_features)
        self.take(self.storage.decode(tensors, shape=shape), device)
        if self.bias is not None:
            bias = tensors["bias"].to(device, torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)


class QuantizedEmbedding(QuantizedLinear):
    """token ids [...] -> rows [..., D] in float32; `as_head` multiplies by the same table."""

    @classmethod
    def like(cls, module: nn.Module, storage: Storage) -> QuantizedEmbedding:
        """Without values, in the shape of an nn.Embedding."""
        assert isinstance(module, nn.Embedding)
        return cls(module.embedding_dim, module.num_embeddings, storage.for_table())

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [...] -> rows float32 [..., D]."""
        return kernels.quantized_embedding(tokens, self.packed)

    def as_head(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocabulary] of hidden states [R, D], which are rounded to int8 per token."""
        return kernels.quantized_linear(hidden, self.packed)


class TiedHead(nn.Module):
    """The output head of a decoder whose quantised embedding serves both ends; stores nothing."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._table = (embedding,)  # in a tuple, so that it is not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] -> logits [R, vocabulary]."""
        return self._table[0].as_head(hidden)

    def checkpoint_spec(self) -> Spec:
        return {}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Nothing to load: the embedding holds the table."""


class DequantizedLinear(nn.Linear):
    """A quantised matrix whose float form others read (MLA's kv_b_proj, by which the cache
    multiplies): stored quantised, expanded once when loaded."""

    storage: Storage
    stored: QuantizedWeight

    @classmethod
    def like(cls, module: nn.Module, storage: Storage) -> DequantizedLinear:
        """Without values, in the shape of an nn.Linear."""
        assert isinstance(module, nn.Linear)
        has_bias = module.bias is not None
        made = cls(module.in_features, module.out_features, bias=has_bias, device="meta")
        made.storage = storage
        return made.requires_grad_(False)

    def take(self, weight: QuantizedWeight, device: torch.device | str) -> None:
        """Hold the float form of `weight`."""
        self.stored = weight
        self.weight = nn.Parameter(weight.dequantize().to(device), requires_grad=False)

    def checkpoint_spec(self) -> Spec:
        spec = self.storage.spec(self.out_features, self.in_features)
        if self.bias is not None:
            spec["bias"] = ((self.out_features,), self.storage.scale_dtype)
        return spec

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = self.storage.encode(self.stored)
        return tensors if self.bias is None else {**tensors, "bias": self.bias.detach()}

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        shape = (self.out_features, self.in_features)
        self.take(self.storage.decode(tensors, shape=shape), device)
        if self.bias is not None:
            self.bias = nn.Parameter(tensors["bias"].to(device).float(), requires_grad=False)
