"""Which families and which quantised formats checkpoints may have."""

from __future__ import annotations

from serval.errors import ConfigError
from serval.models.checkpoint.family import Family
from serval.models.config import ModelConfig
from serval.registry import Entry, resolve

_HERE = "serval.models.checkpoint"

FAMILIES: dict[str, Entry] = {
    "llama": Entry(f"{_HERE}.llama:Llama", "Llama 3 and its relatives", "2407.21783"),
}

# Quantised weights: `quant_method` of config.json's quantization_config -> see package docstring.
QUANTIZERS: dict[str, Entry] = {
    "compressed-tensors": Entry(
        "serval.compress.export:CompressedTensors", "int8 linears of compressed-tensors"
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
