"""Optimizer steps on every placement for `torchrun` with four processes:
`python -m tests.optim.placement_worker OUT`.

Replicas, HSDP, tensor parallelism and FSDP over it, each against the same steps on plain
parameters. Gradients are seeded and given.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from tests.optim.shard_worker import CASES, save_of_all, set_gradients, whole

# mesh [2, 2]; what a tensor of d dimensions cannot have is replicated
PLACEMENTS: dict[str, tuple[Placement, Placement]] = {
    "replicas": (Replicate(), Replicate()),
    "hsdp": (Replicate(), Shard(0)),
    "columns": (Replicate(), Shard(1)),
    "fsdp over columns": (Shard(0), Shard(1)),
    "last of a stack": (Replicate(), Shard(2)),
}
SHAPES = {
    "wide": (13, 40),
    "tall": (40, 11),
    "fused": (28, 16),
    "stack": (5, 12, 21),
    "vector": (17,),
}
STRIDED = "fsdp over rows"  # with torch's own parallelize_module and fully_shard


def split(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    possible = [
        place if not isinstance(place, Shard) or place.dim < tensor.ndim else Replicate()
        for place in placements
    ]
    return distribute_tensor(tensor, mesh, possible, src_data_rank=None)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def drive(case: str, named: dict[str, nn.Parameter], steps: int = 6) -> dict[str, Tensor]:
    """Weights and state after `steps`; sharded ones as they are."""
    kind, more = CASES[case]
    matrices = [p for name, p in named.items() if name not in ("fused", "vector")]
    groups = [{"params": matrices}]
    if "fused" in named:
        groups.append({"params": [named["fused"]], "split_sizes": (16, 8, 4)})  # type: ignore[dict-item]
        groups.append({"params": [named["vector"]], "algorithm": "adamw"})  # type: ignore[dict-item]
    optimizer = kind(groups, lr=0.05, adjust_lr_fn="match_rms_adamw", **more)
    for step in range(steps):
        set_gradients(named.values(), step)
        optimizer.step()
    found: dict[str, Tensor] = {name: p.detach() for name, p in named.items()}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}|{key}"] = value
    return found


def plain(case: str) -> dict[str, Tensor]:
    return drive(case, {name: nn.Parameter(w) for name, w in weights(SHAPES).items()})


def placed(case: str, mesh: DeviceMesh, placement: str) -> dict[str, Tensor]:
    named = {
        name: nn.Parameter(split(weight, mesh, PLACEMENTS[placement]))
        for name, weight in weights(SHAPES).items()
    }
    return drive(case, named)


class Pair(nn.Module):
    """Two projections, split by rows and by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        with torch.no_grad():
            for name, weight in weights({"up": (24, 16), "down": (16, 24)}).items():
                getattr(self, name).weight.copy_(weight)

    def named(self) -> dict[str, nn.Parameter]:
        return {"up": self.up.weight, "down": self.down.weight}


def parallel(case: str, mesh: DeviceMesh) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = Pair()
    parallelize_module(model, mesh["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["outer"])
    return drive(case, model.named())


def replicas_agree(found: dict[str, Tensor]) -> bool:
    """Whether every tensor has the same bits on all processes that hold the same part of it."""
    for tensor in found.values():
        if not isinstance(tensor, DTensor):
            continue
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                continue
            part = tensor.to_local().contiguous()
            others = [torch.empty_like(part) for _ in range(tensor.device_mesh.size(dim))]
            dist.all_gather(others, part, group=tensor.device_mesh.get_group(dim))
            if not all(torch.equal(part, other) for other in others):
                return False
    return True


def every_placement() -> dict[tuple[str, str], tuple[dict[str, Tensor], bool]]:
    """Whole tensors of each case and placement, and whether replicas agree."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    results = {}
    for case in CASES:
        for placement in (*PLACEMENTS, STRIDED):
            if placement == STRIDED:
                found = parallel(case, mesh)
            else:
                found = placed(case, mesh, placement)
            agree = [None] * dist.get_world_size()
            dist.all_gather_object(agree, replicas_agree(found))
            results[case, placement] = ({k: whole(v) for k, v in found.items()}, all(agree))
    return results


if __name__ == "__main__":
    save_of_all(every_placement)
