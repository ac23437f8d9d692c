"""Rotating the values of attention heads by a Hadamard matrix, inside the weights (QuaRot, arXiv
2404.00456; OScaR, arXiv 2605.19660).

    W_v <- H W_v per key-value head (and the bias), W_o <- W_o H per query head, H = H^T = H^-1

The module computes the same function as before, up to rounding; the values that it hands to its
memory, and the outputs that it takes back, are rotated. Attention averages values per head, so the
memory need not know. Doing it twice undoes it.

A module says in `values_rotated` which it is; a memory that wants the other basis rotates at run
time. Whoever adds something to the output of v_proj or the input of o_proj in the original basis
(adapters) calls `restore_values` first. Whoever holds values of a module, or shares its weights,
says so with `keep_basis`: as long as that lives, the module is not turned.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from serval import kernels
from serval.errors import ConfigError
from serval.models.attention import GroupedQueryAttention

_HOLDERS: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


def can_rotate(module: nn.Module) -> bool:
    """Whether nothing but attention stands between v_proj and o_proj, and both are plain float
    matrices, whose weights can take a rotation."""
    if not isinstance(module, GroupedQueryAttention):
        return False
    between = ("value_gate", "value_bias", "gate", "weight_function")  # of `AttentionVariants`
    return all(getattr(module, name, None) is None for name in between) and all(
        isinstance(linear, nn.Linear)
        and not hasattr(linear, "checkpoint_tensors")  # stored otherwise than it computes
        and linear.weight.is_floating_point()
        and not linear.weight.is_meta
        and not linear._forward_hooks
        for linear in (module.v_proj, module.o_proj)
    )


def keep_basis(model: nn.Module, holder: Any) -> None:
    """While `holder` lives, the values of `model`'s attention stay in their present basis."""
    for module in model.modules():
        if isinstance(module, GroupedQueryAttention):
            _HOLDERS.setdefault(module, WeakSet()).add(holder)


def _is_held(module: nn.Module) -> bool:
    return bool(_HOLDERS.get(module))


def rotate_values(module: nn.Module) -> bool:
    """Make the module's values rotated, if its weights allow it and nobody holds values in the
    original basis; returns whether they are."""
    if not isinstance(module, GroupedQueryAttention):
        return False
    if not module.values_rotated and can_rotate(module) and not _is_held(module):
        _turn(module)
    return module.values_rotated


def restore_values(model: nn.Module) -> None:
    """Bring every attention module of `model` back to its original basis. Raises `ConfigError`,
    having changed nothing, when a cache holds values of a rotated one."""
    rotated = [
        module
        for module in model.modules()
        if isinstance(module, GroupedQueryAttention) and module.values_rotated
    ]
    if any(_is_held(module) for module in rotated):
        raise ConfigError(
            "this model's weights were rotated for a cache that is still in use; close what uses "
            "it, or load the model again"
        )
    for module in rotated:
        _turn(module)


@torch.no_grad()
def _turn(module: GroupedQueryAttention) -> None:
    dim = module.head_dim
    v, o = module.v_proj, module.o_proj
    v.weight.copy_(_rotated(v.weight.T, dim).T)
    if v.bias is not None:
        v.bias.copy_(_rotated(v.bias, dim))
    o.weight.copy_(_rotated(o.weight, dim))
    module.values_rotated = not module.values_rotated


def _rotated(x: Tensor, dim: int) -> Tensor:
    """Each run of `dim` numbers of x [..., n dim] times H, in float64."""
    return kernels.hadamard(x.double().unflatten(-1, (-1, dim))).flatten(-2)
