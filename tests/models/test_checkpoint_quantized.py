"""Quantised modules enter and leave checkpoints through the hooks, without being named there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from serval.errors import CheckpointError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.checkpoint.registry import QUANTIZERS
from serval.models.checkpoint.safetensors_file import StoredTensor
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.registry import Entry

SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    qkv_bias=True,
    family="qwen2",
)


class RoundedLinear(nn.Module):
    """int8 weight with a scale per row, kept packed in one tensor to be unlike what is stored."""

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        super().__init__()
        self.rows, self.columns, self.has_bias = rows, columns, bias
        self.register_buffer("packed", torch.empty(columns, rows, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows))
        self.register_buffer("offset", torch.zeros(rows) if bias else None)

    def checkpoint_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        spec = {
            "weight": ((self.rows, self.columns), torch.int8),
            "weight_scale": ((self.rows, 1), torch.float32),
        }
        return {**spec, "bias": ((self.rows,), torch.float32)} if self.has_bias else spec

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = {"weight": self.packed.T, "weight_scale": self.scale[:, None]}
        return {**tensors, "bias": self.offset} if self.has_bias else tensors

    def load_checkpoint_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.packed = tensors["weight"].T.contiguous().to(device)
        self.scale = tensors["weight_scale"][:, 0].to(device)
        self.offset = tensors["bias"].to(device) if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.T * self.scale[:, None], self.offset)


def swap(decoder: Decoder, keep: Callable[[str], bool]) -> None:
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear) and not keep(name):
            rounded = RoundedLinear(*module.weight.shape, module.bias is not None)
            if not module.weight.is_meta:
                scale = module.weight.detach().abs().amax(1) / 127
                tensors = {
                    "weight": (module.weight / scale[:, None]).round().to(torch.int8),
                    "weight_scale": scale[:, None],
                    "bias": module.bias,
                }
                rounded.load_checkpoint_tensors(tensors, torch.device("cpu"))
            decoder.set_submodule(name, rounded)


class Rounding:
    def prepare(
        self,
        decoder: Decoder,
        quantization: dict[str, Any],
        rename: Callable[[str], str],
        stored: Mapping[str, StoredTensor],
    ) -> None:
        assert decoder.embed_tokens.weight.is_meta
        assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.int8
        swap(decoder, lambda name: rename(name) in quantization["ignore"])


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, Path]:
    entry = Entry(f"{__name__}:Rounding", "for this test")
    monkeypatch.setitem(QUANTIZERS, "rounding", entry)
    decoder = Decoder(SMALL).eval()
    ignored = checkpoint.module_name(SMALL, "layers.0.mlp.up_proj")
    assert ignored == "model.layers.0.mlp.up_proj"
    swap(decoder, lambda name: name in ("lm_head", "layers.0.mlp.up_proj"))
    decoder.quantization_config = {"quant_method": "rounding", "ignore": ["lm_head", ignored]}
    return decoder, checkpoint.save(decoder, tmp_path / "model")


def test_round_trip(saved: tuple[Decoder, Path]) -> None:
    decoder, out = saved
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.1.self_attn.q_proj.weight_scale"].shape == (16, 1)
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    again = checkpoint.load(out)
    assert again.quantization_config == decoder.quantization_config
    tokens, batch = torch.arange(9), PackedBatch.from_lengths([9])
    with torch.no_grad():
        assert torch.equal(again(tokens, batch), decoder(tokens, batch))
    assert torch.equal(
        load_file(checkpoint.save(again, out.parent / "again") / "model.safetensors")[
            "model.layers.1.mlp.up_proj.weight"
        ],
        stored["model.layers.1.mlp.up_proj.weight"],
    )


def test_missing_scale_is_named(saved: tuple[Decoder, Path]) -> None:
    from safetensors.torch import save_file

    _, out = saved
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight_scale"):
        checkpoint.load(out)
