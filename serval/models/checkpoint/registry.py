"""Which families and which quantised formats checkpoints may have."""

from __future__ import annotations

from serval.errors import ConfigError
from serval.models.checkpoint.family import Family
from serval.models.config import ModelConfig
from serval.registry import Entry, resolve

_HERE = "serval.models.checkpoint"

FAMILIES: dict[str, Entry] = {
    "llama": Entry(f"{_HERE}.llama:Llama", "Llama 3 and its relatives", "2407.21783"),
    "qwen2": Entry(f"{_HERE}.qwen:Qwen2", "Qwen2 and Qwen2.5", "2407.10671"),
    "qwen3": Entry(f"{_HERE}.qwen:Qwen3", "Qwen3, dense", "2505.09388"),
    "qwen3_moe": Entry(f"{_HERE}.qwen:Qwen3MoE", "Qwen3, mixture of experts", "2505.09388"),
    "gpt_oss": Entry(f"{_HERE}.gpt_oss:GptOss", "gpt-oss, bf16 weights", "2508.10925"),
    "deepseek_v3": Entry(
        f"{_HERE}.deepseek:DeepSeekV3", "DeepSeek-V3 and R1, with MTP", "2412.19437"
    ),
    "glm4_moe_lite": Entry(f"{_HERE}.deepseek:Glm4MoeLite", "GLM-4.7-Flash", "2508.06471"),
    "longcat_flash": Entry(
        f"{_HERE}.longcat:LongcatFlash", "LongCat-Flash, with MTP", "2509.01322"
    ),
}

# Quantised weights: `quant_method` of config.json's quantization_config -> see package docstring.
QUANTIZERS: dict[str, Entry] = {
    "compressed-tensors": Entry(
        "serval.compress.compressed_tensors:CompressedTensors",
        "4- and 8-bit integer linears of compressed-tensors",
    ),
}


def family_named(name: str) -> Family:
    """The family of a config.json `model_type`; raises ConfigError listing the families."""
    return resolve(FAMILIES, name, "checkpoint family")()


def family_of(config: ModelConfig) -> Family:
    return family_named(config.family)


def family_of_hub_config(values: dict[str, object]) -> Family:
    """Choose by `model_type`, else by `architectures`. Code named in `auto_map` is never run."""
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return family_named(kind)
    architectures = values.get("architectures")
    known = {entry.load().architecture: name for name, entry in FAMILIES.items()}
    if isinstance(architectures, list):
        for architecture in architectures:
            if architecture in known:
                return family_named(known[architecture])
    given = architectures[0] if isinstance(architectures, list) and architectures else kind
    supported = ", ".join(f"{known_name} ({arch})" for arch, known_name in known.items())
    raise ConfigError(
        f"config.json: architecture {given!r} (model_type {kind!r}) is not supported; supported: "
        f"{supported}"
    )
