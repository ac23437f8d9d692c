"""Published config.json files of each family read as the models they are, by parameter count."""

from __future__ import annotations

from typing import Any

import pytest

from serval.errors import ConfigError
from serval.models.checkpoint.hub_config import HubConfig
from serval.models.checkpoint.reading import empty_decoder
from serval.models.checkpoint.registry import family_of_hub_config
from serval.models.config import ModelConfig

LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
LONGCAT_FLASH: dict[str, Any] = {
    "architectures": ["LongcatFlashForCausalLM"],
    "attention_bias": False,
    "attention_method": "MLA",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expert_ffn_hidden_size": 2048,
    "ffn_hidden_size": 12288,
    "hidden_size": 6144,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "mla_scale_kv_lora": True,
    "mla_scale_q_lora": True,
    "moe_topk": 12,
    "n_routed_experts": 512,
    "num_attention_heads": 64,
    "num_layers": 28,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000.0,
    "routed_scaling_factor": 6.0,
    "v_head_dim": 128,
    "vocab_size": 131072,
    "zero_expert_num": 256,
    "zero_expert_type": "identity",
}
# Name -> config.json, parameters in units of 1e9 as published or by hand.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.2-1B": (LLAMA_3_2_1B, 1.2358),
    "Qwen2.5-7B": (QWEN_2_5_7B, 7.6156),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.532),
    "gpt-oss-20b": (GPT_OSS_20B, 20.915),
    "DeepSeek-V3": (DEEPSEEK_V3, 682.5),  # 671 and the 11.5 of the MTP layer's own weights
    "LongCat-Flash": (LONGCAT_FLASH, 560.7),
}


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of_hub_config(values).read_config(HubConfig(values))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str) -> None:
    values, billions = PUBLISHED[name]
    decoder = empty_decoder(read(values))
    count = sum(p.numel() for p in decoder.parameters()) / 1e9
    assert count == pytest.approx(billions, rel=2e-4)


def test_details_survive() -> None:
    llama, deepseek, longcat = read(LLAMA_3_2_1B), read(DEEPSEEK_V3), read(LONGCAT_FLASH)
    assert llama.eos_token_ids() == [128001, 128008, 128009]
    assert (llama.rope.kind, llama.rope.theta, llama.rope.factor) == ("llama3", 5e5, 32.0)
    assert deepseek.rope.mscale_all_dim == 1.0
    assert deepseek.rope.interleaved
    assert deepseek.moe is not None
    assert (deepseek.moe.n_group, deepseek.moe.topk_group, deepseek.num_mtp_layers) == (8, 4, 1)
    assert longcat.mla is not None
    assert longcat.mla.scale_q == 2.0
    assert longcat.mla.scale_kv == pytest.approx(12**0.5)
    assert read(QWEN_2_5_7B).layer_types is None
    assert read(GPT_OSS_20B).layer_types == ["sliding", "full"] * 12


@pytest.mark.parametrize(
    ("values", "changes", "word"),
    [
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (LONGCAT_FLASH, {"zero_expert_type": "drop"}, "zero_expert_type"),
        (LONGCAT_FLASH, {"nextn_use_scmoe": True}, "nextn_use_scmoe"),
        (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit"),
        (GPT_OSS_20B, {"layer_types": ["linear_attention"] * 24}, "layer_types"),
        (GPT_OSS_20B, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "top_k"),
        (QWEN_2_5_7B, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
    ],
)
def test_what_is_not_supported_is_named(
    values: dict[str, Any], changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        read({**values, **changes})
