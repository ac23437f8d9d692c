"""A small decoder with adapters whose B is not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serval.adapt.lora import LoraOptions, adapters, add_adapters, set_beta
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, ModelConfig, MoEConfig
from serval.models.decoder import Decoder

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {"family": "llama"},
    "biases": {"qkv_bias": True, "tie_word_embeddings": True, "family": "qwen2"},
    "moe-mla": {
        "mla": MLAConfig(16, 16, 8, 16, q_lora_rank=24),
        "moe": MoEConfig(4, 2, 32, shared_intermediate_size=24),
    },
}


def toy_decoder(kind: str = "gqa", seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    return Decoder(ModelConfig(**(values | KINDS[kind]))).eval()


def fill(decoder: Decoder, seed: int = 1) -> Decoder:
    """Give every adapter a B, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(decoder).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return decoder


def adapted(kind: str = "gqa", beta: float = 0.0, **options: Any) -> Decoder:
    decoder = toy_decoder(kind)
    add_adapters(decoder, LoraOptions(**{"rank": 4, "alpha": 8.0, **options}))
    set_beta(decoder, beta)
    return fill(decoder)


def logits(decoder: Decoder, tokens: Tensor | None = None) -> Tensor:
    tokens = torch.arange(40) * 7 % 96 if tokens is None else tokens
    with torch.no_grad():
        batch = PackedBatch.from_lengths([25, len(tokens) - 25])
        return decoder.logits(decoder(tokens, batch))
