"""The quantised modules of W8A8 (see `serval.compress.int8`): same call as what they replace.

Each is a `CheckpointModule`: it is stored as int8 `weight` and floating `weight_scale` [N, 1] (and
`bias`), and packed for the kernel when loaded. Inference only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from serval import kernels
from serval.errors import CheckpointError
from serval.kernels import PackedInt8
from serval.models.feedforward import gated_activation
from serval.models.moe import Experts

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def quantize_channels(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round a matrix [N, K] to (int8 codes [N, K], scale [N, 1] of the weight's dtype).

    A channel of zeros gets the dtype's epsilon as scale. Raises CheckpointError naming `name` when
    the weight holds NaN or infinity.
    """
    values = weight.detach().float()
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"weight {name!r} holds NaN or infinity and cannot be quantised; repair or retrain it"
        )
    scale = (values.abs().amax(dim=1, keepdim=True) / 127.5).to(weight.dtype)
    scale = torch.where(scale == 0, torch.finfo(weight.dtype).eps, scale)
    codes = (values / scale.float()).round_().clamp_(-128, 127).to(torch.int8)
    return codes, scale


class _Packed(nn.Module):
    """Buffers of packed weights whose scales stay float32 when the decoder changes dtype."""

    data: Tensor
    scale: Tensor

    def _hold(self, data: Tensor, scale: Tensor) -> None:
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        scale = self.scale
        super()._apply(fn, recurse)
        if not scale.is_meta:
            self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(_Packed):
    """x [..., K] -> [..., N] with weights of one int8 matrix [N, K].

    scale_dtype: in which dtype scales and bias are stored in a checkpoint.
    """

    def __init__(
        self, in_features: int, out_features: int, scale_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scale_dtype = scale_dtype
        self.bias: nn.Parameter | None = None
        self._hold(*_meta_packed(out_features, in_features))

    @classmethod
    def like(cls, linear: nn.Module) -> Int8Linear:
        """Without values, in the shape of an nn.Linear."""
        assert isinstance(linear, nn.Linear)
        made = cls(linear.in_features, linear.out_features)
        if linear.bias is not None:
            empty = torch.empty(linear.out_features, device="meta")
            made.bias = nn.Parameter(empty, requires_grad=False)
        return made

    @classmethod
    def quantize(cls, linear: nn.Module, name: str = "weight") -> Int8Linear:
        """Quantise an nn.Linear; `name` is for error messages."""
        assert isinstance(linear, nn.Linear)
        made = cls.like(linear)
        codes, scale = quantize_channels(linear.weight, f"{name}.weight")
        made.scale_dtype = scale.dtype
        tensors = {"weight": codes, "weight_scale": scale}
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach()
        made.load_checkpoint_tensors(tensors, linear.weight.device)
        return made

    @property
    def packed(self) -> PackedInt8:
        """The weight as `kernels.int8_linear` takes it."""
        return PackedInt8(self.data, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype."""
        return kernels.int8_linear(x, PackedInt8(self.data, self.scale), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def checkpoint_spec(self) -> Spec:
        spec: Spec = {
            "weight": ((self.out_features, self.in_features), torch.int8),
            "weight_scale": ((self.out_features, 1), self.scale_dtype),
        }
        if self.bias is not None:
            spec["bias"] = ((self.out_features,), self.scale_dtype)
        return spec

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        codes = kernels.unpack_int8_weight(self.packed, self.in_features)
        tensors = {"weight": codes, "weight_scale": self.scale.view(-1, 1).to(self.scale_dtype)}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().to(self.scale_dtype)
        return tensors

    def load_checkpoint_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        packed = kernels.pack_int8_weight(tensors["weight"], tensors["weight_scale"].view(-1))
        self.data, self.scale = (tensor.to(device) for tensor in packed)
        if self.bias is not None:
            bias = tensors["bias"].to(device, torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)


class DequantizedLinear(nn.Linear):
    """An int8 matrix whose float form others read (MLA's kv_b_proj in checkpoints made elsewhere):
    stored as int8, expanded once when loaded."""

    scale: Tensor
    scale_dtype = torch.float32

    @classmethod
    def like(cls, linear: nn.Module) -> DequantizedLinear:
        """Without values, in the shape of an nn.Linear."""
        assert isinstance(linear, nn.Linear)
        has_bias = linear.bias is not None
        made = cls(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        made.register_buffer("scale", torch.empty(linear.out_features, 1, device="meta"))
        return made.requires_grad_(False)

    def checkpoint_spec(self) -> Spec:
        return Int8Linear.like(self).checkpoint_spec()

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        codes = (self.weight / self.scale).round().to(torch.int8)  # exact: weight = codes * scale
        tensors = {"weight": codes, "weight_scale": self.scale}
        return tensors if self.bias is None else {**tensors, "bias": self.bias.detach()}

    def load_checkpoint_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.scale = tensors["weight_scale"].to(device, torch.float32)
        weight = tensors["weight"].to(device).float() * self.scale
        self.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(tensors["bias"].to(device).float(), requires_grad=False)


class Int8Embedding(Int8Linear):
    """token ids [...] -> rows [..., D] in float32; `as_head` multiplies by the same table."""

    @classmethod
    def like(cls, embedding: nn.Module) -> Int8Embedding:
        """Without values, in the shape of an nn.Embedding."""
        assert isinstance(embedding, nn.Embedding)
        return cls(embedding.embedding_dim, embedding.num_embeddings)

    @classmethod
    def quantize(cls, embedding: nn.Module, name: str = "weight") -> Int8Embedding:
        """Quantise an nn.Embedding by rows; `name` is for error messages."""
        assert isinstance(embedding, nn.Embedding)
        made = cls.like(embedding)
        codes, scale = quantize_channels(embedding.weight, f"{name}.weight")
        made.scale_dtype = scale.dtype
        device = embedding.weight.device
        made.load_checkpoint_tensors({"weight": codes, "weight_scale": scale}, device)
        return made

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [...] -> rows float32 [..., D]."""
        # Row n of the packed table: lane n % 16 of panel n // 16, see the kernel's packing.
        cells = self.data[tokens // 16, :, tokens % 16]  # [..., K / 4, 4], stored as code + 128
        rows = cells.flatten(-2)[..., : self.in_features].float() - 128
        return rows * self.scale[tokens].unsqueeze(-1)

    def as_head(self, hidden: Tensor) -> Tensor:
        """Logits [R, vocabulary] of hidden states [R, D]."""
        return kernels.int8_linear(hidden, self.packed)


class TiedInt8Head(nn.Module):
    """The output head of a decoder whose int8 embedding serves both ends; stores nothing."""

    def __init__(self, embedding: Int8Embedding) -> None:
        super().__init__()
        self._table = (embedding,)  # in a tuple, so that it is not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, D] -> logits [R, vocabulary]."""
        return self._table[0].as_head(hidden)

    def checkpoint_spec(self) -> Spec:
        return {}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_checkpoint_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Nothing to load: the embedding holds the table."""


class Int8Experts(nn.Module):
    """A stack of experts; each one's three matrices are stored apart, as in its family."""

    def __init__(self, count: int, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.hidden, self.width, self.activation = hidden, width, activation
        self.gate_up: Any = nn.ModuleList(Int8Linear(hidden, 2 * width) for _ in range(count))
        self.down: Any = nn.ModuleList(Int8Linear(width, hidden) for _ in range(count))

    @classmethod
    def like(cls, experts: nn.Module) -> Int8Experts:
        """Without values, in the shape of a stack of `Experts`."""
        assert isinstance(experts, Experts)
        count, hidden, width = experts.down_proj.shape
        return cls(count, hidden, width, experts.activation)

    @classmethod
    def quantize(cls, experts: nn.Module, name: str = "experts") -> Int8Experts:
        """Quantise a stack of `Experts`, one at a time; `name` is for error messages."""
        assert isinstance(experts, Experts)
        made = cls.like(experts)
        stacks = ((made.gate_up, experts.gate_up_proj), (made.down, experts.down_proj))
        for linears, stack in stacks:
            for index, (linear, weight) in enumerate(zip(linears, stack, strict=True)):
                codes, scale = quantize_channels(weight, f"{name}.{index}")
                linear.scale_dtype = scale.dtype
                tensors = {"weight": codes, "weight_scale": scale}
                linear.load_checkpoint_tensors(tensors, weight.device)
        return made

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x: [R, D] sorted by expert, counts: rows per expert. Returns [R, D]."""
        out = torch.empty_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            rows = slice(start, start + count)
            gate, up = self.gate_up[expert](x[rows]).chunk(2, dim=-1)
            out[rows] = self.down[expert](gated_activation(self.activation, gate, up))
            start += count
        return out

    def checkpoint_spec(self) -> Spec:
        kind = self.down[0].scale_dtype
        shapes = {
            "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden),
            "down_proj": (self.hidden, self.width),
        }
        spec: Spec = {}
        for expert in range(len(self.down)):
            for leaf, shape in shapes.items():
                spec[f"{expert}.{leaf}.weight"] = (shape, torch.int8)
                spec[f"{expert}.{leaf}.weight_scale"] = ((shape[0], 1), kind)
        return spec

    def checkpoint_tensors(self) -> Mapping[str, Tensor]:
        return _Unpacked(self)

    def load_checkpoint_tensors(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            for leaves, linear in ((("gate_proj", "up_proj"), gate_up), (("down_proj",), down)):
                parts = {
                    kind: torch.cat([tensors[f"{expert}.{leaf}.{kind}"] for leaf in leaves])
                    for kind in ("weight", "weight_scale")
                }
                linear.load_checkpoint_tensors(parts, device)


class _Unpacked(Mapping[str, Tensor]):
    """The stored tensors of an expert stack, unpacked one by one when asked for."""

    def __init__(self, experts: Int8Experts) -> None:
        self.experts = experts

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts.checkpoint_spec())

    def __len__(self) -> int:
        return len(self.experts.checkpoint_spec())

    def __getitem__(self, name: str) -> Tensor:
        expert, leaf, kind = name.split(".")
        stack: Any = self.experts.down if leaf == "down_proj" else self.experts.gate_up
        tensor = stack[int(expert)].checkpoint_tensors()[kind]
        if leaf == "down_proj":
            return tensor
        width = self.experts.width
        return tensor[:width] if leaf == "gate_proj" else tensor[width:]


def _meta_packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        weight = torch.empty(rows, columns, dtype=torch.int8)
        return kernels.pack_int8_weight(weight, torch.empty(rows))
