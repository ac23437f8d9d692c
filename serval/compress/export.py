"""Reading and writing compressed-tensors' `quantization_config` (config.json).

The format that vLLM, SGLang and transformers load. W8A8 is "int-quantized": per linear an int8
`weight` [N, K] and a `weight_scale` [N, 1] in the model's dtype; activations are quantised per
token when the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from serval.compress.registry import COMPRESSORS
from serval.compress.targets import Target, targets
from serval.errors import ConfigError
from serval.models.decoder import Decoder

Group = dict[str, Any]


def int8_group(target_names: Sequence[str], *, activations: bool = True) -> Group:
    """The config group of W8A8 (or, without `activations`, of int8 weights alone)."""
    scheme = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
    }
    inputs = {**scheme, "strategy": "token", "dynamic": True} if activations else None
    return {
        "targets": list(target_names),
        "format": "int-quantized",
        "weights": scheme,
        "input_activations": inputs,
        "output_activations": None,
    }


def quantization_config(groups: Sequence[Group], ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's `quantization_config` for `groups`; `ignore` names modules left in float."""
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }


class CompressedTensors:
    """Puts quantised modules into a decoder about to be loaded (`checkpoint.QUANTIZERS`)."""

    def prepare(
        self, decoder: Decoder, quantization: dict[str, Any], rename: Callable[[str], str]
    ) -> None:
        """Replace the modules that config groups name and `ignore` does not. Names in the lists
        are module names of the checkpoint, `re:` patterns, or "Linear" and "Embedding". Raises
        ConfigError naming a key Serval cannot honour."""
        _check(quantization)
        ignore = _strings(quantization.get("ignore") or [], "ignore")
        found = list(targets(decoder))
        for label, group in quantization["config_groups"].items():
            where = f"config_groups.{label}"
            compressor = _reader(group, where)
            wanted = _strings(group.get("targets"), f"{where}.targets")
            for target in found:
                if _chosen(target, wanted, ignore):
                    if target.kind == "router":
                        raise ConfigError(
                            f"config.json: quantization_config quantises {target.name!r}, which "
                            "Serval computes in float; list it under 'ignore' and store it in float"
                        )
                    compressor.install(decoder, target, compressor.empty(target))


def _check(quantization: dict[str, Any]) -> None:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(
            "config.json: quantization_config.config_groups is missing or empty; expected groups "
            "with 'targets' and 'weights'"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(key):
            raise ConfigError(
                f"config.json: quantization_config.{key} is {quantization[key]!r}; Serval reads "
                "checkpoints without it (choose a cache layout with --kv instead)"
            )
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(
            f"config.json: quantization_config.quantization_status is {status!r}; expected "
            "'compressed': save the model with save_compressed=True"
        )


def _reader(group: Any, where: str) -> Any:
    """The compressor whose storage the group describes."""
    if isinstance(group, dict):
        for entry in COMPRESSORS.values():
            compressor = entry.load()
            if compressor.reads(group):
                return compressor
    weights = group.get("weights") if isinstance(group, dict) else group
    raise ConfigError(
        f"config.json: quantization_config.{where}.weights is {weights!r}; Serval reads "
        f"{', '.join(COMPRESSORS)}"
    )


def _chosen(target: Target, wanted: list[str], ignore: list[str]) -> bool:
    """Whether a target is quantised; raises ConfigError for experts treated differently."""
    kind = "Embedding" if target.kind == "embedding" else "Linear"
    names = target.checkpoint_modules()
    if target.kind == "router":
        wanted = [entry for entry in wanted if entry != "Linear"]  # not an nn.Linear everywhere
    chosen = [_matches(name, kind, wanted) and not _matches(name, kind, ignore) for name in names]
    if any(chosen) and not all(chosen):
        odd = names[chosen.index(False)]
        raise ConfigError(
            f"config.json: quantization_config.ignore leaves {odd!r} in float but not the other "
            "experts of its layer; Serval needs all or none"
        )
    return chosen[0]


def _matches(name: str, kind: str, entries: list[str]) -> bool:
    return any(
        re.match(entry[3:], name) if entry.startswith("re:") else entry in (name, kind)
        for entry in entries
    )


def _strings(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(
            f"config.json: quantization_config.{key} is {value!r}; expected a list of module names"
        )
    for entry in value:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ConfigError(
                    f"config.json: quantization_config.{key}: {entry!r} is not a regular "
                    f"expression ({error})"
                ) from error
    return value
