"""Training tokens/s: our trainer against `transformers.Trainer` on the same small Llama.

Same shape, rows, optimizer (AdamW, clipped gradients) and precision. A round is a few optimizer
steps after one that is not counted; times are taken at the ends of steps.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serval.bench.harness import (
    Case,
    Contestant,
    MissingPeerError,
    Outcome,
    Sample,
    Setup,
    compare,
    paired_rounds,
)
from serval.bench.machine import cpu_has
from serval.bench.shapes import attention_flops, head_parameters, linear_parameters
from serval.bench.worker import WorkerPool
from serval.kernels.bandwidth import matmul_roof
from serval.models.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=16384,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1536,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0


@dataclass
class Work:
    """What one optimizer step trains on: `rows` rows of `length` tokens in `dtype`."""

    config: ModelConfig = dataclasses.field(default_factory=lambda: SMALL)
    length: int = 1024
    rows: int = 4
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def data(self, count: int) -> np.ndarray:
        """int64 [count, length]; ids are distributed like words, few of them often."""
        draws = np.random.default_rng(0).zipf(1.2, (count, self.length))
        return draws % self.config.vocab_size

    def flops(self) -> float:
        """FLOPs that a step needs, forward and backward."""
        weights = linear_parameters(self.config) + head_parameters(self.config)
        attention = 3 * self.rows * attention_flops(self.config, self.length)
        return 6.0 * weights * self.tokens + attention


class _Clock:
    """Wall and processor time at the end of every step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def per_step(self) -> tuple[float, float]:
        """Median wall and mean processor seconds of the steps after the first."""
        walls = np.diff(self.wall).tolist()
        return statistics.median(walls), (self.cpu[-1] - self.cpu[0]) / len(walls)


class ServalTrainer:
    """Our trainer in a worker."""

    def __init__(self, work: Work) -> None:
        import torch

        from serval.models.decoder import Decoder
        from serval.optim import OptimizerOptions, build
        from serval.optim.schedules import Constant
        from serval.train.loop import Settings, Trainer
        from serval.train.reporting import Callback

        torch.manual_seed(0)
        rows = torch.from_numpy(work.data(4 * work.rows))
        clock = self.clock = _Clock()

        class Stream:
            at = 0

            def next(self) -> tuple[Any, list[int], None]:
                self.at += 1
                return rows[self.at % len(rows)], [work.length], None

            def state_dict(self) -> dict[str, Any]:
                return {"at": self.at}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.at = state["at"]

        class Ticker(Callback):
            def on_step_end(self, *_: Any) -> None:
                clock.tick()

        options = OptimizerOptions(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
        settings = Settings(
            steps=0,
            batch_rows=work.rows,
            micro_batch_rows=1,
            clip_norm=CLIP,
            dtype=getattr(torch, work.dtype),
        )
        self.trainer = Trainer(
            Decoder(work.config),
            lambda model: build("adamw", model, options),
            Constant(1, 0, 0, 1.0),
            Stream(),
            settings,
            callbacks=[Ticker()],
        )

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds per step of `count` steps after one."""
        self.clock.wall.clear()
        self.clock.cpu.clear()
        self.trainer.settings.steps = self.trainer.step + count + 1
        self.trainer.fit(resume=False)
        return self.clock.per_step()


class TransformersTrainer:
    """`transformers.Trainer` in a worker, with its defaults where `Work` does not say otherwise.

    accumulate: rows go through the model one by one (gradient accumulation) instead of together.
    """

    def __init__(self, work: Work, accumulate: bool = False) -> None:
        import torch
        from transformers import LlamaForCausalLM, TrainerCallback

        from serval.bench.peers import INSTALL, hub_config

        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise MissingPeerError("accelerate", INSTALL) from error
        torch.manual_seed(0)
        clock = self.clock = _Clock()

        class Ticker(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        self.ticker, self.work, self.accumulate = Ticker(), work, accumulate
        self.model = LlamaForCausalLM._from_config(
            hub_config(work.config), attn_implementation="sdpa", dtype=torch.float32
        )
        rows = torch.from_numpy(work.data(4 * work.rows))
        self.rows = [{"input_ids": row, "labels": row} for row in rows]

    def steps(self, count: int) -> tuple[float, float]:
        from transformers import Trainer, TrainingArguments

        self.clock.wall.clear()
        self.clock.cpu.clear()
        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=str(Path(directory)),
                max_steps=count + 1,
                per_device_train_batch_size=1 if self.accumulate else self.work.rows,
                gradient_accumulation_steps=self.work.rows if self.accumulate else 1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=WEIGHT_DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                max_grad_norm=CLIP,
                bf16=self.work.dtype == "bfloat16",
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=self.rows,
                callbacks=[self.ticker],
            )
            trainer.train()
        return self.clock.per_step()


PEERS = {"": False, ", gradient accumulation": True}


def collect(setup: Setup) -> list[Case]:
    """float32 always, bfloat16 where the processor multiplies it natively."""
    from serval.bench.shapes import TINY

    name, work, rounds, steps = "llama-33m", Work(), 3, 3
    if setup.quick:
        name, work, rounds, steps = "tiny", Work(TINY, length=64, rows=2), 1, 1
    native = cpu_has("avx512_bf16") or cpu_has("amx_bf16")
    cases: list[Case] = []
    for dtype in ["float32", *(["bfloat16"] if native else [])]:
        case = f"{dtype}-{name}-train-{work.rows}x{work.length}"
        if setup.wants(case):
            setup.note(case)
            cases += _measure(setup, case, dataclasses.replace(work, dtype=dtype), rounds, steps)
    return cases


def _measure(setup: Setup, case: str, work: Work, rounds: int, steps: int) -> list[Case]:
    import torch

    peaks: dict[str, int] = {}

    def contestant(label: str, target: str, arguments: dict[str, Any]) -> Contestant:
        def measure() -> Sample:
            worker = pool.get(label, f"serval.bench.train:{target}", arguments, 3 * 2**30)
            sample = Sample(*worker.call("steps", steps))
            peaks[label] = worker.peak_bytes()
            return sample

        return Contestant(label, measure)

    with WorkerPool(torch.get_num_threads()) as pool:
        contestants = [contestant("serval", "ServalTrainer", {"work": work})]
        for suffix, accumulate in PEERS.items():
            label = f"transformers.Trainer {work.dtype}{suffix}"
            arguments = {"work": work, "accumulate": accumulate}
            contestants.append(contestant(label, "TransformersTrainer", arguments))
        outcomes = paired_rounds(contestants, rounds, setup.note)
    ours = outcomes.pop("serval")
    roof = None
    if work.dtype == "float32" and not setup.quick:
        roof = work.flops() / (matmul_roof() * 1e9)
    return [
        compare(case, ours, peer, floor_seconds=roof, metrics=_metrics(work, ours, peer, peaks))
        for peer in outcomes.values()
    ]


def _metrics(work: Work, ours: Outcome, peer: Outcome, peaks: dict[str, int]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for prefix, outcome in (("", ours), ("peer_", peer)):
        if outcome.samples:
            metrics[prefix + "tokens_per_second"] = work.tokens / outcome.seconds
            metrics[prefix + "peak_gib"] = peaks[outcome.name] / 2**30
    return metrics
