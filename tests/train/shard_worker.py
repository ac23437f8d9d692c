"""Runs for `torchrun`: `python -m tests.train.shard_worker DIRECTORY`; all cases in one launch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from serval.models.config import MoEConfig
from serval.train.distributed import World, whole
from serval.train.reporting import Callback, JsonLog
from serval.train.wisca import WiscaCallback
from tests.train.toy import ToyStream, toy_config, toy_trainer

MODELS = {
    "plain": toy_config(),
    "mtp": toy_config(num_mtp_layers=1, tie_word_embeddings=True, qkv_bias=True),
    "moe": toy_config(moe=MoEConfig(4, 2, 16, shared_intermediate_size=16)),
}


def train(
    root: Path, optimizer: str, model: str, steps: int, world: World, *methods: Callback
) -> None:
    """One run; writes log.jsonl, checkpoints, and the whole weights to final.safetensors."""
    trainer = toy_trainer(
        root / "checkpoints",
        optimizer,
        steps,
        config=MODELS[model],
        world=world,
        validation=[ToyStream(32, seed=5).next() for _ in range(3)],
        callbacks=[*methods, *([JsonLog(root / "log.jsonl")] if world.is_main else [])],
    )
    trainer.fit()
    state = {name: whole(tensor) for name, tensor in trainer.decoder.state_dict().items()}
    if world.is_main:
        save_file(state, root / "final.safetensors")
    world.barrier()


def rescaling() -> WiscaCallback:
    return WiscaCallback(every=3, qk="row", mlp="tensor")


def main() -> None:
    root = Path(sys.argv[1])
    world = World.join("cpu")
    for optimizer, model in (("adamw", "plain"), ("muon", "mtp"), ("muon", "moe")):
        train(root / f"{optimizer}-{model}", optimizer, model, 8, world)
    train(root / "adamw-wisca", "adamw", "mtp", 8, world, rescaling())
    train(root / "resumed", "mona", "plain", 3, world)
    if world.is_main:
        shutil.copytree(root / "resumed", root / "alone")
    train(root / "resumed", "mona", "plain", 8, world)
    world.leave()


if __name__ == "__main__":
    main()
