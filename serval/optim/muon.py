"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon/; Moonlight,
arXiv:2502.16982), for matrices and stacks of matrices, and AdamW for everything else.

Drop-in for `torch.optim.Muon`: same names, same defaults, same state key. Per matrix W [m, n] with
gradient G:

    M <- mu M + (1 - mu) G
    U  = (1 - mu) G + mu M   (nesterov)   or   M
    W <- (1 - lr wd) W - lr s(m, n) NewtonSchulz(U)

s by `adjust_lr_fn`: "original" sqrt(max(1, m/n)); "match_rms_adamw" 0.2 sqrt(max(m, n)), with which
AdamW's learning rate and decay are reused; "spectral_unclamped" sqrt(m/n); "update_norm"
0.2 / RMS(O). The decay is that of the unscaled learning rate.

What torch's lacks: matrices of one shape are orthogonalised in one batch; a parameter [E, m, n] is
E matrices; `split_sizes` treats the row blocks of a fused projection as matrices of their own;
sharded parameters (DTensor) work; the iteration may run in float32. A group with
`algorithm="adamw"` is updated by AdamW. A gradient is never written to; a zero gradient is a
gradient, a missing one leaves the state alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.adamw import adamw

from serval.errors import ConfigError
from serval.kernels import momentum as kernels
from serval.optim.newton_schulz import Coefficients, Iteration, Workspace, orthogonalise

SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
}
UPDATE_NORM = "update_norm"
ADJUSTMENTS = (*SCALES, UPDATE_NORM)
RMS = 0.2  # of an update under update_norm: what AdamW's is, says Moonlight


