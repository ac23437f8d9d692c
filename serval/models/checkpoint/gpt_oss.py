"""gpt-oss (arXiv 2508.10925), weights in bfloat16 or wider (not the MXFP4 release files)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from serval.errors import ConfigError
from serval.models.checkpoint.family import Family, Piece
from serval.models.checkpoint.hub_config import (
    HubConfig,
    read_common,
    read_windows,
    write_common,
    write_windows,
)
from serval.models.config import ModelConfig, MoEConfig

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Family):
    """Alternating sliding window, sink logits, router and experts with biases, clamped SwiGLU.

    Expert weights are stored transposed, gate and up interleaved: gate_up_proj [E, D, 2F] with
    columns gate_0, up_0, gate_1, ...; down_proj [E, F, D].
    """

    model_type = "gpt_oss"
    architecture = "GptOssForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        if not hub.values.get("rope_parameters") and not hub.values.get("rope_scaling"):
            hub = HubConfig({**hub.values, "rope_parameters": dict(_DEFAULT_ROPE)})
        hub.must_be("swiglu_limit", 7.0)
        common = read_common(hub, theta=150000.0, eps=1e-5)
        if common["head_dim"] is None:
            common["head_dim"] = 64
        layers, bias = common["num_hidden_layers"], hub.flag("attention_bias", True)
        alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        types = read_windows(hub, layers, alternating)
        count = hub.optional("num_local_experts", int) or hub.integer("num_experts", 128)
        moe = MoEConfig(
            num_experts=count,
            top_k=hub.integer("num_experts_per_tok", 4),
            intermediate_size=common["intermediate_size"],
            scoring="softmax_topk",
            router_bias=True,
            expert_bias=True,
        )
        return ModelConfig(
            **common,
            qkv_bias=bias,
            output_bias=bias,
            attention_sinks=True,
            layer_types=types,
            sliding_window=hub.integer("sliding_window", 128) if types else None,
            activation="clamped_swiglu",
            moe=moe,
            family=self.model_type,
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        if config.moe is None:
            raise ConfigError(f"checkpoint family {self.model_type!r} needs model.moe")
        return {
            **write_common(config, self.model_type, self.architecture),
            "attention_bias": config.qkv_bias,
            "layer_types": write_windows(config),
            "sliding_window": config.sliding_window,
            "intermediate_size": config.moe.intermediate_size,
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "swiglu_limit": 7.0,
        }

    def rename(self, name: str, config: ModelConfig) -> str:
        return super().rename(name, config).replace(".mlp.gate", ".mlp.router")

    def expert_pieces(self, prefix: str, leaf: str, stack: Tensor) -> Iterator[Piece]:
        count, rows = stack.shape[:2]
        if leaf == "down_proj":
            yield Piece.of(f"{prefix}.down_proj", stack.transpose(1, 2))
        elif leaf == "gate_up_proj":
            hidden = stack.shape[2]
            view = stack.view(count, 2, rows // 2, hidden).permute(0, 3, 2, 1)  # [E, D, F, 2]
            yield Piece(f"{prefix}.gate_up_proj", view, (count, hidden, rows))
        elif leaf == "gate_up_bias":
            view = stack.view(count, 2, rows // 2).transpose(1, 2)
            yield Piece(f"{prefix}.gate_up_proj_bias", view, (count, rows))
        elif leaf == "down_bias":
            yield Piece.of(f"{prefix}.down_proj_bias", stack)
