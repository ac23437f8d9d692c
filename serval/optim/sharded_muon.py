"""`torch.optim.Muon` that is also right for sharded (DTensor) parameters.

Orthogonalisation needs the whole matrix. For a sharded parameter the momentum stays sharded; the
update is gathered, orthogonalised on every rank alike, and each rank applies its own slice. A
plain tensor takes torch's own path untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """Muon for plain and FSDP2-sharded hidden matrices; arguments as `torch.optim.Muon`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step: sharded parameters here, plain ones in torch's implementation."""
        hidden: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    self._step_sharded(parameter, group)
                    hidden.append((parameter, parameter.grad))
                    parameter.grad = None  # torch's step skips parameters without a gradient
        result = super().step(closure)
        for parameter, grad in hidden:
            parameter.grad = grad
        return result

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert isinstance(grad, DTensor)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum: DTensor = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update: Any = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = _zeropower_via_newtonschulz(
            update.full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        # every rank computed the same matrix, so slicing it needs no communication
        sliced = distribute_tensor(
            whole.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        lr = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(sliced, alpha=-lr)
