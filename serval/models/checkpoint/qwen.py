"""Qwen2 (arXiv 2407.10671), Qwen3 and Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from serval.errors import ConfigError
from serval.models.checkpoint.family import Family
from serval.models.checkpoint.hub_config import (
    HubConfig,
    read_common,
    read_windows,
    write_common,
    write_windows,
)
from serval.models.config import ModelConfig, MoEConfig


class Qwen2(Family):
    """Biases on queries, keys and values; a sliding window on layers from `max_window_layers`."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        return ModelConfig(
            **read_common(hub), **_read_sliding(hub), qkv_bias=True, family=self.model_type
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        values = write_common(config, self.model_type, self.architecture)
        return {**values, **_write_sliding(config)}


class Qwen3(Family):
    """RMSNorm on each head's queries and keys, head_dim given apart, biases optional."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        return ModelConfig(
            **_read_normed(hub), **_read_sliding(hub), qk_norm=True, family=self.model_type
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        values = write_common(config, self.model_type, self.architecture)
        return {**values, **_write_sliding(config), "attention_bias": config.qkv_bias}


class Qwen3MoE(Family):
    """Qwen3 with softmax-routed experts on every `decoder_sparse_step`-th layer but
    `mlp_only_layers`. With `use_sliding_window` every layer slides."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        common = _read_normed(hub)
        layers = common["num_hidden_layers"]
        step = hub.integer("decoder_sparse_step", 1)
        dense = hub.optional("mlp_only_layers", list) or []
        sparse = [(i + 1) % step == 0 and i not in dense for i in range(layers)]
        window = hub.optional("sliding_window", int, 1) if hub.flag("use_sliding_window") else None
        count = hub.optional("num_experts", int) or hub.integer("num_local_experts", 128)
        moe = MoEConfig(
            num_experts=count,
            top_k=hub.integer("num_experts_per_tok", 8),
            intermediate_size=hub.integer("moe_intermediate_size", 768),
            scoring="softmax",
            norm_topk_prob=hub.flag("norm_topk_prob"),
        )
        return ModelConfig(
            **common,
            qk_norm=True,
            sliding_window=window,
            layer_types=["sliding"] * layers if window else None,
            moe=moe,
            moe_layers=None if all(sparse) else sparse,
            family=self.model_type,
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        moe = config.moe
        if moe is None:
            raise ConfigError(f"checkpoint family {self.model_type!r} needs model.moe")
        values = write_common(config, self.model_type, self.architecture)
        dense = [i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)]
        return {
            **values,
            "attention_bias": config.qkv_bias,
            "use_sliding_window": config.layer_types is not None,
            "sliding_window": config.sliding_window,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            "norm_topk_prob": moe.norm_topk_prob,
        }


def _read_normed(hub: HubConfig) -> dict[str, Any]:
    common = read_common(hub)
    if common["head_dim"] is None:
        common["head_dim"] = 128
    bias = hub.flag("attention_bias")
    return {**common, "qkv_bias": bias, "output_bias": bias}


def _read_sliding(hub: HubConfig) -> dict[str, Any]:
    layers = hub.integer("num_hidden_layers")
    window = hub.optional("sliding_window", int, 1) if hub.flag("use_sliding_window") else None
    first = hub.integer("max_window_layers", 28, 0) if window else layers
    default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    types = read_windows(hub, layers, default)
    if types is not None and window is None:
        raise ConfigError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is false or "
            "sliding_window is not set"
        )
    return {"layer_types": types, "sliding_window": window if types else None}


def _write_sliding(config: ModelConfig) -> dict[str, Any]:
    types = write_windows(config)
    slides = "sliding_attention" in types
    first = types.index("sliding_attention") if slides else config.num_hidden_layers
    return {
        "layer_types": types,
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window if slides else None,
        "max_window_layers": first,
    }
