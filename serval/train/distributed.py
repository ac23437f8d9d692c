"""One process or many: the loop asks this object and mentions no backend.

Under torchrun parameters are sharded with FSDP2 (`fully_shard`), one group per block; gradients are
summed over the ranks, because the loss of every row is already divided by the weight of the whole
step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from serval.errors import CheckpointError


class World:
    """The processes of this run. `World.join()` reads torchrun's environment."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)

    @classmethod
    def join(cls, device: str = "auto") -> World:
        """Join the process group torchrun announced, or stand alone.

        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        """
        kind = device
        if device == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        if size == 1:
            return cls(device=place)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), place)

    def leave(self) -> None:
        """Leave together: a process that goes first can abort another's last collective."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Shard `module` in place, one communication group per block; nothing when alone."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def last_micro_batch(self, module: nn.Module, last: bool) -> None:
        """Gradients are reduced over the ranks only in the last micro-batch of a step."""
        if self.size > 1:
            module.set_requires_gradient_sync(last)  # type: ignore[operator]

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return self.sum(float(flag))[0] > 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (a collective call); plain tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_sharded(tensors: dict[str, Any], path: Path) -> None:
    """Write a sharded state as safetensors, every rank its own part (collective)."""
    from torch.distributed.checkpoint import CheckpointException, save
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{type(first).__name__}: {first}") from error


def read_sharded(tensors: dict[str, Any], path: Path, alone: bool) -> None:
    """Fill `tensors` in place from a checkpoint of any number of processes."""
    from torch.distributed.checkpoint import CheckpointException, load
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"checkpoint {path} does not fit this run: {first}") from error
