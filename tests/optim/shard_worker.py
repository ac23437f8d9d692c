"""Optimizer steps on sharded parameters for `torchrun`: `python -m tests.optim.shard_worker OUT`.

Alone, the same steps on plain parameters. Gradients are seeded and given, so that only the
optimizer is compared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from serval.optim import Mona, Muon

CASES: dict[str, tuple[type[Muon], dict[str, Any]]] = {
    "muon": (Muon, {}),
    "mona": (Mona, {}),
    "mona-two-buffers": (Mona, {"form": "two_buffers"}),
    "mona-lite": (Mona, {"lite": True}),
}


class Matrices(nn.Module):
    """Sizes that two processes cannot share evenly, a fused projection, stacks, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {
            "wide": (13, 40),
            "tall": (40, 12),
            "same": (13, 40),
            "fused": (28, 16),
            "stack": (5, 12, 20),
            "one": (1, 9, 20),
            "vector": (17,),
        }.items():
            setattr(self, name, nn.Parameter(0.1 * torch.randn(shape)))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_gradients(parameters: Iterable[Tensor], seed: int) -> None:
    """Seeded ones, the same whole tensors for sharded parameters as for plain ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(
                grad, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.grad = grad


def run(case: str, sharded: bool, steps: int = 6) -> tuple[dict[str, Tensor], int]:
    """Weights and state after `steps`, whole; collectives per step."""
    from torch.distributed.tensor.debug import CommDebugMode

    model = Matrices()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    kind, more = CASES[case]
    named = dict(model.named_parameters())
    fused, vector = named.pop("fused"), named.pop("vector")
    groups = [
        {"params": list(named.values())},
        {"params": [fused], "split_sizes": (16, 8, 4)},
        {"params": [vector], "algorithm": "adamw"},
    ]
    optimizer = kind(groups, lr=0.05, adjust_lr_fn="match_rms_adamw", **more)
    collectives = 0
    for step in range(steps):
        set_gradients(model.parameters(), step)
        with CommDebugMode() as communication:
            optimizer.step()
        collectives = communication.get_total_counts()
    found = {name: whole(p).detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}|{key}"] = whole(value)
    return found, collectives


def save_of_all(compute: Callable[[], Any]) -> None:
    """What the processes compute together, saved by the first as the file that torchrun names."""
    dist.init_process_group("gloo")
    results = compute()
    if int(os.environ["RANK"]) == 0:
        torch.save(results, Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    save_of_all(lambda: {case: run(case, sharded=True) for case in CASES})
