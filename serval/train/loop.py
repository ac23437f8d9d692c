"""The training loop: one optimizer step after another, resumable at every checkpoint.

A step reads its packed rows, divides every row's loss by the weight of the whole step (so that any
split into micro-batches and ranks gives the same gradient), accumulates, clips, updates. Everything
else is a callback.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from serval.errors import ConfigError, ServalError
from serval.models.decoder import Decoder
from serval.optim import MixedOptimizer, Schedule
from serval.train import checkpoint
from serval.train.cpu import fast_linears, keep_freed_memory
from serval.train.distributed import World, whole
from serval.train.loss import LanguageModelLoss
from serval.train.reporting import Callback, Metrics
from serval.train.stream import Row, Targets, TokenStream, next_token_targets
from serval.train.throughput import ModelFlops, measured_peak


@dataclass
class Settings:
    """Numbers of the loop; same names and meaning as the sections of a recipe.

    directory: where checkpoints go (None: none are written). fingerprint: what a checkpoint must
    agree with to be resumed; defaults: the keys in it ("section.key") that hold their default.
    """

    steps: int
    batch_rows: int
    micro_batch_rows: int = 1
    clip_norm: float = 1.0
    z_loss: float = 0.0
    mtp_weight: float = 0.3
    dtype: torch.dtype = torch.float32
    validate_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    directory: Path | None = None
    fingerprint: dict[str, Any] | None = None
    defaults: frozenset[str] = frozenset()

    def check(self, world: World) -> None:
        """Raise ConfigError when a step's rows cannot be shared out evenly."""
        share = self.micro_batch_rows * world.size
        if self.batch_rows % share:
            raise ConfigError(
                f"train.batch_rows is {self.batch_rows}; expected a multiple of "
                f"train.micro_batch_rows {self.micro_batch_rows} times {world.size} process(es)"
            )


def best_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve 'auto': bfloat16 on GPUs and CPUs with AMX or AVX512-BF16, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


