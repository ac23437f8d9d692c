from __future__ import annotations

import torch

from serval.models.config import MLAConfig, ModelConfig, MoEConfig
from serval.models.decoder import Decoder


def decoder(seed: int = 0, **changes: object) -> Decoder:
    values: dict = {
        "vocab_size": 203,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 100,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    } | changes
    torch.manual_seed(seed)
    return Decoder(ModelConfig(**values)).eval()


def moe_decoder(**changes: object) -> Decoder:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=36, norm_topk_prob=True)
    return decoder(moe=moe, family="qwen3_moe", qk_norm=True, **changes)


def mla_decoder(**changes: object) -> Decoder:
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        intermediate_size=36,
        scoring="sigmoid",
        norm_topk_prob=True,
        selection_bias=True,
        shared_intermediate_size=36,
    )
    return decoder(mla=mla, moe=moe, moe_layers=[False, True], family="deepseek_v3", **changes)
