"""Which modules of a decoder hold weights that may be compressed, and their checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from serval.models.checkpoint.quantized import CheckpointModule
from serval.models.checkpoint.registry import family_of
from serval.models.decoder import Decoder
from serval.models.moe import Experts, Router

Kind = Literal["linear", "head", "embedding", "experts", "router", "latent"]

WHY_KEPT: dict[Kind, str] = {
    "head": "output head (choose it with head=True)",
    "embedding": "embedding table (choose it with --embedding 8)",
    "experts": "this checkpoint family has no per-expert tensors",
    "router": "router: decides in float32",
    "latent": "the cache multiplies by it in float (MLA up-projection)",
}


@dataclass(frozen=True)
class Target:
    """A module with a weight matrix.

    path: its name in the decoder; name: its name in the checkpoint. kind: "linear"; "head" (the
    untied output head); "embedding"; "experts" (a stack); "router"; "latent" (MLA's kv_b_proj,
    whose weight the memory reads).
    """

    path: str
    name: str
    kind: Kind
    module: nn.Module

    def checkpoint_modules(self) -> list[str]:
        """Names of the linears this module stands for in the checkpoint."""
        if not isinstance(self.module, Experts):
            return [self.name]
        count = self.module.gate_up_proj.shape[0]
        leaves = ("gate_proj", "up_proj", "down_proj")
        return [f"{self.name}.{e}.{leaf}" for e in range(count) for leaf in leaves]


def targets(decoder: Decoder) -> Iterator[Target]:
    """Every module with a weight matrix, in the order of the decoder's modules."""
    family, config = family_of(decoder.config), decoder.config
    for path, module in list(decoder.named_modules()):
        kind = _kind(path, module)
        if kind is not None:
            yield Target(path, family.rename(path, config), kind, module)


def _kind(path: str, module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, Router):
        return "router"
    if isinstance(module, Experts):
        return "experts"
    if not isinstance(module, nn.Linear):
        return None
    if path == "lm_head":
        return "head"
    return "latent" if path.endswith("kv_b_proj") else "linear"


def stores_experts_apart(decoder: Decoder) -> bool:
    """Whether the decoder's checkpoint family stores `experts.0.gate_proj.weight`, and so on."""
    config = decoder.config
    if config.moe is None or config.moe.expert_bias:
        return False
    path = next((p for p, m in decoder.named_modules() if isinstance(m, Experts)), None)
    if path is None:
        return False
    stack = torch.empty(1, 2, 1, device="meta")
    pieces = family_of(config).pieces(f"{path}.gate_up_proj", stack, config)
    return [piece.name.rsplit(".", 3)[1:] for piece in pieces] == [
        ["0", "gate_proj", "weight"],
        ["0", "up_proj", "weight"],
    ]


def replace(decoder: Decoder, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the decoder's module `path`."""
    owner, _, leaf = path.rpartition(".")
    module.train(decoder.training)
    setattr(decoder.get_submodule(owner), leaf, module)


def forget(module: nn.Module) -> None:
    """Give back the storage of a module's float parameters; their shapes stay."""
    for owner in module.modules():
        if not isinstance(owner, CheckpointModule):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                empty = torch.empty_like(parameter, device="meta")
                setattr(owner, name, nn.Parameter(empty, requires_grad=False))