@dataclass
class _Member:
    """One parameter on its way through a step, whole or this process's part.

    own, grad: this process's part. count: matrices in it, or when `gathered` in all of it.
    """

    parameter: Tensor
    own: Tensor
    grad: Tensor
    count: int
    gathered: bool


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and expert stacks; per group AdamW.

    Arguments as in `torch.optim.Muon`, all of them per group. Beyond them, ns_coefficients: also a
    triple per step, "polar_express" or "dion"; adjust_lr_fn: also "spectral_unclamped" and
    "update_norm"; ns_dtype: of the iteration (None: float32 on the CPU, bfloat16 elsewhere);
    split_sizes: rows of the matrices that are fused in each parameter of the group; algorithm:
    "muon" or "adamw", which reads lr, weight_decay, betas and adam_eps.

    Momentum has the gradient's dtype, as torch's has: bfloat16 for bfloat16 weights.

    Raises ConfigError for parameters that are not matrices and for values out of range, TypeError
    for a keyword it does not know.
    """

    _more: Mapping[str, Any] = MappingProxyType({})
    """Options of a subclass, which it sets before `__init__` of this class."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
        split_sizes: Sequence[int] | None = None,
        algorithm: str = "muon",
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "split_sizes": split_sizes,
            "algorithm": algorithm,
            "betas": betas,
            "adam_eps": adam_eps,
            **self._more,
        }
        self._workspace = Workspace()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked; raises ConfigError."""
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._workspace = Workspace()
        for group in self.param_groups:  # saved by an optimizer that had fewer options
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # -- checks -----------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "momentum", "weight_decay", "eps", "adam_eps"):
            if not 0.0 <= float(group[key]) < math.inf:
                raise ConfigError(f"{key} is {group[key]}; expected a finite number >= 0")
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas is {list(betas)}; expected two numbers, 0 <= beta < 1")
        if group["algorithm"] not in ("muon", "adamw"):
            raise ConfigError(f"algorithm is {group['algorithm']!r}; expected 'muon' or 'adamw'")
        if any(torch.is_complex(p) for p in group["params"]):
            raise ConfigError("Muon does not take complex parameters; give their real view")
        if group["algorithm"] == "adamw":
            return
        if group["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
            raise ConfigError(
                f"adjust_lr_fn is {group['adjust_lr_fn']!r}; expected one of "
                f"{', '.join(ADJUSTMENTS)}"
            )
        self._iteration(group, torch.device("cpu"))
        for parameter in group["params"]:
            if parameter.ndim not in (2, 3):
                raise ConfigError(
                    f"Muon takes matrices [m, n] and stacks of them [E, m, n], got a parameter of "
                    f"shape {list(parameter.shape)}; put it into a group with algorithm='adamw'"
                )
            sizes = group["split_sizes"]
            if sizes is not None and sum(sizes) != parameter.shape[-2]:
                raise ConfigError(
                    f"split_sizes {list(sizes)} add up to {sum(sizes)}, the parameter of shape "
                    f"{list(parameter.shape)} has {parameter.shape[-2]} rows"
                )

    @staticmethod
    def _iteration(group: dict[str, Any], device: torch.device) -> Iteration:
        dtype = group["ns_dtype"]
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Iteration.make(group["ns_coefficients"], group["ns_steps"], group["eps"], dtype)

    # -- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            for parameter in present:
                if parameter.grad.is_sparse:
                    raise ConfigError(
                        f"Muon does not take sparse gradients (parameter of shape "
                        f"{list(parameter.shape)}); use a dense embedding"
                    )
            if group["algorithm"] == "adamw":
                self._adamw(group, present)
            else:
                for members in self._batches(present):
                    self._muon(group, members)
        return loss

    def _batches(self, parameters: Sequence[Tensor]) -> Iterator[list[_Member]]:
        """Parameters of one shape and kind together, as many as fit a batch."""
        kinds: dict[tuple[Any, ...], list[_Member]] = {}
        for parameter in parameters:
            member = _member(parameter)
            key = (
                *parameter.shape[-2:],
                member.own.dtype,
                member.grad.dtype,
                member.own.device,
            )
            kinds.setdefault(key, []).append(member)
        for members in kinds.values():
            limit = _batch_elements(members[0].own.device)
            batch: list[_Member] = []
            held = 0
            for member in members:
                size = member.count * member.parameter.shape[-2] * member.parameter.shape[-1]
                if batch and held + size > limit:
                    yield batch
                    batch, held = [], 0
                batch.append(member)
                held += size
            yield batch

    def _muon(self, group: dict[str, Any], members: list[_Member]) -> None:
        """One batch: directions side by side, orthogonalised together, applied one by one."""
        m, n = members[0].parameter.shape[-2:]
        total = sum(member.count for member in members)
        like = members[0].grad
        directions = self._workspace.take("directions", (total, m, n), like)
        at = 0
        for member in members:
            slot = directions[at : at + member.count]
            self._direction(member, group, slot)
            at += member.count
        if total == 0:
            return
        iteration = self._iteration(group, like.device)
        sizes = group["split_sizes"] or (m,)
        row = 0
        for rows in sizes:
            part = orthogonalise(directions[:, row : row + rows], iteration, self._workspace)
            if group["adjust_lr_fn"] == UPDATE_NORM:
                rms = part.float().square().mean(dim=(1, 2), keepdim=True).sqrt()
                part = part * (RMS / rms.clamp_(min=group["eps"])).to(part.dtype)
            self._descend(group, members, part, row, len(sizes) > 1)
            row += rows

    def _direction(self, member: _Member, group: dict[str, Any], slot: Tensor) -> None:
        """Advance the state of `member` and write its direction (gathered if sharded) to `slot`."""
        state = self._state(member.parameter, group)
        grad = member.grad
        if not member.gathered:
            self._advance(grad, state, group, slot.view(grad.shape))
            return
        own = torch.empty_like(grad)
        self._advance(grad, state, group, own)
        sharded = member.parameter.grad
        assert isinstance(sharded, DTensor)
        whole = DTensor.from_local(
            own,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        ).full_tensor()
        slot.copy_(whole.view(slot.shape))

    def _descend(
        self,
        group: dict[str, Any],
        members: list[_Member],
        part: Tensor,
        row: int,
        split: bool,
    ) -> None:
        """Subtract `part` [total, rows, n] from rows `row` and on of every member."""
        rows, n = part.shape[1:]
        lr = float(group["lr"])
        adjust = group["adjust_lr_fn"] or "original"
        scale = lr if adjust == UPDATE_NORM else lr * SCALES[adjust](rows, n)
        decay = 1.0 - lr * group["weight_decay"]
        at = 0
        for member in members:
            update = part[at : at + member.count]
            at += member.count
            shape = (*member.parameter.shape[:-2], rows, n)
            own = member.own
            if member.gathered:
                self._descend_sharded(member, update.reshape(shape), row, decay, scale)
                continue
            if split:
                own = own[..., row : row + rows, :]
            kernels.descend(own, update.reshape(own.shape), decay=decay, scale=scale)

    @staticmethod
    def _descend_sharded(
        member: _Member, update: Tensor, row: int, decay: float, scale: float
    ) -> None:
        """Every rank has the whole update, so slicing it needs no communication."""
        parameter = member.parameter
        assert isinstance(parameter, DTensor)
        rows, whole_rows = update.shape[-2], parameter.shape[-2]
        if rows != whole_rows:
            # rows of the other parts must neither decay nor move
            padded = update.new_zeros(parameter.shape)
            padded[..., row : row + rows, :] = update
            mask = torch.full_like(padded, 1.0)
            mask[..., row : row + rows, :] = decay
            member.own.mul_(_own_part(mask, parameter).to(member.own.dtype))
            update, decay = padded, 1.0
        kernels.descend(member.own, _own_part(update, parameter), decay=decay, scale=scale)

    # -- state ------------------------------------------------------------------------------

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The parameter's state; created at its first step."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            assert parameter.grad is not None
            state["momentum_buffer"] = torch.zeros_like(
                parameter.grad, memory_format=torch.preserve_format
            )
        return state

    def _advance(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], out: Tensor
    ) -> None:
        """Update the state from `grad` (this process's part) and write the direction to `out`."""
        kernels.momentum_update(
            grad,
            local(state["momentum_buffer"]),
            out,
            mu=group["momentum"],
            nesterov=group["nesterov"],
        )

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                device = parameter.device if parameter.device.type == "cuda" else None
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["adam_eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that every state tensor keeps the dtype it was saved in (torch casts
        them to their parameter's)."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    now = self.state[parameter].get(key)
                    if isinstance(now, Tensor) and now.dtype != value.dtype:
                        self.state[parameter][key] = value.to(now.device, copy=True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _member(parameter: Tensor) -> _Member:
    """A stack that is sharded over its matrices needs no gathering: every process has whole ones,
    perhaps none."""
    assert parameter.grad is not None
    own, grad = local(parameter.detach()), local(parameter.grad)
    gathered = False
    if isinstance(parameter, DTensor):
        whole = parameter.ndim == 3 and all(
            place.is_replicate() or place == Shard(0) for place in parameter.placements
        )
        gathered = not whole and any(not place.is_replicate() for place in parameter.placements)
    shape = parameter.shape if gathered else own.shape
    return _Member(parameter, own, grad, shape[0] if parameter.ndim == 3 else 1, gathered)


def _own_part(whole: Tensor, parameter: DTensor) -> Tensor:
    return distribute_tensor(
        whole.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    ).to_local()


def _batch_elements(device: torch.device) -> int:
    """Numbers per batch: enough to feed all cores, little enough to stay near the caches."""
    if device.type != "cpu":
        return 1 << 26
    return min(1 << 24, torch.get_num_threads() << 21)
