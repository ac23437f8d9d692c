"""Keep an optimizer's state right when weights are multiplied in place.

If w' = c w computes the same function, its gradient is g' = g / c exactly. State in units of the
gradient is divided by c, second moments by c^2: the next step is then the one an optimizer that had
always seen w' would take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from serval.errors import ConfigError

# state key -> power of the gradient it is made of
DEGREES = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "gradient_average": 1,  # MONA, one buffer
    "acceleration": 1,  # MONA, two buffers
    "previous_gradient": 1,
    "sum": 2,  # Adagrad
}


class HoldsOptimizers(Protocol):
    """What drives several torch optimizers, as `serval.optim.MixedOptimizer` does."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...


AnyOptimizer = torch.optim.Optimizer | HoldsOptimizers


def _states(optimizer: AnyOptimizer, parameter: Tensor) -> Iterable[dict[str, Any]]:
    single = isinstance(optimizer, torch.optim.Optimizer)
    optimizers: Sequence[Any] = [optimizer] if single else optimizer.optimizers  # type: ignore[union-attr]
    for each in optimizers:
        if parameter in each.state:
            yield each.state[parameter]


def check_state(optimizer: AnyOptimizer, parameters: Iterable[Tensor]) -> None:
    """Raise ConfigError for state whose behaviour is not known: anything but single numbers that is
    not one of `DEGREES` in its parameter's shape (Adafactor's rows and columns, 8-bit blocks)."""
    for parameter in parameters:
        for state in _states(optimizer, parameter):
            for key, value in state.items():
                if _is_number(value) or (key in DEGREES and _like(value, parameter)):
                    continue
                raise ConfigError(
                    f"optimizer state {key!r} cannot be rescaled with its weight; known are "
                    f"{', '.join(DEGREES)}, in the weight's shape. Rescale before training only, "
                    "or leave the state alone with covariant=False"
                )


def _is_number(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else not isinstance(value, Collection)


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


@torch.no_grad()
def rescale_state(optimizer: AnyOptimizer, parameter: Tensor, factor: Tensor) -> None:
    """Make the state fit after `parameter` was multiplied by `factor` (broadcastable, float64)."""
    for state in _states(optimizer, parameter):
        for key, degree in DEGREES.items():
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                multiply_(value, factor**-degree)


@torch.no_grad()
def multiply_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor in place. factor: float64, as many dimensions as `tensor`, each of its size
    or 1. Every process of a sharded tensor multiplies its own part, without communication."""
    # as fine as the tensor: a factor rounded to bfloat16 would not cancel its reciprocal
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    factor = factor.to(tensor.device, wide)
    if not isinstance(tensor, DTensor):
        tensor.mul_(factor)
        return
    places = [
        Replicate() if isinstance(place, Shard) and factor.shape[place.dim] == 1 else place
        for place in tensor.placements
    ]
    part = distribute_tensor(factor, tensor.device_mesh, places, src_data_rank=None)
    tensor.to_local().mul_(part.to_local())
