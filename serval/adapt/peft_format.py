"""Plain LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Tensors are named by the checkpoint's module names: `base_model.model.` + name + `.lora_A.weight`
[r, d_in] and `.lora_B.weight` [d_out, r]. Reading honours r, lora_alpha, rank_pattern,
alpha_pattern, use_rslora; whatever else would change the result is refused by name.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from serval.adapt.lora import LoraLinear, LoraOptions, adaptable, adapters, features, replace
from serval.errors import CheckpointError, ConfigError
from serval.models.checkpoint import module_name
from serval.models.checkpoint.files import read_json
from serval.models.decoder import Decoder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys whose listed values change nothing; any other value asks for what is not built.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "megatron_config": (None,),
}


@dataclass(frozen=True)
class LowRank:
    """One layer's update s B A. a: float32 [r, d_in], b: float32 [d_out, r], scaling: s."""

    a: Tensor
    b: Tensor
    scaling: float
    alpha: float
    rslora: bool


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA: layer name in the decoder -> its update."""

    path: Path
    layers: dict[str, LowRank]


def read_adapter(directory: str | Path, decoder: Decoder) -> Adapter:
    """Read a plain LoRA for `decoder`, which may be quantised and is not changed.

    Raises CheckpointError naming the file or tensor, ConfigError naming a key of
    adapter_config.json that cannot be honoured.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no adapter directory {str(directory)!r}; expected one with {CONFIG} and "
            f"{WEIGHTS}"
        )
    if not (directory / CONFIG).exists():
        raise CheckpointError(f"{directory / CONFIG} is missing; is {directory} a LoRA adapter?")
    values = read_json(directory / CONFIG)
    _check_config(values, directory / CONFIG)
    pairs = _pairs(_read_tensors(directory))
    names = {module_name(decoder.config, name): name for name in adaptable(decoder)}
    linears = adaptable(decoder)
    scale_of = _scales(values, directory / CONFIG)
    layers = {}
    for stored, (a, b) in pairs.items():
        if stored not in names:
            raise CheckpointError(
                f"{directory / WEIGHTS}: this model has no linear layer {stored!r} that an adapter "
                "can be put on; was the adapter made for another model?"
            )
        d_in, d_out = features(linears[names[stored]])
        rank = a.shape[0]
        if a.shape != (rank, d_in) or b.shape != (d_out, rank):
            raise CheckpointError(
                f"{directory / WEIGHTS}: the adapter of {stored!r} has factors {list(b.shape)} and "
                f"{list(a.shape)}; this model's layer is [{d_out}, {d_in}]"
            )
        alpha, scaling = scale_of(stored, rank)
        layers[names[stored]] = LowRank(a, b, scaling, alpha, bool(values.get("use_rslora")))
    return Adapter(directory, layers)


def load_adapter(decoder: Decoder, directory: str | Path, dropout: float = 0.0) -> Adapter:
    """Put a plain LoRA into `decoder` as trainable `LoraLinear` layers; the rest is frozen.

    Errors as `read_adapter`; ConfigError when the decoder has adapters already.
    """
    if adapters(decoder):
        raise ConfigError("this model already has an adapter; merge it before loading another")
    adapter = read_adapter(directory, decoder)
    linears = adaptable(decoder)
    decoder.requires_grad_(False)
    for name, low_rank in adapter.layers.items():
        options = LoraOptions(low_rank.a.shape[0], low_rank.alpha, dropout, rslora=low_rank.rslora)
        layer = LoraLinear(linears[name], options)
        with torch.no_grad():
            layer.lora_A.copy_(low_rank.a)
            layer.lora_B.copy_(low_rank.b)
        replace(decoder, name, layer)
    return adapter


