"""Small decoders of every kind of attention, and dense attention to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from serval.models.config import AttentionVariants, MLAConfig, ModelConfig, MoEConfig
from serval.models.decoder import Decoder

BASE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=24)
MLA = MLAConfig(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
KINDS: dict[str, dict] = {
    "gqa": {},
    "windows and sinks": {
        "attention_sinks": True,
        "sliding_window": 9,
        "layer_types": ["full", "sliding", "full"],
    },
    "mla": {"mla": MLA, "num_key_value_heads": None, "head_dim": None},
    "moe": {"moe": MOE},
    "shortcut": {"moe": MOE, "block": "shortcut"},
    "softmax1": {"attention": AttentionVariants(weights="softmax1")},
    "softpick": {"attention": AttentionVariants(weights="softpick", gate="headwise")},
    "sigmoid": {"attention": AttentionVariants(weights="sigmoid")},
    "kv bias": {"attention": AttentionVariants(weights="kv_bias")},
}


def decoder_of(kind: str = "gqa", seed: int = 0) -> Decoder:
    """Random weights, with scores large enough that attention is not uniform."""
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(**{**BASE, **KINDS[kind]})).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)
        elif name.endswith("sinks"):
            parameter.normal_()
    return decoder


def tokens_of(length: int, seed: int = 1) -> Tensor:
    return torch.randint(60, (length,), generator=torch.Generator().manual_seed(seed))


def dense_weights(
    q: Tensor, k: Tensor, scale: float, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The attention matrix of one document [H, T, T], in float64."""
    length, group = q.shape[0], q.shape[1] // k.shape[1]
    z = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1)) * scale
    age = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    z = z.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.double()[:, None, None].expand(-1, length, 1)], -1)
    return z.softmax(-1)[..., :length]
