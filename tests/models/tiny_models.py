"""Small randomly initialised `transformers` models, every option of each family exercised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    LongcatFlashConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB = 199

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_MSCALE = {**YARN, "mscale": 0.8, "mscale_all_dim": 1.2, "beta_fast": 16.0, "beta_slow": 2.0}

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
MIXTURE = {"moe_intermediate_size": 24, "num_experts_per_tok": 4}


def _latent_moe(**changes: Any) -> dict[str, Any]:
    routed = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    return {**SIZES, **LATENT, **MIXTURE, **routed, "n_shared_experts": 2, **changes}


LONGCAT = {
    **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
    **LATENT,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "head_dim": 8,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 24,
    "moe_topk": 6,
    "n_routed_experts": 12,
    "zero_expert_num": 6,
    "routed_scaling_factor": 6.0,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biases-tied-llama3-rope": lambda: LlamaConfig(
        **SIZES,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(LLAMA3),
    ),
    "llama-yarn-wide-heads": lambda: LlamaConfig(
        **SIZES, head_dim=24, rope_parameters={**YARN, "beta_fast": 3.0}, rms_norm_eps=1e-5
    ),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-sliding-tied": lambda: Qwen2Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=24),
    "qwen3-bias-layer-types": lambda: Qwen3Config(
        **SIZES,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(YARN),
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, **MIXTURE, head_dim=16, num_experts=8, norm_topk_prob=True
    ),
    "qwen3_moe-sparse-step-sliding": lambda: Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 4},
        **MIXTURE,
        head_dim=16,
        num_experts=8,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=20,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=16,
    ),
    "gpt_oss-truncated-yarn": lambda: GptOssConfig(
        **SIZES,
        head_dim=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
        attention_bias=False,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={**YARN, "truncate": True, "attention_factor": 1.3},
    ),
    "deepseek_v3": lambda: DeepseekV3Config(**_latent_moe(first_k_dense_replace=1)),
    "deepseek_v3-yarn-mscale-biases": lambda: DeepseekV3Config(
        **_latent_moe(
            first_k_dense_replace=2,
            attention_bias=True,
            rope_parameters=dict(YARN_MSCALE),
            norm_topk_prob=False,
            tie_word_embeddings=True,
        )
    ),
    "deepseek_v3-plain-queries-half-rope": lambda: DeepseekV3Config(
        **_latent_moe(
            q_lora_rank=None, rope_interleave=False, first_k_dense_replace=0, n_shared_experts=1
        )
    ),
    "glm4_moe_lite": lambda: Glm4MoeLiteConfig(
        **_latent_moe(n_group=1, topk_group=1, rms_norm_eps=1e-5)
    ),
    "glm4_moe_lite-groups-dense-mix": lambda: Glm4MoeLiteConfig(
        **_latent_moe(
            mlp_layer_types=["sparse", "dense", "sparse"], rope_parameters=dict(YARN_MSCALE)
        )
    ),
    "longcat_flash": lambda: LongcatFlashConfig(**LONGCAT),
    "longcat_flash-yarn-bias-no-zero-experts": lambda: LongcatFlashConfig(
        **{**LONGCAT, "zero_expert_num": 0, "attention_bias": True},
        rope_parameters=dict(YARN_MSCALE),
    ),
}
# One name per family, for tests where the options do not matter.
FAMILY_CASES = [name for name in CONFIGS if "-" not in name]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights large enough that logits, routing and sinks are far from trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.2, generator=generator)
        elif "sinks" in name:
            parameter.normal_(0.5, 1.0, generator=generator)
        elif parameter.dim() == 1 or "bias" in name:
            parameter.normal_(0.0, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1, generator=generator)


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """A `transformers` model of case `name`, in eval mode with eager attention (sinks need it)."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    randomise(model, seed)
    return model.eval()
