"""MONA: Muon Optimizer with Nesterov Acceleration (arXiv:2605.26842).

An exponential average of gradient differences, which sees curvature, is added to the gradient
before Muon's momentum; what is orthogonalised carries it, and the step keeps Muon's norm:

    A_t = beta A_{t-1} + (1 - beta) (G_t - G_{t-1}),   A_0 = G_0 = 0
    G~_t = G_t + alpha A_t,   alpha = -1 / (2 (1 - beta))

then Muon with G~ in place of G. alpha is negative: the part of the gradient that alternates from
step to step passes at beta / (1 + beta), a constant one in full. A positive alpha looks ahead
instead, which helps short runs with small batches; |alpha| must stay below 1 / (1 - beta).

One buffer instead of two (form="one_buffer", the default), exact because
A_t = (1 - beta) (G_t - m_{t-1}) for the average m_t = beta m_{t-1} + (1 - beta) G_t:

    G~_t = G_t + alpha (1 - beta) (G_t - m_{t-1})        with the default alpha (G_t + m_{t-1}) / 2

`lite` (MONA-Lite) keeps m in bfloat16, rounded stochastically: with beta near one an increment is
smaller than half a bfloat16 step and rounding to nearest would lose it. All other state is at least
float32, and so is the arithmetic, also for bfloat16 gradients (in which the same increments would
be lost). State per matrix element: Muon 4 bytes, MONA 8 (two buffers 12), Lite 6.

Where the paper's text was not available: beta defaults to 0.975 (0.975 and 0.99 are reported),
nesterov stays on as in Muon, so that alpha = 0 is Muon; MONA-Lite is read as one bfloat16 buffer,
which is the reported saving. `bias_correction` (m / (1 - beta^t)) is an extension, off by default.
MONA is elementwise and comes before the gathering of sharded parameters: no extra communication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from serval.errors import ConfigError
from serval.kernels import momentum as kernels
from serval.optim.muon import Muon, local

FORMS = ("one_buffer", "two_buffers")


class Mona(Muon):
    """MONA for hidden matrices and expert stacks; per group AdamW.

    All of `Muon`'s arguments, and per group: alpha (None: -1 / (2 (1 - beta))); beta, of the
    average, whose horizon is 1 / (1 - beta) optimizer steps; form: "one_buffer" or "two_buffers"
    (the literal one, for reference); lite: the one buffer in bfloat16; bias_correction; seed of the
    stochastic rounding. Clip gradients before the step, never after. Raises ConfigError, and
    TypeError for a keyword that neither class knows.
    """

    def __init__(
        self,
        params: Any,
        *args: Any,
        alpha: float | None = None,
        beta: float = 0.975,
        form: str = "one_buffer",
        lite: bool = False,
        bias_correction: bool = False,
        seed: int = 0,
        **keywords: Any,
    ) -> None:
        self._more = {
            "alpha": alpha,
            "beta": beta,
            "form": form,
            "lite": lite,
            "bias_correction": bias_correction,
            "seed": seed,
        }
        super().__init__(params, *args, **keywords)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        beta = group["beta"]
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"mona beta is {beta}; expected 0 <= beta < 1")
        bound = 1.0 / (1.0 - beta)
        if group["alpha"] is not None and not abs(group["alpha"]) < bound:
            raise ConfigError(
                f"mona alpha is {group['alpha']}; expected |alpha| < 1 / (1 - beta) = {bound:.4g}, "
                "beyond which an oscillating gradient changes its sign; "
                f"the paper's value is {-bound / 2:.4g}"
            )
        if group["form"] not in FORMS:
            raise ConfigError(f"mona form is {group['form']!r}; expected one of {', '.join(FORMS)}")
        if group["form"] == "two_buffers" and (group["lite"] or group["bias_correction"]):
            raise ConfigError("lite and bias_correction belong to the form 'one_buffer'")

    def _state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        grad = parameter.grad
        assert grad is not None
        wide = _wide(grad.dtype)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad, dtype=wide)
        if group["form"] == "two_buffers":
            if "acceleration" not in state:
                state["acceleration"] = torch.zeros_like(grad, dtype=wide)
                state["previous_gradient"] = torch.zeros_like(grad, dtype=wide)
        elif "gradient_average" not in state:
            dtype = torch.bfloat16 if group["lite"] else wide
            state["gradient_average"] = torch.zeros_like(grad, dtype=dtype)
            if group["lite"] or group["bias_correction"]:
                state["step"] = torch.zeros((), dtype=torch.float32)
        return state

    def _advance(
        self, grad: Tensor, state: dict[str, Any], group: dict[str, Any], out: Tensor
    ) -> None:
        wide = _wide(grad.dtype)
        if grad.dtype != wide:
            direction = torch.empty_like(grad, dtype=wide)
            self._advance(grad.to(wide), state, group, direction)
            out.copy_(direction)
            return
        beta, momentum = group["beta"], local(state["momentum_buffer"])
        alpha = -0.5 / (1.0 - beta) if group["alpha"] is None else group["alpha"]
        settings = {"mu": group["momentum"], "nesterov": group["nesterov"]}
        if group["form"] == "two_buffers":
            acceleration = local(state["acceleration"])
            previous = local(state["previous_gradient"])
            acceleration.lerp_(grad - previous, 1.0 - beta)
            previous.copy_(grad)  # the raw gradient: G~ here would be another recursion
            kernels.momentum_update(grad + alpha * acceleration, momentum, out, **settings)
            return
        step = 0
        if "step" in state:
            step = int(state["step"])
            state["step"] += 1.0
        correction = 1.0
        weight = alpha * (1.0 - beta)
        if group["bias_correction"]:
            if step == 0:
                weight = 0.0  # there is no average yet
            else:
                correction = 1.0 / (1.0 - beta**step)
        average = state["gradient_average"]
        kernels.momentum_update(
            grad,
            momentum,
            out,
            mean=local(average),
            beta=beta,
            weight=weight,
            correction=correction,
            seed=_noise_seed(group["seed"], step, average),
            **settings,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def _noise_seed(seed: int, step: int, average: Tensor) -> int:
    """31 bits that differ from step to step and from shard to shard, and are the same wherever a
    shard is replicated: replicas that rounded differently would drift apart."""
    shard = 0
    if isinstance(average, DTensor):
        mesh = average.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is not None:
            places = zip(average.placements, mesh.shape, coordinate, strict=True)
            for placement, size, index in places:
                if not placement.is_replicate():
                    shard = shard * size + index
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + shard * 0xC2B2AE3D) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) & 0x7FFFFFFF