class Trainer:
    """Trains `decoder` on `stream`.

    validation: packed rows, the same at every validation. loss: a module that holds `decoder` and
    is called as `LanguageModelLoss` is, instead of that one. After `fit`, `step` is the number of
    steps done and `interrupted` says whether a signal ended the run early.
    """

    def __init__(
        self,
        decoder: Decoder,
        make_optimizer: Callable[[nn.Module], MixedOptimizer],
        schedule: Schedule,
        stream: TokenStream,
        settings: Settings,
        *,
        validation: Sequence[Row] = (),
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
        note: Callable[[str], None] = print,
        loss: nn.Module | None = None,
    ) -> None:
        self.world = world or World()
        self.settings = settings
        settings.check(self.world)
        self.flops = ModelFlops.of(decoder)
        self.decoder = decoder.to(self.world.device)
        self.loss: nn.Module = loss or LanguageModelLoss(
            decoder, settings.z_loss, settings.mtp_weight
        )
        self.world.shard(self.loss, decoder.layers)
        self.optimizer = make_optimizer(decoder)
        self.schedule = schedule
        self.stream = stream
        self.validation = [next_token_targets(row) for row in validation]
        self.callbacks = list(callbacks)
        self.note = note if self.world.is_main else lambda line: None
        self.step = 0
        self.tokens_seen = 0
        self.interrupted = False
        self._signals = 0

    # -- the loop ---------------------------------------------------------------------------

    def fit(self, resume: bool = True) -> None:
        """Train to the last step. With `resume`, continue from the newest usable checkpoint."""
        if resume:
            self.resume()
        peak = measured_peak(self.settings.dtype, self.world.device) * self.world.size
        for callback in self.callbacks:
            callback.on_train_start(self.step, self.decoder, self.optimizer)
        if self.world.device.type == "cpu":
            keep_freed_memory()
        with self._signal_handlers(), fast_linears(self.decoder):
            try:
                while self.step < self.settings.steps and not self.interrupted:
                    self._one_step(peak)
                self._save()
            finally:
                for callback in self.callbacks:
                    callback.on_train_end(self.step, self.decoder)

    def _one_step(self, peak: float) -> None:
        start = time.perf_counter()
        self.loss.train()
        rows = [next_token_targets(self.stream.next()) for _ in range(self.settings.batch_rows)]
        multiplier = self.schedule.multiplier(self.step)
        self.optimizer.set_multiplier(multiplier)
        nll = self.accumulate(rows)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = sum(row.tokens.shape[0] for row in rows)
        self.tokens_seen += tokens
        took = time.perf_counter() - start
        flops = sum(self.flops.of_documents(row.lengths) for row in rows)
        metrics: Metrics = {
            "loss": nll,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens_per_second": tokens / took,
            "mfu": flops / took / peak,
            "tokens": self.tokens_seen,
        }
        for callback in self.callbacks:
            callback.on_step_end(self.step, self.decoder, self.optimizer, metrics)
        last = self.step == self.settings.steps
        if self.validation and (last or _due(self.step, self.settings.validate_every)):
            self.validate()
        self.interrupted = self.world.any(self._signals > 0)
        if not last and _due(self.step, self.settings.checkpoint_every):
            self._save()

    def accumulate(self, rows: Sequence[Targets]) -> float:
        """Add the gradient of one step's rows to the parameters; returns the step's mean nll.

        The rows are those of all ranks; each rank computes its share.
        """
        total = float(sum(row.weights.sum(dtype=torch.float64) for row in rows))
        own = Targets.grouped(
            rows[self.world.rank :: self.world.size], self.settings.micro_batch_rows
        )
        # Sharded gradients are averaged over the ranks, but each row is already divided by the
        # weight of the whole step: the sum is wanted.
        scale = self.world.size / max(total, 1e-9)
        nll: Tensor | float = 0.0
        for index, row in enumerate(own):
            self.world.last_micro_batch(self.loss, index == len(own) - 1)
            row = row.to(self.world.device)
            row.weights = row.weights * scale
            with self._autocast():
                loss, row_nll = self.loss(row)
            loss.backward()
            nll = nll + row_nll.detach()
        mean = self.world.sum(float(nll))[0] / self.world.size
        if mean != mean:
            raise ServalError(
                f"the loss became NaN at step {self.step + 1}; lower optimizer.lr, lengthen "
                "schedule.warmup_steps, or train in float32. The last checkpoint is intact"
            )
        return mean

    def _clip(self) -> float:
        """Scale the gradient down to `clip_norm`; returns its norm before that."""
        parameters = [p for p in self.optimizer.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(whole(total))
        if 0 < self.settings.clip_norm < norm:  # otherwise spare a pass over all gradients
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, total)
        return norm

    def validate(self) -> float:
        """Mean nll of the validation rows, over all ranks; told to the callbacks."""
        self.loss.eval()
        weighted, total = 0.0, 0.0
        share = -(-len(self.validation) // self.world.size)
        with torch.no_grad(), self._autocast():
            for index in range(share):
                at = index * self.world.size + self.world.rank
                row = self.validation[at % len(self.validation)].to(self.world.device)
                if at >= len(self.validation):  # every rank must run the same number of passes
                    row.weights = torch.zeros_like(row.weights)
                weighted += float(self.loss(row)[1])
                total += float(row.weights.sum())
        weighted, total = self.world.sum(weighted, total)
        loss = weighted / max(total, 1e-9)
        for callback in self.callbacks:
            callback.on_validation_end(self.step, self.decoder, {"validation_loss": loss})
        return loss

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, self.settings.dtype)

    # -- checkpoints ------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        # Frozen weights stay what they are: whoever resumes has loaded them.
        frozen = {n for n, p in self.decoder.named_parameters() if not p.requires_grad}
        state = self.decoder.state_dict()
        tensors = {f"model.{name}": t for name, t in state.items() if name not in frozen}
        tensors |= {f"optimizer.{k}": t for k, t in self.optimizer.state_tensors().items()}
        return tensors | {f"rng.{name}": t for name, t in checkpoint.rng_tensors().items()}

    def _save(self) -> None:
        directory = self.settings.directory
        if directory is None:
            return
        meta = {
            "tokens_seen": self.tokens_seen,
            "stream": self.stream.state_dict(),
            "rng": checkpoint.rng_values(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "fingerprint": self.settings.fingerprint,
        }
        checkpoint.save_checkpoint(
            directory, self.step, meta, self._tensors(), self.settings.keep_checkpoints, self.world
        )

    def resume(self) -> bool:
        """Load the newest usable checkpoint; returns False when there is none."""
        directory = self.settings.directory
        if directory is None:
            return False
        if self.world.is_main:
            checkpoint.remove_leftovers(directory)
        self.world.barrier()
        saved = checkpoint.latest_usable(directory, self.note)
        if saved is None:
            return False
        meta = saved.meta()
        now, defaults = self.settings.fingerprint, self.settings.defaults
        checkpoint.check_fingerprint(saved, meta["fingerprint"], now, defaults)
        names = checkpoint.saved_names(saved)
        self.optimizer.materialise_state()
        self.optimizer.forget_state(
            {name.removeprefix("optimizer.") for name in names if name.startswith("optimizer.")}
        )
        tensors = {
            name: tensor
            for name, tensor in self._tensors().items()
            if name in names or not name.startswith("rng.")
        }
        with torch.no_grad():
            checkpoint.load_checkpoint(saved, tensors, self.world)
        rng = {k.removeprefix("rng."): t for k, t in tensors.items() if k.startswith("rng.")}
        checkpoint.restore_rng(rng, meta["rng"])
        self.stream.load_state_dict(meta["stream"])
        for callback, state in zip(self.callbacks, meta["callbacks"], strict=False):
            callback.load_state_dict(state)
        self.step, self.tokens_seen = meta["step"], meta["tokens_seen"]
        self.note(f"resumed from {saved.path} at step {self.step}")
        return True

    # -- signals ----------------------------------------------------------------------------

    def _signal_handlers(self) -> AbstractContextManager[None]:
        return _Signals(self._on_signal)

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        self.note("stopping after this step (interrupt again to stop at once, without saving)")


class _Signals:
    """Calls `handle` on SIGINT and SIGTERM while entered; only the main thread can."""

    def __init__(self, handle: Callable[[], None]) -> None:
        self.handle = handle
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self.handle()

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, on_signal)
            except ValueError:  # not the main thread: the caller handles signals
                return

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
