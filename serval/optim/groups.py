"""Route every parameter to its role, once, by the module that owns it.

Optimizers never guess from shapes: a 2-D tensor may be a hidden matrix, an embedding or an output
head, and the three want different treatment. The role is decided here from module identity:

- a module may declare roles itself: ``parameter_roles = {"weight": Role.ROUTER}`` on its class;
- a weight that any ``nn.Embedding`` of the model holds is an embedding, also when it is tied and
  another owner comes first;
- the module that `get_output_embeddings` returns (transformers) is the head;
- otherwise the type of the module decides (``nn.Linear`` -> hidden matrix, a norm -> norm) and the
  names that Hugging Face checkpoints and PEFT fixed (``lm_head``, ``embed_out``, ``mlp.gate``,
  ``mlp.experts``, ``lora_A``);
- an ``nn.Linear`` with a row per word of the vocabulary, in a model that does not tell its head, is
  an error: it may be the head;
- a bare parameter of one dimension is a bias; any other is an error, never a guess.

A module whose parameter holds several matrices one below the other says so with
``parameter_splits = {"gate_up_proj": (rows, rows)}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
    LOW_RANK_FACTOR = "low_rank_factor"


@dataclass(frozen=True)
class RoleOptions:
    """How one role departs from the optimizer's settings.

    lr: multiplier of the learning rate; weight_decay: None keeps the optimizer's value. Both at
    least 0 and finite, or ConfigError.
    """

    lr: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for key, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None and not 0.0 <= value < math.inf:
                raise ConfigError(f"{key} of a role is {value}; expected a finite number >= 0")


# Decay shrinks what is multiplied into the residual stream; scales, offsets and router
# biases have no such direction, and decaying embeddings starves rare tokens.
DEFAULT_ROLE_OPTIONS: dict[Role, RoleOptions] = {
    Role.HIDDEN_MATRIX: RoleOptions(),
    Role.EXPERT_STACK: RoleOptions(),
    Role.LOW_RANK_FACTOR: RoleOptions(),
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


HEADS = ("lm_head", "embed_out", "score", "classifier")  # GPT-NeoX; sequence classification
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
NO_HEAD = object()


class _Vocabulary:
    """What a model tells of its embeddings and its head.

    embeddings, heads: ids of their weights. rows: of the largest embedding, 0 without one. told:
    whether it is known which parameter makes the logits.
    """

    def __init__(self, model: nn.Module) -> None:
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        self.embeddings = {id(weight) for weight in tables}
        self.rows = max((len(weight) for weight in tables if weight.ndim == 2), default=0)
        self.heads = {
            id(weight)
            for head in _heads(model)
            if isinstance(weight := getattr(head, "weight", None), nn.Parameter)
        }
        tied = any(
            id(module.weight) in self.embeddings
            for module in model.modules()
            if isinstance(module, nn.Linear)
        )
        # `lm_head = None`: the embedding makes the logits
        empty = any(getattr(m, "lm_head", NO_HEAD) is None for m in model.modules())
        self.told = bool(self.heads) or tied or empty


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if name.split(".")[-1] in HEADS:
            yield module
        ask = getattr(module, "get_output_embeddings", None)
        try:
            found = ask() if callable(ask) else None
        except NotImplementedError:
            continue
        if isinstance(found, nn.Module):
            yield found


def _role_of(
    owner: nn.Module,
    owner_name: str,
    attribute: str,
    parameter: nn.Parameter,
    vocabulary: _Vocabulary,
) -> Role:
    declared: Mapping[str, Role] = getattr(owner, "parameter_roles", {})
    if attribute in declared:
        return Role(declared[attribute])
    path = owner_name.split(".")
    if id(parameter) in vocabulary.embeddings:
        return Role.EMBEDDING
    if any(name in FACTORS for name in (*path[-2:], attribute)):
        return Role.LOW_RANK_FACTOR
    if id(parameter) in vocabulary.heads:
        return Role.HEAD
    if path[-1] in ("gate", "router") and attribute in ("weight", "bias"):
        return Role.ROUTER if attribute == "weight" else Role.ROUTER_BIAS
    if path[-1] == "experts":
        return Role.BIAS if attribute.endswith("bias") else Role.EXPERT_STACK
    if attribute == "bias":
        return Role.BIAS
    if isinstance(owner, nn.Linear):
        if parameter.shape[0] == vocabulary.rows and not vocabulary.told:
            raise ConfigError(
                f"'{owner_name}.{attribute}' has {vocabulary.rows} rows, as many as the embedding: "
                "it may be the output head, which is no hidden matrix. Say what it is on the "
                f"module: parameter_roles = {{'{attribute}': Role.HEAD}} or Role.HIDDEN_MATRIX"
            )
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
    vocabulary = _Vocabulary(model)
    seen: set[int] = set()
    for owner_name, owner in model.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not (parameter.requires_grad or frozen):
                continue
            seen.add(id(parameter))
            name = f"{owner_name}.{attribute}" if owner_name else attribute
            role = _role_of(owner, owner_name, attribute, parameter, vocabulary)
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
