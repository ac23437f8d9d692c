"""Build the optimizer of a run: one object, whatever mixture of algorithms it drives.

`MixedOptimizer` steps several torch optimizers together and saves their state as one flat
``{parameter name + key: tensor}`` dictionary, which is what checkpoints store: readable,
independent of parameter order, and the same for plain and sharded parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from serval.optim.groups import NamedParameter, Role, RoleOptions, merge_role_options, route
from serval.optim.mona import Mona
from serval.optim.muon import Muon
from serval.registry import Entry, resolve


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings shared by all optimizers; each reads the fields it knows.

    lr: AdamW's learning rate. betas, eps: AdamW's. weight_decay: decoupled, of every decayed role.
    muon_lr: Muon's learning rate; None uses `lr`, which suits `muon_adjust: match_rms_adamw`.
    momentum, nesterov, ns_steps, ns_coefficients, muon_adjust (its `adjust_lr_fn`): Muon's.
    ns_dtype: "auto", "float32" or "bfloat16". mona_alpha (None: -1 / (2 (1 - beta))), mona_beta:
    MONA's. roles: lr multiplier and weight decay per role.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_coefficients: str = "original"
    ns_dtype: str = "auto"
    muon_adjust: str = "match_rms_adamw"
    mona_alpha: float | None = None
    mona_beta: float = 0.975
    roles: Mapping[Role, RoleOptions] = field(default_factory=dict)


def _param_groups(
    parameters: Iterable[NamedParameter], lr: float, options: OptimizerOptions
) -> list[dict[str, Any]]:
    """One torch parameter group per role and split, with that role's learning rate and decay."""
    kinds: dict[tuple[Role, tuple[int, ...] | None], list[NamedParameter]] = {}
    for named in parameters:
        kinds.setdefault((named.role, named.split_sizes), []).append(named)
    groups = []
    role_options = merge_role_options(options.roles)
    for (role, _), members in kinds.items():
        chosen = role_options[role]
        decay = options.weight_decay if chosen.weight_decay is None else chosen.weight_decay
        groups.append(
            {
                "params": [named.parameter for named in members],
                "names": [named.name for named in members],
                "role": str(role),
                "split_sizes": members[0].split_sizes,
                "lr": lr * chosen.lr,
                "base_lr": lr * chosen.lr,
                "weight_decay": decay,
            }
        )
    return groups


