"""Reading and writing compressed-tensors' `quantization_config` (config.json).

The format that vLLM, SGLang and transformers load: groups of modules, each with a scheme for
weights and for input activations, and a list of modules left in float. `storage.py` says how the
matrices themselves lie in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serval.compress.install import empty_module, installed, place
from serval.compress.modules import DequantizedLinear
from serval.compress.scheme import Activations, WeightScheme
from serval.compress.storage import ROW_FACTOR, Format, Storage
from serval.compress.targets import Target, targets
from serval.errors import ConfigError
from serval.models.checkpoint.safetensors_file import StoredTensor
from serval.models.decoder import Decoder

Group = dict[str, Any]

# -- writing ---------------------------------------------------------------------------------------


def describe(
    assigned: Mapping[str, Storage],
    ignore: Sequence[str],
    tables: Mapping[str, Storage] | None = None,
) -> dict[str, Any]:
    """config.json's `quantization_config`.

    assigned: storage of each quantised linear, by its name in the checkpoint (each matrix of each
    expert has one). ignore: names of linears left in float. tables: quantised embeddings.
    """
    kinds: dict[str, list[str]] = {}  # one config group each
    groups: dict[str, Group] = {}
    for name, storage in assigned.items():
        group = storage.group([])
        key = repr(group)
        groups.setdefault(key, group)
        kinds.setdefault(key, []).append(name)
    found = list(groups.values())
    if len(found) == 1:
        found[0]["targets"] = ["Linear"]
    else:
        for key, names in kinds.items():
            others = [name for other, listed in kinds.items() if other != key for name in listed]
            groups[key]["targets"] = _patterns(names, [*others, *ignore])
    # transformers takes the scheme of experts from the first group that names them
    found.sort(key=lambda group: not any(".experts" in target for target in group["targets"]))
    for name, storage in (tables or {}).items():
        found.append(storage.group([name]))
    formats = {group["format"] for group in found}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": group for i, group in enumerate(found)},
    }


def quantization_config_of(decoder: Decoder) -> dict[str, Any]:
    """`describe` of a decoder with installed modules; everything else in it stays in float."""
    linears, tables = installed(decoder)
    ignore = [
        name
        for target in targets(decoder)
        if target.kind != "embedding" and not isinstance(target.module, DequantizedLinear)
        for name in target.checkpoint_modules()
    ]
    if decoder.config.tie_word_embeddings:
        ignore.append("lm_head")  # transformers makes one: the table a second time
    return describe(linears, ignore, tables)


def _patterns(names: Iterable[str], others: Sequence[str]) -> list[str]:
    """`names` as targets: one pattern for the same matrix of all layers and experts, unless it
    would match one of `others`."""
    made: dict[str, list[str]] = {}
    for name in names:
        made.setdefault(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)), []).append(name)
    result: list[str] = []
    for pattern, listed in made.items():
        clash = any(re.fullmatch(pattern, other) for other in others)
        result += listed if clash or len(listed) == 1 else [f"re:{pattern}$"]
    return result


# -- reading ---------------------------------------------------------------------------------------


class CompressedTensors:
    """Puts quantised modules into a decoder about to be loaded (`checkpoint.QUANTIZERS`)."""

    def prepare(
        self,
        decoder: Decoder,
        quantization: dict[str, Any],
        rename: Callable[[str], str],
        stored: Mapping[str, StoredTensor],
    ) -> None:
        """Replace the modules that config groups name and `ignore` does not. Names in the lists
        are module names of the checkpoint, `re:` patterns, or "Linear" and "Embedding"; an exact
        name comes before a pattern, a pattern before a class. Raises ConfigError naming a key
        Serval cannot honour."""
        _check(quantization)
        ignore = _strings(quantization.get("ignore") or [], "ignore")
        groups = [
            _Group.read(group, f"config_groups.{label}", quantization)
            for label, group in quantization["config_groups"].items()
        ]
        for target in targets(decoder):
            storages = _storages(target, groups, ignore, stored)
            if storages is not None:
                place(decoder, target, _module(target, storages))


def _module(target: Target, storages: list[Storage]) -> nn.Module:
    """A module for `target` without values; raises ConfigError naming it."""
    try:
        made = empty_module(target, storages)
        made.checkpoint_spec()  # groups that do not divide its inputs show here at the latest
    except ConfigError as error:
        raise ConfigError(f"config.json: quantization_config: {target.name}: {error}") from error
    return made


@dataclass(frozen=True)
class _Group:
    """A config group read: which modules, and how they are stored."""

    where: str
    targets: list[str]
    storage: Storage
    ordered: bool  # `weight_g_idx` may be stored

    @classmethod
    def read(cls, group: Any, where: str, quantization: dict[str, Any]) -> _Group:
        if not isinstance(group, dict):
            raise _refuse(where, group, "an object with 'targets' and 'weights'")
        wanted = _strings(group.get("targets"), f"{where}.targets")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise _refuse(f"{where}.weights", weights, "the scheme of quantised weights")
        _require(weights, f"{where}.weights", "num_bits", (4, 8))
        _require(weights, f"{where}.weights", "type", ("int",))
        _require(weights, f"{where}.weights", "dynamic", (False, None))
        _require(weights, f"{where}.weights", "strategy", ("channel", "group"))
        if group.get("output_activations"):
            raise _refuse(
                f"{where}.output_activations", group["output_activations"], "null: Serval does not "
                "round outputs"
            )  # fmt: skip
        size = weights.get("group_size") if weights["strategy"] == "group" else None
        if weights["strategy"] == "group" and not isinstance(size, int):
            raise _refuse(f"{where}.weights.group_size", size, "a number of inputs")
        activations = _activations(group.get("input_activations"), f"{where}.input_activations")
        scheme = WeightScheme(weights["num_bits"], size, activations)
        format_ = _format(group, quantization, scheme, where)
        symmetric = weights.get("symmetric", True)
        if not symmetric and activations != "none":
            raise _refuse(
                f"{where}.weights.symmetric", symmetric, "true: weights with zero points are read "
                "where input activations are not quantised"
            )  # fmt: skip
        return cls(where, wanted, Storage(scheme, format_), bool(weights.get("actorder")))

    def fitted(self, name: str, stored: Mapping[str, StoredTensor]) -> Storage:
        """The storage of the matrix `name`, with what only its stored tensors tell."""
        scale = stored.get(f"{name}.weight_scale")
        storage = self.storage
        scheme = storage.scheme
        if f"{name}.{ROW_FACTOR}" in stored:
            scheme = WeightScheme(scheme.bits, scheme.group_size, scheme.activations, "integer")
        return Storage(
            scheme,
            storage.format,
            torch.float32 if scale is None else scale.dtype,
            f"{name}.weight_zero_point" in stored,
            f"{name}.weight_g_idx" in stored and self.ordered,
            f"{name}.input_zero_point" in stored,
        )


def _storages(
    target: Target,
    groups: Sequence[_Group],
    ignore: list[str],
    stored: Mapping[str, StoredTensor],
) -> list[Storage] | None:
    """How each matrix of a target is stored, None when it is float; raises ConfigError for experts
    treated differently and for a router."""
    kind = "Embedding" if target.kind == "embedding" else "Linear"
    classes = [kind] if target.kind != "router" else []  # not an nn.Linear everywhere
    names = target.checkpoint_modules()
    chosen = [
        None if _rank(name, kind, ignore) else _group_of(name, classes, groups) for name in names
    ]
    quantised = [group for group in chosen if group is not None]
    if not quantised:
        return None
    if len(quantised) < len(chosen):
        raise ConfigError(
            f"config.json: quantization_config leaves {names[chosen.index(None)]!r} in float but "
            "not the other experts of its layer; Serval needs all or none"
        )
    if target.kind == "router":
        raise ConfigError(
            f"config.json: quantization_config quantises {target.name!r}, which Serval computes in "
            "float; list it under 'ignore' and store it in float"
        )
    return [group.fitted(name, stored) for name, group in zip(names, quantised, strict=True)]


def _group_of(name: str, classes: list[str], groups: Sequence[_Group]) -> _Group | None:
    """The group that names a module most precisely."""
    kind = classes[0] if classes else ""
    ranked = [(_rank(name, kind, group.targets), group) for group in groups]
    rank, best = max(ranked, key=lambda pair: pair[0])
    return best if rank else None


def _rank(name: str, kind: str, entries: list[str]) -> int:
    """3 for an exact name, 2 for a pattern, 1 for the class, 0 for no match."""
    if name in entries:
        return 3
    if any(entry.startswith("re:") and re.match(entry[3:], name) for entry in entries):
        return 2
    return 1 if kind and kind in entries else 0


def _activations(inputs: Any, where: str) -> Activations:
    if inputs is None:
        return "none"
    if not isinstance(inputs, dict):
        raise _refuse(where, inputs, "null or a scheme")
    _require(inputs, where, "num_bits", (8,))
    _require(inputs, where, "type", ("int",))
    _require(inputs, where, "symmetric", (True,))
    dynamic = inputs.get("dynamic", False)
    if dynamic is True:
        _require(inputs, where, "strategy", ("token",))
        return "token"
    _require(inputs, where, "dynamic", (False, True))
    _require(inputs, where, "strategy", ("tensor",))
    return "static"


def _format(group: Group, quantization: dict[str, Any], scheme: WeightScheme, where: str) -> Format:
    """The group's format; without one the file's, except that quantised activations then mean
    int-quantized, as compressed-tensors infers."""
    named = group.get("format")
    if named is None:
        named = quantization.get("format")
        if scheme.activations != "none" and named == "pack-quantized":
            named = "int-quantized"
        if named == "mixed-precision":
            named = "int-quantized" if scheme.activations != "none" else "pack-quantized"
    if named == "int-quantized":
        return "int-quantized"
    if named == "pack-quantized":
        return "pack-quantized"
    raise _refuse(f"{where}.format", named, "'int-quantized' or 'pack-quantized'")


def _require(values: Group, where: str, key: str, allowed: tuple[Any, ...]) -> None:
    defaults = {"type": "int", "symmetric": True, "dynamic": False}
    value = values.get(key, defaults.get(key))
    if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
        expected = " or ".join(repr(one) for one in allowed if one is not None)
        raise _refuse(f"{where}.{key}", value, expected)


def _refuse(where: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"config.json: quantization_config.{where} is {value!r}; Serval reads {expected}"
    )


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
