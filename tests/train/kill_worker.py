"""A training run to be killed: `python -m tests.train.kill_worker DIRECTORY STEPS EVERY`.

Prints `start N`, then `step N` for every step done; writes the weights to final.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from serval.optim import MixedOptimizer
from serval.train.reporting import Callback, Metrics
from tests.train.toy import toy_trainer


class Tell(Callback):
    def on_train_start(self, step: int, model: nn.Module, optimizer: MixedOptimizer) -> None:
        print(f"start {step}", flush=True)

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        print(f"step {step}", flush=True)


def main() -> None:
    directory, steps, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    trainer = toy_trainer(
        directory / "checkpoints", "muon", steps, checkpoint_every=every, callbacks=[Tell()]
    )
    trainer.fit()
    save_file(trainer.decoder.state_dict(), directory / "final.safetensors")


if __name__ == "__main__":
    main()