def save_adapter(
    decoder: Decoder,
    directory: str | Path,
    base_model: str = "",
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    write: bool = True,
) -> Path:
    """Write the decoder's adapters as a plain PEFT LoRA; returns the directory.

    base_model: where the base is, for `base_model_name_or_path`. gather: what makes a tensor whole
    (sharded training, where all ranks call and only one has `write`). Raises ConfigError while one
    is non-linear, or when there is none.
    """
    found = adapters(decoder)
    if not found:
        raise ConfigError("there is no adapter to save: this model has none")
    for name, layer in found.items():
        if layer.beta:
            raise ConfigError(
                f"the adapter of {name} is still non-linear (beta = {layer.beta:g}); a plain LoRA "
                "cannot say that. Train to the end of its annealing first"
            )
    config = decoder.config
    tensors = {}
    for name, layer in found.items():
        stored = module_name(config, name)
        for leaf, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            whole = gather(parameter.detach()).cpu().contiguous()
            tensors[f"{_PREFIX}{stored}.{leaf}.weight"] = whole
    target = Path(directory)
    if not write:
        return target
    staging = target.with_name(f".writing-{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(_config_of(decoder, found, base_model), indent=2, sort_keys=True)
        (staging / CONFIG).write_text(text + "\n")
        (staging / WEIGHTS).chmod((staging / CONFIG).stat().st_mode)  # safetensors leaves 0600
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            (staging / name).replace(target / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save the adapter to {target}: {error}; make room or choose another directory"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _config_of(
    decoder: Decoder, found: Mapping[str, LoraLinear], base_model: str
) -> dict[str, Any]:
    options = next(iter(found.values())).options
    names = [module_name(decoder.config, name) for name in found]
    # Leaves are what people read, but "gate_proj" would also match every expert's.
    leaves = decoder.config.moe is None and _covers_its_leaves(decoder, found)
    targets = sorted({n.rpartition(".")[2] for n in names}) if leaves else sorted(names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": _number(options.alpha),
        "rank_pattern": _pattern(decoder, found, lambda o: o.rank),
        "alpha_pattern": _pattern(decoder, found, lambda o: _number(o.alpha)),
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _number(value: float) -> float:
    """A whole number as an int: other readers insist on one."""
    return int(value) if value == int(value) else value


def _pattern(
    decoder: Decoder, found: Mapping[str, LoraLinear], value: Callable[[LoraOptions], float]
) -> dict[str, float]:
    """What departs from the first layer's rank or alpha, as PEFT writes it."""
    first = value(next(iter(found.values())).options)
    return {
        module_name(decoder.config, name): value(layer.options)
        for name, layer in found.items()
        if value(layer.options) != first
    }


def _covers_its_leaves(decoder: Decoder, found: Mapping[str, LoraLinear]) -> bool:
    leaves = {name.rpartition(".")[2] for name in found}
    return all(n in found for n in adaptable(decoder) if n.rpartition(".")[2] in leaves)


def _check_config(values: dict[str, Any], path: Path) -> None:
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {values.get('peft_type')!r}; expected 'LORA'")
    if values.get("use_afa") and values.get("afa_beta", 1.0):
        raise ConfigError(
            f"{path}: an AFA-LoRA adapter in the middle of its annealing (afa_beta = "
            f"{values.get('afa_beta', 1.0):g}) is no plain LoRA; finish its training, then export"
        )
    for key, value in values.items():
        if key in _HARMLESS:
            if value not in _HARMLESS[key]:
                raise ConfigError(f"{path}: {key} = {value!r} is not supported")
        elif key.startswith(("use_", "lora_bias")) and key not in ("use_rslora", "use_afa"):
            if value:
                raise ConfigError(
                    f"{path}: {key} = {value!r} is not supported; expected a plain LoRA"
                )
        elif key.endswith("_config") and value and key != "loftq_config":
            raise ConfigError(f"{path}: {key} is not supported; expected a plain LoRA")


def _scales(values: dict[str, Any], path: Path) -> Callable[[str, int], tuple[float, float]]:
    """(alpha, s) of a layer by its checkpoint name and rank, patterns matched as PEFT does."""
    alpha = values.get("lora_alpha")
    patterns = values.get("alpha_pattern") or {}
    if not isinstance(alpha, (int, float)) or not isinstance(patterns, dict):
        raise ConfigError(f"{path}: lora_alpha is {alpha!r}; expected a number")

    def scale(name: str, rank: int) -> tuple[float, float]:
        chosen = alpha
        for pattern, own in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                chosen = own
                break
        root = math.sqrt(rank) if values.get("use_rslora") else rank
        return float(chosen), float(chosen) / root

    return scale


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle and is not read)"
        hint = pickled if (directory / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{path} is missing{hint}")
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds values that are no finite floats")
    return tensors


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Checkpoint name of each layer -> (A, B), both float32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.(lora_[AB])\.weight", name)
        if match is None or tensor.ndim != 2:
            raise CheckpointError(
                f"adapter tensor {name!r} {list(tensor.shape)} is not a factor of a linear layer's "
                f"LoRA; expected {_PREFIX}<layer>.lora_A.weight or .lora_B.weight"
            )
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise CheckpointError("the adapter holds no tensors")
    for layer, factors in found.items():
        if len(factors) != 2:
            missing = ({"lora_A", "lora_B"} - factors.keys()).pop()
            raise CheckpointError(f"the adapter of {layer!r} lacks its {missing}")
    return {layer: (factors["lora_A"], factors["lora_B"]) for layer, factors in found.items()}
