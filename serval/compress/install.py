"""Putting quantised weights into a decoder, and saying of a decoder what it holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from serval.compress.expert_stack import LEAVES, QuantizedExperts
from serval.compress.modules import (
    DequantizedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedHead,
)
from serval.compress.scheme import QuantizedWeight
from serval.compress.storage import Format, Storage
from serval.compress.targets import Target, replace
from serval.errors import ConfigError
from serval.models.checkpoint.registry import family_of
from serval.models.decoder import Decoder

_LINEARS: dict[str, type[QuantizedLinear] | type[DequantizedLinear]] = {
    "linear": QuantizedLinear,
    "head": QuantizedLinear,
    "embedding": QuantizedEmbedding,
    "latent": DequantizedLinear,
}


def install(
    decoder: Decoder,
    target: Target,
    quantized: QuantizedWeight | Sequence[QuantizedWeight],
    bias: Tensor | None = None,
    format: Format | None = None,
) -> nn.Module:
    """Replace the module of `target` by one that multiplies by `quantized`; returns it.

    quantized: one matrix; for experts a sequence in the order of `target.checkpoint_modules()`,
    where an expert's gate_proj and up_proj share scheme and static scale. bias [N] replaces the
    module's own. format: in which it is stored, None for the scheme's default. The module lies
    where the old one did; if that had no storage, where the integers do.
    """
    weights = [quantized] if isinstance(quantized, QuantizedWeight) else list(quantized)
    module = empty_module(target, [Storage.of(weight, format) for weight in weights])
    device = next(target.module.parameters()).device
    if device.type == "meta":
        device = weights[0].codes.device
    if isinstance(module, QuantizedExperts):
        module.take(weights, device)
    else:
        module.take(weights[0], device)
        old = bias if bias is not None else getattr(target.module, "bias", None)
        if old is not None:
            module.bias = nn.Parameter(old.detach().float().to(device), requires_grad=False)
    place(decoder, target, module)
    return module


def empty_module(
    target: Target, storages: Sequence[Storage]
) -> QuantizedLinear | DequantizedLinear | QuantizedExperts:
    """A module for `target` without values. storages: one for each of its checkpoint modules.
    Raises ConfigError when experts differ in a way one grouped product cannot serve."""
    if target.kind != "experts":
        return _LINEARS[target.kind].like(target.module, storages[0])
    names = target.checkpoint_modules()
    by_leaf: dict[str, Storage] = dict(zip(LEAVES, storages, strict=False))
    for name, storage in zip(names, storages, strict=True):
        leaf = name.rpartition(".")[2]
        if storage != by_leaf[leaf] or by_leaf["gate_proj"] != by_leaf["up_proj"]:
            raise ConfigError(
                f"{name} is quantised unlike the other experts of its layer; all gate_proj and "
                "up_proj need one scheme, and all down_proj"
            )
    return QuantizedExperts.like(target.module, (by_leaf["gate_proj"], by_leaf["down_proj"]))


def place(decoder: Decoder, target: Target, module: nn.Module) -> None:
    """Put a quantised module in the place of `target`; a tied head follows its embedding."""
    replace(decoder, target.path, module)
    if isinstance(module, QuantizedEmbedding) and decoder.config.tie_word_embeddings:
        setattr(decoder, "lm_head", TiedHead(module))  # noqa: B010 not an nn.Linear


def installed(decoder: Decoder) -> tuple[dict[str, Storage], dict[str, Storage]]:
    """The storage of every quantised matrix by its name in the checkpoint: linears (each matrix of
    each expert), and embedding tables."""
    family, config = family_of(decoder.config), decoder.config
    linears: dict[str, Storage] = {}
    tables: dict[str, Storage] = {}
    for path, module in decoder.named_modules():
        if isinstance(module, QuantizedEmbedding):
            tables[family.rename(path, config)] = module.storage
        elif isinstance(module, (QuantizedLinear, DequantizedLinear)):
            linears[family.rename(path, config)] = module.storage
        elif isinstance(module, QuantizedExperts):
            name = family.rename(path, config)
            for expert in range(len(module.down.input_scales)):
                for leaf, storage in module.storages().items():
                    linears[f"{name}.{expert}.{leaf}"] = storage
    return linears, tables
