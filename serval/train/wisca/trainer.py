"""WISCA in a `transformers.Trainer`.

Trainer(model, args, callbacks=[WiscaTrainerCallback(every=250)], ...).train()
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from serval.train.wisca.pairs import Report
from serval.train.wisca.rescale import WiscaCallback


class WiscaTrainerCallback(TrainerCallback):
    """`WiscaCallback` for `transformers.Trainer`; options: its fields.

    Acts before the first step and after every `every`-th optimizer step, counted by the trainer's
    global step, so that a resumed run keeps the phase. Adapters are balanced, frozen weights stay.
    metrics: what the last rescaling after a step found, see `WiscaCallback`.
    """

    def __init__(self, **options: Any) -> None:
        self.wisca = WiscaCallback(**options)
        self.metrics: dict[str, float] = {}

    @property
    def last(self) -> Report | None:
        """The last rescaling."""
        return self.wisca.last

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.wisca.on_train_start(state.global_step, given["model"], given["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        found: dict[str, float] = {}
        self.wisca.on_step_end(state.global_step, given["model"], given["optimizer"], found)
        self.metrics = found or self.metrics
