"""Llama 3 (arXiv 2407.21783) and what shares its format: `LlamaForCausalLM`."""

from __future__ import annotations

from typing import Any

from serval.models.checkpoint.family import Family
from serval.models.checkpoint.hub_config import HubConfig, read_common, write_common
from serval.models.config import ModelConfig


class Llama(Family):
    """Grouped-query attention, SwiGLU, optional biases, RoPE default, llama3 or yarn."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        hub.must_be("pretraining_tp", 1)
        bias = hub.flag("attention_bias")
        return ModelConfig(
            **read_common(hub),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=hub.flag("mlp_bias"),
            family=self.model_type,
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        return {
            **write_common(config, self.model_type, self.architecture),
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
        }
