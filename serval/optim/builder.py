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
from serval.registry import Entry, resolve


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings shared by all optimizers; each reads the fields it knows.

    lr: AdamW's learning rate. betas, eps: AdamW's. weight_decay: decoupled, of every decayed role.
    muon_lr: Muon's learning rate; None uses `lr`, which suits `muon_adjust: match_rms_adamw`.
    momentum, nesterov, ns_steps: Muon's. roles: lr multiplier and weight decay per role.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    muon_adjust: str = "match_rms_adamw"
    roles: Mapping[Role, RoleOptions] = field(default_factory=dict)


def _param_groups(
    parameters: Iterable[NamedParameter], lr: float, options: OptimizerOptions
) -> list[dict[str, Any]]:
    """One torch parameter group per role, with that role's learning rate and decay."""
    by_role: dict[Role, list[NamedParameter]] = {}
    for named in parameters:
        by_role.setdefault(named.role, []).append(named)
    groups = []
    role_options = merge_role_options(options.roles)
    for role, members in by_role.items():
        chosen = role_options[role]
        decay = options.weight_decay if chosen.weight_decay is None else chosen.weight_decay
        groups.append(
            {
                "params": [named.parameter for named in members],
                "names": [named.name for named in members],
                "role": str(role),
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


def build_muon(
    model: nn.Module, options: OptimizerOptions, note: Callable[[str], None] = print
) -> MixedOptimizer:
    """Muon (https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for the rest.

    `torch.optim.Muon` takes 2-D parameters only, so stacks of experts stay with AdamW; `note` is
    told so.
    """
    from serval.optim.sharded_muon import ShardedMuon

    routed = route(model)
    hidden = [named for named in routed if named.role is Role.HIDDEN_MATRIX]
    rest = [named for named in routed if named.role is not Role.HIDDEN_MATRIX]
    stacks = [named.name for named in rest if named.role is Role.EXPERT_STACK]
    if stacks:
        note(
            f"muon: {len(stacks)} expert stacks ({stacks[0]}, ...) are 3-D, which torch.optim.Muon "
            "does not accept; AdamW updates them"
        )
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        lr = options.lr if options.muon_lr is None else options.muon_lr
        optimizers.append(
            ShardedMuon(
                _param_groups(hidden, lr, options),
                lr=lr,
                weight_decay=options.weight_decay,
                momentum=options.momentum,
                nesterov=options.nesterov,
                ns_steps=options.ns_steps,
                adjust_lr_fn=options.muon_adjust,
            )
        )
    if rest:
        optimizers.append(_adamw(rest, options))
    return MixedOptimizer(optimizers)


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry("serval.optim.builder:build_adamw", "AdamW everywhere", "1711.05101"),
    "muon": Entry(
        "serval.optim.builder:build_muon",
        "Muon on hidden matrices, AdamW on the rest",
        "2502.16982",
    ),
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
