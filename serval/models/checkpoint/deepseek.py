"""DeepSeek-V3 (arXiv 2412.19437) and GLM-4.7-Flash, which shares its format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from serval.errors import CheckpointError, ConfigError
from serval.models.checkpoint.family import Family
from serval.models.checkpoint.hub_config import HubConfig, read_common, write_common
from serval.models.config import MLAConfig, ModelConfig, MoEConfig

# The two places of an MTP layer that are not its block, and what they are in the checkpoint.
_MTP_NAMES = {"norm": "shared_head.norm"}


class DeepSeekV3(Family):
    """Latent attention; sigmoid router with selection bias and group limit; shared experts.

    The MTP head is stored as extra layers after the last: `model.layers.{L}.` holds the block's
    parameters, `enorm`, `hnorm`, `eh_proj`, `shared_head.norm`, and copies of the embedding and of
    the output head.
    """

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    default_eps = 1e-6

    def read_config(self, hub: HubConfig) -> ModelConfig:
        hub.must_be("scoring_func", "sigmoid")
        hub.must_be("topk_method", "noaux_tc")
        hub.must_be("moe_layer_freq", 1)
        common = read_common(hub, eps=self.default_eps)
        common["rope"].interleaved = hub.flag("rope_interleave", True)
        common["num_key_value_heads"] = common["head_dim"] = None
        mla = read_mla(hub)
        width = hub.integer("moe_intermediate_size")
        moe = MoEConfig(
            num_experts=hub.integer("n_routed_experts"),
            top_k=hub.integer("num_experts_per_tok"),
            intermediate_size=width,
            scoring="sigmoid",
            norm_topk_prob=hub.flag("norm_topk_prob", True),
            routed_scaling_factor=hub.number("routed_scaling_factor"),
            n_group=hub.integer("n_group", 1),
            topk_group=hub.integer("topk_group", 1),
            shared_intermediate_size=width * hub.integer("n_shared_experts", 1, 0),
            selection_bias=True,
        )
        bias = hub.flag("attention_bias")
        return ModelConfig(
            **common,
            qkv_bias=bias,
            output_bias=bias,
            mla=mla,
            moe=moe,
            moe_layers=self.read_moe_layers(hub, common["num_hidden_layers"]),
            num_mtp_layers=self.read_mtp_layers(hub),
            mtp_dense=False,
            family=self.model_type,
        )

    def read_moe_layers(self, hub: HubConfig, layers: int) -> list[bool]:
        first = hub.integer("first_k_dense_replace", 3, 0)
        return [layer >= first for layer in range(layers)]

    def read_mtp_layers(self, hub: HubConfig) -> int:
        return hub.optional("num_nextn_predict_layers", int, 0) or 0

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        moe, _ = moe_and_mla(config, self.model_type)
        values = write_common(config, self.model_type, self.architecture)
        del values["head_dim"]
        return {
            **values,
            **write_latent_moe(config, self.model_type),
            "rope_interleave": config.rope.interleaved,
            "moe_intermediate_size": moe.intermediate_size,
            "n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
            "num_experts_per_tok": moe.top_k,
            "n_group": moe.n_group,
            "topk_group": moe.topk_group,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            **self.write_moe_layers(config),
        }

    def write_moe_layers(self, config: ModelConfig) -> dict[str, Any]:
        sparse = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
        return {"first_k_dense_replace": sparse.index(True) if True in sparse else len(sparse)}

    def rename(self, name: str, config: ModelConfig) -> str:
        if not name.startswith("mtp."):
            return super().rename(name, config)
        _, depth, rest = name.split(".", 2)
        part, _, leaf = rest.partition(".")
        rest = leaf if part == "block" else f"{_MTP_NAMES.get(part, part)}.{leaf}".rstrip(".")
        return f"model.layers.{config.num_hidden_layers + int(depth)}.{rest}"

    def fit(self, config: ModelConfig, names: Iterable[str]) -> ModelConfig:
        """transformers drops the MTP layers but keeps their number in config.json."""
        layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
        first, found = config.num_hidden_layers, 0
        while str(first + found) in layers:
            found += 1
        if found and config.num_mtp_layers > found:
            raise CheckpointError(
                f"config.json: num_nextn_predict_layers is {config.num_mtp_layers}; the files hold "
                f"{found} layers after the first {first}"
            )
        return config if found else dataclasses.replace(config, num_mtp_layers=0)

    def copies(self, config: ModelConfig) -> dict[str, str]:
        head = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        copies = {}
        for depth in range(config.num_mtp_layers):
            prefix = f"model.layers.{config.num_hidden_layers + depth}"
            copies[f"{prefix}.embed_tokens.weight"] = "embed_tokens.weight"
            copies[f"{prefix}.shared_head.head.weight"] = head
        return copies


class Glm4MoeLite(DeepSeekV3):
    """GLM-4.7-Flash: DeepSeek-V3's model with its dense layers listed in `mlp_layer_types`."""

    model_type = "glm4_moe_lite"
    architecture = "Glm4MoeLiteForCausalLM"
    default_eps = 1e-5

    def read_moe_layers(self, hub: HubConfig, layers: int) -> list[bool]:
        types = hub.optional("mlp_layer_types", list)
        if types is None:
            first = hub.integer("first_k_dense_replace", 1, 0)
            return [layer >= first for layer in range(layers)]
        if len(types) != layers or not set(types) <= {"dense", "sparse"}:
            raise ConfigError(
                f"config.json: mlp_layer_types is {types!r}; expected {layers} entries, each "
                "'dense' or 'sparse'"
            )
        return [kind == "sparse" for kind in types]

    def write_moe_layers(self, config: ModelConfig) -> dict[str, Any]:
        sparse = [config.is_moe_layer(i) for i in range(config.num_hidden_layers)]
        return {"mlp_layer_types": ["sparse" if s else "dense" for s in sparse]}


def read_mla(hub: HubConfig) -> MLAConfig:
    return MLAConfig(
        kv_lora_rank=hub.integer("kv_lora_rank"),
        q_lora_rank=hub.optional("q_lora_rank", int, 1),
        qk_nope_head_dim=hub.integer("qk_nope_head_dim"),
        qk_rope_head_dim=hub.integer("qk_rope_head_dim"),
        v_head_dim=hub.integer("v_head_dim"),
    )


def moe_and_mla(config: ModelConfig, model_type: str) -> tuple[MoEConfig, MLAConfig]:
    """The two parts that DeepSeek's and LongCat's formats cannot do without, else ConfigError."""
    if config.moe is None or config.mla is None:
        raise ConfigError(f"checkpoint family {model_type!r} needs model.moe and .mla")
    return config.moe, config.mla


def write_latent_moe(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The keys that DeepSeek's and LongCat's config.json have in common."""
    moe, mla = moe_and_mla(config, model_type)
    return {
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": config.qkv_bias,
        "n_routed_experts": moe.num_experts,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "num_nextn_predict_layers": config.num_mtp_layers,
    }
