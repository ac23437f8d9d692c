"""Route every parameter to its role, once, by the module that owns it.

Optimizers never guess from shapes: a 2-D tensor may be a hidden matrix, an embedding or an output
head, and the three want different treatment. The role is decided here from module identity:

- a module may declare roles itself: ``parameter_roles = {"weight": Role.ROUTER}`` on its class;
- otherwise the type of the module decides (``nn.Linear`` -> hidden matrix, ``nn.Embedding`` ->
  embedding, a norm -> norm) and the names that Hugging Face checkpoints fixed (``lm_head``,
  ``mlp.gate``, ``mlp.experts``);
- a bare parameter of one dimension is a bias; any other is an error, never a guess.

A module whose parameter holds several matrices one below the other says so with
``parameter_splits = {"gate_up_proj": (rows, rows)}``.

A parameter shared by two modules (tied embeddings) has the role of the first owner, which is the
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn

from serval.errors import ConfigError


class Role(StrEnum):
    """What a parameter is for; the keys of `optimizer.roles` in a recipe."""

    HIDDEN_MATRIX = "hidden_matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT_STACK = "expert_stack"


@dataclass(frozen=True)
class RoleOptions:
    """How one role departs from the optimizer's settings.

    lr: multiplier of the learning rate; weight_decay: None keeps the optimizer's value.
    """

    lr: float = 1.0
    weight_decay: float | None = None


# Decay shrinks what is multiplied into the residual stream; scales, offsets and router
# biases have no such direction, and decaying embeddings starves rare tokens.
DEFAULT_ROLE_OPTIONS: dict[Role, RoleOptions] = {
    Role.HIDDEN_MATRIX: RoleOptions(),
    Role.EXPERT_STACK: RoleOptions(),
    Role.HEAD: RoleOptions(),
    Role.ROUTER: RoleOptions(),
    Role.EMBEDDING: RoleOptions(weight_decay=0.0),
    Role.NORM: RoleOptions(weight_decay=0.0),
    Role.BIAS: RoleOptions(weight_decay=0.0),
    Role.ROUTER_BIAS: RoleOptions(weight_decay=0.0),
}


@dataclass
class NamedParameter:
    """One parameter with its full name in the model and its role.

    split_sizes: rows of each of the matrices it fuses; None when it is one.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    split_sizes: tuple[int, ...] | None = None


def _role_of(owner: nn.Module, owner_name: str, attribute: str, parameter: nn.Parameter) -> Role:
    declared: Mapping[str, Role] = getattr(owner, "parameter_roles", {})
    if attribute in declared:
        return Role(declared[attribute])
    path = owner_name.split(".")
    if path[-1] == "lm_head" and attribute == "weight":
        return Role.HEAD
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING
    if path[-1] in ("gate", "router") and attribute in ("weight", "bias"):
        return Role.ROUTER if attribute == "weight" else Role.ROUTER_BIAS
    if path[-1] == "experts":
        return Role.BIAS if attribute.endswith("bias") else Role.EXPERT_STACK
    if attribute == "bias":
        return Role.BIAS
    if isinstance(owner, nn.Linear):
        return Role.HIDDEN_MATRIX
    if isinstance(owner, nn.LayerNorm) or type(owner).__name__.endswith("Norm"):
        return Role.NORM
    if parameter.ndim == 1:
        return Role.BIAS
    raise ConfigError(
        f"parameter '{owner_name}.{attribute}' of {type(owner).__name__} has no known role; "
        f"declare it on the class: parameter_roles = {{'{attribute}': Role.HIDDEN_MATRIX}} "
        f"(roles: {', '.join(Role)})"
    )


def route(model: nn.Module, *, frozen: bool = False) -> list[NamedParameter]:
    """List the trainable parameters of `model` with their roles, in the model's own order;
    `frozen` lists the others too.

    Each parameter appears once, also when tied. Raises ConfigError for a parameter whose role
    cannot be told.
    """
    routed: list[NamedParameter] = []
    seen: set[int] = set()
    for owner_name, owner in model.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not (parameter.requires_grad or frozen):
                continue
            seen.add(id(parameter))
            name = f"{owner_name}.{attribute}" if owner_name else attribute
            role = _role_of(owner, owner_name, attribute, parameter)
            splits = getattr(owner, "parameter_splits", {}).get(attribute)
            sizes = None if splits is None else tuple(splits)
            routed.append(NamedParameter(name, parameter, role, sizes))
    return routed


def merge_role_options(overrides: Mapping[Role, RoleOptions]) -> dict[Role, RoleOptions]:
    """Return the defaults with `overrides` laid over them, field by field."""
    merged = dict(DEFAULT_ROLE_OPTIONS)
    for role, options in overrides.items():
        decay = options.weight_decay
        merged[role] = RoleOptions(
            lr=options.lr, weight_decay=merged[role].weight_decay if decay is None else decay
        )
    return merged
