"""Runs for `torchrun`: `python -m tests.train.shard_worker DIRECTORY`; all cases in one launch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from serval.models.config import MoEConfig
from serval.optim import MixedOptimizer, Mona, OptimizerOptions, build
from serval.train.distributed import World, whole
from serval.train.reporting import Callback, JsonLog
from serval.train.wisca import WiscaCallback
from tests.train.toy import ToyStream, toy_config, toy_trainer

MODELS = {
    "plain": toy_config(),
    "mtp": toy_config(num_mtp_layers=1, tie_word_embeddings=True, qkv_bias=True),
    "moe": toy_config(moe=MoEConfig(4, 2, 16, shared_intermediate_size=16)),
    # rows and experts that two processes cannot share evenly
    "uneven": toy_config(
        vocab_size=65,
        hidden_size=33,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        intermediate_size=45,
        moe=MoEConfig(3, 2, 15),
        moe_layers=(False, True),
    ),
}
KINDS = ("muon", "mona", "mona-lite", "mona-two-buffers")


def two_buffers(model: nn.Module) -> MixedOptimizer:
    """MONA as a recipe builds it, in its literal form."""
    made = build("mona", model, OptimizerOptions(lr=3e-3))
    (mona,) = made.optimizers
    assert isinstance(mona, Mona)
    for group in mona.param_groups:
        group["form"] = "two_buffers"
    return made


def train(
    root: Path, optimizer: str, model: str, steps: int, world: World, *methods: Callback
) -> None:
    """One run; writes log.jsonl, checkpoints, the whole weights to final.safetensors and the whole
    state of the optimizer to state.safetensors."""
    trainer = toy_trainer(
        root / "checkpoints",
        optimizer,
        steps,
        config=MODELS[model],
        world=world,
        validation=[ToyStream(32, seed=5).next() for _ in range(3)],
        callbacks=[*methods, *([JsonLog(root / "log.jsonl")] if world.is_main else [])],
        make_optimizer=two_buffers if optimizer == "mona-two-buffers" else None,
    )
    trainer.fit()
    weights = trainer.decoder.state_dict()
    found = {"final": weights, "state": trainer.optimizer.state_tensors()}
    for name, tensors in found.items():
        gathered = {key: whole(tensor).contiguous() for key, tensor in tensors.items()}
        if world.is_main:
            save_file(gathered, root / f"{name}.safetensors")
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
    for kind in KINDS:
        train(root / f"{kind}-undisturbed", kind, "uneven", 8, world)
        train(root / f"{kind}-stopped", kind, "uneven", 3, world)
        if world.is_main:
            shutil.copytree(root / f"{kind}-stopped", root / f"{kind}-resumed")
        world.barrier()
        train(root / f"{kind}-resumed", kind, "uneven", 8, world)
        train(root / f"{kind}-alone", kind, "uneven", 3, world)  # saved by one process: only loads
    world.leave()


if __name__ == "__main__":
    main()
