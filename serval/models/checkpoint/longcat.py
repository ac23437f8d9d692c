"""LongCat-Flash (arXiv 2509.01322): shortcut-connected blocks and zero-computation experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from serval.errors import ConfigError
from serval.models.checkpoint.deepseek import moe_and_mla, read_mla, write_latent_moe
from serval.models.checkpoint.family import Family
from serval.models.checkpoint.hub_config import HubConfig, read_common, write_common
from serval.models.config import ModelConfig, MoEConfig

_MTP = "model.mtp.layers"
_UNUSED_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up)_proj\.weight")


class LongcatFlash(Family):
    """`num_layers` blocks of two attentions each (`num_hidden_layers` counts the attentions).

    The router is `mlp.router.classifier`. The MTP head is one dense layer under
    `model.mtp.layers.0.`, its norms `enorm.m` and `hnorm.m`, its MLP in `transformer_layer.mlp`,
    its final norm `model.mtp.norm`, with a copy of the embedding.
    """

    model_type = "longcat_flash"
    architecture = "LongcatFlashForCausalLM"

    def read_config(self, hub: HubConfig) -> ModelConfig:
        hub.must_be("zero_expert_type", "identity")
        hub.must_be("attention_method", "MLA")
        hub.must_be("nextn_use_scmoe", False)
        layers = hub.optional("num_layers", int, 1)
        if layers is None:
            layers = hub.integer("num_hidden_layers") // 2
        width = hub.optional("ffn_hidden_size", int, 1) or hub.integer("intermediate_size")
        hub = HubConfig({**hub.values, "num_hidden_layers": layers, "intermediate_size": width})
        common = read_common(hub, theta=10_000_000.0, eps=1e-5)
        common["rope"].interleaved = True
        common["num_key_value_heads"] = common["head_dim"] = None
        mla = read_mla(hub)
        if mla.q_lora_rank is not None and hub.flag("mla_scale_q_lora", True):
            mla.scale_q = (common["hidden_size"] / mla.q_lora_rank) ** 0.5
        if hub.flag("mla_scale_kv_lora", True):
            mla.scale_kv = (common["hidden_size"] / mla.kv_lora_rank) ** 0.5
        top_k = hub.optional("moe_topk", int, 1) or hub.integer("num_experts_per_tok")
        moe = MoEConfig(
            num_experts=hub.integer("n_routed_experts"),
            top_k=top_k,
            intermediate_size=hub.integer("expert_ffn_hidden_size"),
            scoring="softmax",
            norm_topk_prob=hub.flag("norm_topk_prob"),
            routed_scaling_factor=hub.number("routed_scaling_factor", 1.0),
            selection_bias=True,
            num_zero_experts=hub.optional("zero_expert_num", int, 0) or 0,
            router_bias=hub.flag("router_bias"),
        )
        bias = hub.flag("attention_bias")
        return ModelConfig(
            **common,
            qkv_bias=bias,
            output_bias=bias,
            mla=mla,
            moe=moe,
            block="shortcut",
            num_mtp_layers=hub.optional("num_nextn_predict_layers", int, 0) or 0,
            mtp_dense=True,
            family=self.model_type,
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        moe, mla = moe_and_mla(config, self.model_type)
        values = write_common(config, self.model_type, self.architecture)
        del values["intermediate_size"]
        return {
            **values,
            **write_latent_moe(config, self.model_type),
            "num_layers": config.num_hidden_layers,
            "num_hidden_layers": 2 * config.num_hidden_layers,
            "head_dim": mla.qk_rope_head_dim,  # the width that transformers rotates
            "ffn_hidden_size": config.intermediate_size,
            "expert_ffn_hidden_size": moe.intermediate_size,
            "zero_expert_num": moe.num_zero_experts,
            "zero_expert_type": "identity",
            "moe_topk": moe.top_k,
            "router_bias": moe.router_bias,
            "attention_method": "MLA",
            "mla_scale_q_lora": mla.scale_q != 1.0,
            "mla_scale_kv_lora": mla.scale_kv != 1.0,
            "nextn_use_scmoe": False,
        }

    def rename(self, name: str, config: ModelConfig) -> str:
        if not name.startswith("mtp."):
            router = re.sub(r"\.mlp\.gate\.(weight|bias)$", r".mlp.router.classifier.\1", name)
            router = re.sub(r"\.mlp\.gate(\.|$)", r".mlp.router\1", router)
            return super().rename(router, config)
        _, depth, rest = name.split(".", 2)
        part, _, leaf = rest.partition(".")
        if part == "norm":
            return f"model.mtp.norm.{leaf}"
        if part in ("enorm", "hnorm"):
            rest = f"{part}.m.{leaf}"
        elif part == "block":
            rest = f"transformer_layer.{leaf}" if leaf.startswith("mlp.") else leaf
        return f"{_MTP}.{depth}.{rest}"

    def fit(self, config: ModelConfig, names: Iterable[str]) -> ModelConfig:
        """The head may be left out of the files, or out of config.json."""
        found = any(name.startswith(f"{_MTP}.0.") for name in names)
        if config.num_mtp_layers > 1:
            raise ConfigError(
                f"config.json: num_nextn_predict_layers is {config.num_mtp_layers}; Serval "
                "supports at most 1 in this family, whose MTP norm is stored once"
            )
        return dataclasses.replace(config, num_mtp_layers=int(found))

    def ignores(self, name: str, config: ModelConfig) -> bool:
        """transformers also stores gate and up rows for the identity experts, which have none."""
        unused = _UNUSED_EXPERT.fullmatch(name)
        if unused and config.moe is not None:
            return int(unused.group(1)) >= config.moe.num_experts
        return super().ignores(name, config)

    def copies(self, config: ModelConfig) -> dict[str, str]:
        if not config.num_mtp_layers:
            return {}
        return {"model.mtp.embed_tokens.weight": "embed_tokens.weight"}

    def fillers(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """transformers 5 does not load the original layout, which has no rows for the identity
        experts: its stacks hold gate and up rows for them, unused. Both are read here."""
        moe = config.moe
        assert moe is not None
        shape = (moe.intermediate_size, config.hidden_size)
        return {
            f"model.layers.{layer}.mlp.experts.{moe.num_experts + extra}.{half}_proj.weight": shape
            for layer in range(config.num_hidden_layers)
            for extra in range(moe.num_zero_experts)
            for half in ("gate", "up")
        }
