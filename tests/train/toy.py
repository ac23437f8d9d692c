"""A small decoder and a seeded token stream for the trainer's tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.optim import OptimizerOptions, build
from serval.optim.schedules import WarmupStableDecay
from serval.train.loop import Settings, Trainer


class ToyStream:
    """Rows of a noisy counting language; the position is the number of rows read."""

    def __init__(self, rows: int, vocabulary: int = 64, seed: int = 0, masked: bool = True) -> None:
        self.length, self.vocabulary, self.seed, self.masked = rows, vocabulary, seed, masked
        self.position = 0

    def next(self) -> tuple[Tensor, Sequence[int], Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.position)
        self.position += 1
        start = torch.randint(self.vocabulary, (1,), generator=generator)
        noise = torch.rand(self.length, generator=generator) < 0.1
        tokens = (start + torch.arange(self.length) + noise.long()) % self.vocabulary
        cut = int(torch.randint(1, self.length, (1,), generator=generator))
        weights = torch.rand(self.length, generator=generator).round() if self.masked else None
        return tokens, [cut, self.length - cut], weights

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def toy_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**(values | changes))


def toy_trainer(
    directory: Path | None = None, optimizer: str = "adamw", steps: int = 8, **changes: Any
) -> Trainer:
    torch.manual_seed(0)
    decoder = Decoder(changes.pop("config", None) or toy_config())
    world = changes.pop("world", None)
    callbacks = changes.pop("callbacks", ())
    stream = changes.pop("stream", None) or ToyStream(32)
    validation = changes.pop("validation", ())
    make = changes.pop("make_optimizer", None) or functools.partial(
        build, optimizer, options=OptimizerOptions(lr=3e-3), note=lambda line: None
    )
    settings = Settings(
        **{
            "steps": steps,
            "batch_rows": 4,
            "directory": directory,
            "checkpoint_every": 3,
            **changes,
        }
    )
    return Trainer(
        decoder,
        make,
        WarmupStableDecay(max(steps, 8), warmup_steps=2, decay_steps=2),
        stream,
        settings,
        callbacks=callbacks,
        validation=validation,
        world=world,
        note=lambda line: None,
    )