class MixedOptimizer:
    """Several torch optimizers behind one `step`, one learning-rate multiplier, one state."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, each with `role`, `names`, `lr` and `base_lr`."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def set_multiplier(self, multiplier: float) -> None:
        """Set every group's learning rate to `multiplier` times its base."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * multiplier

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return ``{"<parameter name>|<key>": tensor}`` for every state tensor that exists."""
        tensors: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    for key, value in optimizer.state.get(parameter, {}).items():
                        tensors[f"{name}|{key}"] = value
        return tensors

    def materialise_state(self) -> None:
        """Create the state tensors that the first step would create, without moving a weight.

        A resumed run needs them in place before they can be filled.
        """
        saved = [parameter.grad for parameter in self.parameters()]
        rates = [group["lr"] for group in self.param_groups]
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.param_groups:
            group["lr"] = 0.0  # decoupled decay is multiplied by lr too
        self.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter, grad in zip(self.parameters(), saved, strict=True):
            parameter.grad = grad

    def forget_state(self, keep: set[str]) -> None:
        """Drop the state of parameters that have none in `keep` (names as in `state_tensors`)."""
        named = {key.split("|")[0] for key in keep}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    if name not in named:
                        optimizer.state.pop(parameter, None)


def _adamw(parameters: list[NamedParameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    device = parameters[0].parameter.device.type if parameters else "cpu"
    return torch.optim.AdamW(
        _param_groups(parameters, options.lr, options),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=device in ("cpu", "cuda"),
    )


def build_adamw(
    model: nn.Module, options: OptimizerOptions, note: Callable[[str], None] = print
) -> MixedOptimizer:
    """AdamW (arXiv:1711.05101) for every parameter."""
    return MixedOptimizer([_adamw(route(model), options)])


ORTHOGONALISED = (Role.HIDDEN_MATRIX, Role.EXPERT_STACK)


def _muon(
    kind: type[Muon],
    model: nn.Module,
    options: OptimizerOptions,
    note: Callable[[str], None],
    **more: Any,
) -> MixedOptimizer:
    """`kind` for hidden matrices and expert stacks, its AdamW for the rest: one object."""
    lr = options.lr if options.muon_lr is None else options.muon_lr
    groups = []
    routed = route(model)
    if routed and not any(named.role in ORTHOGONALISED for named in routed):
        roles = ", ".join(sorted({str(named.role) for named in routed}))
        note(
            f"{kind.__name__} has nothing to orthogonalise here: no hidden matrix or expert stack "
            f"is trained, only {roles}, which AdamW updates; its own options have no effect"
        )
    for named in _param_groups(routed, 1.0, options):
        muon = Role(named["role"]) in ORTHOGONALISED
        rate = named["lr"] * (lr if muon else options.lr)
        algorithm = "muon" if muon else "adamw"
        groups.append({**named, "lr": rate, "base_lr": rate, "algorithm": algorithm})
    optimizer = kind(
        groups,
        lr=lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        nesterov=options.nesterov,
        ns_coefficients=options.ns_coefficients,
        ns_steps=options.ns_steps,
        ns_dtype=None if options.ns_dtype == "auto" else getattr(torch, options.ns_dtype),
        adjust_lr_fn=options.muon_adjust,
        betas=options.betas,
        adam_eps=options.eps,
        **more,
    )
    return MixedOptimizer([optimizer])


def build_muon(
    model: nn.Module, options: OptimizerOptions, note: Callable[[str], None] = print
) -> MixedOptimizer:
    """Muon for hidden matrices and expert stacks, AdamW for the rest; see `serval.optim.muon`."""
    return _muon(Muon, model, options, note)


def build_mona(
    model: nn.Module, options: OptimizerOptions, note: Callable[[str], None] = print
) -> MixedOptimizer:
    """MONA for hidden matrices and expert stacks, AdamW for the rest; see `serval.optim.mona`."""
    return _muon(Mona, model, options, note, alpha=options.mona_alpha, beta=options.mona_beta)


def build_mona_lite(
    model: nn.Module, options: OptimizerOptions, note: Callable[[str], None] = print
) -> MixedOptimizer:
    """`build_mona` with its buffer in bfloat16."""
    more = {"alpha": options.mona_alpha, "beta": options.mona_beta}
    return _muon(Mona, model, options, note, **more, lite=True)


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry("serval.optim.builder:build_adamw", "AdamW everywhere", "1711.05101"),
    "muon": Entry(
        "serval.optim.builder:build_muon",
        "Muon on hidden matrices and expert stacks, AdamW on the rest",
        "2502.16982",
    ),
    "mona": Entry(
        "serval.optim.builder:build_mona",
        "Muon on gradients with an averaged difference added, one buffer more",
        "2605.26842",
    ),
    "mona-lite": Entry(
        "serval.optim.builder:build_mona_lite",
        "MONA with that buffer in bfloat16, rounded stochastically",
        "2605.26842",
    ),
}

_ADAMW_READS = frozenset({"lr", "betas", "eps", "weight_decay", "roles"})
_MUON_READS = _ADAMW_READS | {
    *("muon_lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_dtype", "muon_adjust"),
}
_MONA_READS = _MUON_READS | {"mona_alpha", "mona_beta"}

# fields of `OptimizerOptions` that each optimizer reads
READS: dict[str, frozenset[str]] = {
    "adamw": _ADAMW_READS,
    "muon": _MUON_READS,
    "mona": _MONA_READS,
    "mona-lite": _MONA_READS,
}


def build(
    name: str,
    model: nn.Module,
    options: OptimizerOptions,
    note: Callable[[str], None] = print,
) -> MixedOptimizer:
    """Build the optimizer registered as `name` for `model`; raises ConfigError if unknown."""
    builder = resolve(OPTIMIZERS, name, "optimizer")
    return builder(model, options, note)
