"""OpenVINO GenAI with int4 weights behind the calls that decode and prefill measure (`peers.py`).

Its continuous-batching pipeline (paged attention, the default of its `LLMPipeline` on x86) with its
own choices: activations quantised dynamically, cache in 8 bits, float type as the processor has it.
Only the threads are given, and prompts go in calls of up to 2,048 tokens, as with llama.cpp (its
default of 256 tokens is slower, 512 as well).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from serval.bench.harness import MissingPeerError
from serval.bench.openvino_model import FILE, INSTALL
from serval.bench.peers import Stopwatch, random_tokens
from serval.bench.shapes import SHAPES, cache_directory
from serval.models.config import ModelConfig

ROWS = 2048  # most tokens of one call
BLOCK = 32  # tokens of a cache block


def import_openvino_genai() -> Any:
    """The `openvino_genai` package; raises MissingPeerError."""
    try:
        import openvino_genai
    except ImportError as error:
        raise MissingPeerError("openvino-genai", INSTALL) from error
    return openvino_genai


def random_model(shape: str) -> Path:
    """The cached directory of a model with random weights, written on first use (by a process of
    its own, whose memory is not the engine's)."""
    config = json.dumps(SHAPES[shape].to_dict(), sort_keys=True)
    digest = hashlib.sha256(config.encode()).hexdigest()
    path = cache_directory() / f"openvino-{digest[:16]}-int4"
    if not path.exists():
        command = [sys.executable, "-m", "serval.bench.openvino_model", shape, str(path)]
        subprocess.run(command, check=True)
    return path


def new_tokens(handle: Any) -> list[int]:
    """What a request has made since the last call."""
    tokens: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            tokens += output.generated_ids
    return tokens


class OpenVinoEngine:
    """OpenVINO GenAI on `path`, or on random weights of `shape`."""

    def __init__(
        self, shape: str, threads: int, path: str | None = None, **properties: Any
    ) -> None:
        """properties: of OpenVINO's CPU device, beside the number of threads."""
        self.api = import_openvino_genai()
        self.config: ModelConfig = SHAPES[shape]
        self.path = Path(path) if path else random_model(shape)
        self.properties = {"INFERENCE_NUM_THREADS": threads, **properties}
        self.pipeline: Any = None
        self.opened: tuple[int, int, bool] | None = None
        self.requests = 0

    def open(self, batch: int, length: int, keep_prompts: bool) -> bool:
        """A pipeline for `batch` sequences of `length` tokens; whether it is new. keep_prompts: a
        prompt's cache stays when its request ends, and the next request with that prompt starts
        from it."""
        if self.opened == (batch, length, keep_prompts):
            return False
        self.pipeline = None  # frees the earlier one first
        scheduler = self.api.SchedulerConfig()
        scheduler.num_kv_blocks = (1 + keep_prompts) * batch * (length // BLOCK + 2)
        scheduler.max_num_batched_tokens = max(512, min(ROWS, length))
        scheduler.max_num_seqs = batch
        scheduler.enable_prefix_caching = keep_prompts
        # Token ids go in and out: a tokenizer without a model.
        tokenizer = self.api.Tokenizer(str(self.path))
        self.pipeline = self.api.ContinuousBatchingPipeline(
            str(self.path), tokenizer, scheduler, "CPU", **self.properties
        )
        self.opened = (batch, length, keep_prompts)
        return True

    def start(self, prompts: np.ndarray, tokens: int) -> list[Any]:
        """One greedy request of `tokens` new tokens for each prompt [batch, length]."""
        from openvino import Tensor

        options = self.api.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = tokens, True, False
        options.set_eos_token_id(0)  # ignored; without a tokenizer it would be -1: refused
        handles = []
        for prompt in prompts:
            ids = Tensor(np.ascontiguousarray(prompt[None], np.int64))
            handles.append(self.pipeline.add_request(self.requests, ids, options))
            self.requests += 1
        return handles

    def reach_first_token(self, handles: list[Any]) -> None:
        """Step until every request has made a token."""
        waiting = list(handles)
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]

    def fill(self, batch: int, context: int, room: int) -> None:
        self.open(batch, context + room, keep_prompts=True)
        self.batch, self.context = batch, context
        self.reach_first_token(self.start(random_tokens(self.config, batch, context), 1))
        self.decode(1)

    def decode(self, steps: int) -> tuple[float, float]:
        """Prompts come from the kept cache; the clock starts when each has its first token. Those
        that have it earlier go on meanwhile and need tokens for that."""
        prompts = random_tokens(self.config, self.batch, self.context)
        handles = self.start(prompts, steps + self.batch + 2)
        self.reach_first_token(handles)
        for handle in handles:
            new_tokens(handle)
        watch = Stopwatch()
        for _ in range(steps):
            self.pipeline.step()
        taken = watch.read()
        made = [len(new_tokens(handle)) for handle in handles]
        if made != [steps] * self.batch:
            raise RuntimeError(f"OpenVINO GenAI made {made} tokens in {steps} steps")
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return taken

    def prefill(self, batch: int, length: int) -> tuple[float, float]:
        prompts = random_tokens(self.config, batch, length)
        if self.open(batch, length, keep_prompts=False):
            # kernels for a shape are made when it is first seen
            self.reach_first_token(self.start(prompts[:1], 1))
        watch = Stopwatch()
        self.reach_first_token(self.start(prompts, 1))
        return watch.read()

    def weight_bytes(self) -> int:
        return (self.path / FILE).with_suffix(".bin").stat().st_size
