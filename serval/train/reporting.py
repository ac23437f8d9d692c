"""Callbacks: what watches a run. The loop calls them and knows none of them.

Methods that act during training (bias control, growth, monitors) implement the same class.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from serval.errors import MissingExtraError, ServalError
from serval.optim import MixedOptimizer

Metrics = dict[str, float]


class Callback:
    """Hooks of the loop; override what you need. All ranks call them."""

    def on_train_start(self, step: int, model: nn.Module, optimizer: MixedOptimizer) -> None:
        """Before the first step; `step` is the number of steps already done."""

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        """After optimizer step `step` (1-based)."""

    def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
        """After a validation; metrics holds validation_loss."""

    def on_train_end(self, step: int, model: nn.Module) -> None:
        """After the last step, or when the run stops early."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values to keep in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class JsonLog(Callback):
    """Appends one JSON object per step to log.jsonl; a resumed run drops what it will redo."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, step: int, model: nn.Module, optimizer: MixedOptimizer) -> None:
        kept: list[str] = []
        if self.path.exists() and step:
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    continue  # a line cut short by a crash
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(kept))

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        self._write({"step": step, **metrics})

    def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
        self._write({"step": step, **metrics})

    def _write(self, values: dict[str, Any]) -> None:
        short = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(short) + "\n")
        except OSError as error:
            raise ServalError(
                f"cannot write {self.path}: {error.strerror}; make room, then run the same command "
                "to resume from the last checkpoint"
            ) from error


class TensorBoard(Callback):
    """Scalars for TensorBoard; raises MissingExtraError when tensorboard is not installed."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "train") from error
        self.writer = SummaryWriter(str(directory))

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"validation/{name}", value, step)

    def on_train_end(self, step: int, model: nn.Module) -> None:
        self.writer.flush()


class Console(Callback):
    """A progress bar on a terminal, plain lines elsewhere, every `every` steps."""

    def __init__(
        self, total_steps: int, every: int = 10, write: Callable[[str], None] | None = None
    ) -> None:
        self.total = total_steps
        self.every = every
        self.bar: Progress | None = None
        self.write = write or (lambda line: print(line, flush=True))
        self.seconds = 0.0  # exponential mean of a step's duration
        self.last = 0.0

    def on_train_start(self, step: int, model: nn.Module, optimizer: MixedOptimizer) -> None:
        self.last = time.perf_counter()
        if sys.stdout.isatty():
            self.bar = Progress(
                BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            )
            self.task = self.bar.add_task("starting", total=self.total, completed=step)
            self.write = lambda line: self.bar.print(line) if self.bar else print(line)
            self.bar.start()

    def on_step_end(
        self, step: int, model: nn.Module, optimizer: MixedOptimizer, metrics: Metrics
    ) -> None:
        now = time.perf_counter()
        took, self.last = now - self.last, now
        self.seconds = took if not self.seconds else 0.95 * self.seconds + 0.05 * took
        line = (
            f"step {step}/{self.total}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"mfu {metrics['mfu']:.0%}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=line)
        elif step % self.every == 0 or step == self.total:
            self.write(f"{line}  left {format_seconds(self.seconds * (self.total - step))}")

    def on_validation_end(self, step: int, model: nn.Module, metrics: Metrics) -> None:
        loss = metrics["validation_loss"]
        perplexity = torch.tensor(loss).exp().item()
        self.write(f"step {step}/{self.total}  validation loss {loss:.4f} (ppl {perplexity:.2f})")

    def on_train_end(self, step: int, model: nn.Module) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def format_seconds(seconds: float) -> str:
    """93 -> '1m33s', 7500 -> '2h05m'."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
