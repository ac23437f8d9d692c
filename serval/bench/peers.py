"""The engines a user would pick instead, behind the calls that decode and prefill measure.

Each runs in a worker process (`worker.py`). All have the same calls as `ours.ServalEngine`:

    fill(batch, context, room)   put `context` tokens of cache behind each of `batch` sequences
    decode(steps)                greedy steps of one token per sequence; then back to `context`
    prefill(batch, tokens)       prompts from nothing to the first token
    weight_bytes()               bytes of the weights as held in memory

decode and prefill return (wall seconds, processor seconds) of the whole call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from serval.bench.harness import MissingPeerError
from serval.bench.shapes import SHAPES, cache_directory
from serval.models.config import ModelConfig

INSTALL = "pip install 'serval-llm[bench]'"


class Stopwatch:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def random_tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    """int64 [batch, length]."""
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length))


def hub_config(config: ModelConfig) -> Any:
    """The same model as a `transformers.LlamaConfig`."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind == "llama3":
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ):
            rope[key] = getattr(config.rope, key)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
    )


class TransformersEngine:
    """transformers, float32, sdpa attention, with a dynamic or a static cache.

    Steps call the model directly, as `generate` does inside, without its bookkeeping: a little
    faster than what a user gets.
    """

    def __init__(self, shape: str, cache: str = "static") -> None:
        import torch
        from transformers import LlamaForCausalLM

        from serval.bench.shapes import fill_parameters

        torch.set_grad_enabled(False)
        self.config, self.kind = SHAPES[shape], cache
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(
                hub_config(self.config), attn_implementation="sdpa", dtype=torch.float32
            )
        # Buffers (rotary frequencies) hold values computed at construction: take them from a copy
        # without layers, whose construction costs nothing.
        self.model = model.to_empty(device="cpu").eval()
        fresh = type(model.model.rotary_emb)(model.config)
        self.model.model.rotary_emb = fresh
        self.model.tie_weights()
        fill_parameters(self.model)

    def use(self, cache: str) -> None:
        """Choose the kind of cache for the next fill: "static" or "dynamic"."""
        self.kind = cache

    def fill(self, batch: int, context: int, room: int) -> None:
        import torch
        from transformers import DynamicCache, StaticCache

        self.cache: Any = None
        config = self.model.config
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        if self.kind == "static":
            self.cache = StaticCache(config, max_cache_len=context + room)
        else:
            self.cache = DynamicCache(config=config)
        states = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(0))
        for layer in range(config.num_hidden_layers):
            self.cache.update(states, states, layer)  # copies them
        del states
        self.batch, self.context = batch, context
        self._step(self._tokens())
        self._rewind(1)

    def _tokens(self) -> Any:
        import torch

        return torch.from_numpy(random_tokens(self.config, self.batch, 1))

    def _step(self, tokens: Any) -> Any:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _rewind(self, steps: int) -> None:
        if self.kind == "static":
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)
        else:
            self.cache.crop(-steps)

    def decode(self, steps: int) -> tuple[float, float]:
        tokens = self._tokens()
        watch = Stopwatch()
        for _ in range(steps):
            tokens = self._step(tokens)
        taken = watch.read()
        self._rewind(steps)
        return taken

    def prefill(self, batch: int, length: int) -> tuple[float, float]:
        import torch
        from transformers import DynamicCache, StaticCache

        self.cache = None
        tokens = torch.from_numpy(random_tokens(self.config, batch, length))
        watch = Stopwatch()
        if self.kind == "static":
            cache: Any = StaticCache(self.model.config, max_cache_len=length + 1)
        else:
            cache = DynamicCache(config=self.model.config)
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out.logits[:, -1].argmax(-1).tolist()
        return watch.read()

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python's low-level calls, flash attention, float16 cache.

    Matrices in the file's type (F16, Q8_0), several sequences in one llama_batch, each with its own
    stream of the cache.
    """

    def __init__(self, shape: str, kind: str, threads: int, path: str | None = None) -> None:
        from serval.bench.random_gguf import random_gguf

        self.api = import_llama_cpp()
        self.config, self.threads = SHAPES[shape], threads
        self.path = path or str(random_gguf(self.config, kind))
        self.context_handle: Any = None
        self.batch_handle: Any = None
        api = self.api
        api.llama_log_set(_silent(api), ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(self.path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.path}")

    def open(self, batch: int, length: int, rows: int = 512) -> None:
        """A context for `batch` sequences of up to `length` tokens, `rows` tokens per call."""
        api = self.api
        self.close_context()
        params = api.llama_context_default_params()
        per_sequence = -(-length // 256) * 256
        params.n_ctx = batch * per_sequence
        params.n_batch = max(rows, 512)
        params.n_ubatch = max(rows, 512)
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = 1
        params.kv_unified = False
        params.no_perf = True
        self.context_handle = api.llama_init_from_model(self.model, params)
        if not self.context_handle:
            raise RuntimeError("llama.cpp cannot make a context; is there enough memory?")
        self.memory = api.llama_get_memory(self.context_handle)
        self.batch_handle = api.llama_batch_init(params.n_batch, 0, 1)
        self.rows = params.n_batch

    def close_context(self) -> None:
        if self.context_handle is not None:
            self.api.llama_batch_free(self.batch_handle)
            self.api.llama_free(self.context_handle)
            self.context_handle = None

    def run(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of rows (token, position, sequence, logits wanted)."""
        handle = self.batch_handle
        handle.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            handle.token[i] = token
            handle.pos[i] = position
            handle.n_seq_id[i] = 1
            handle.seq_id[i][0] = sequence
            handle.logits[i] = wanted
        code = self.api.llama_decode(self.context_handle, handle)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def logits(self, row: int) -> np.ndarray:
        """float32 [vocab_size] of row `row` of the last call, a view."""
        pointer = self.api.llama_get_logits_ith(self.context_handle, row)
        return np.ctypeslib.as_array(pointer, (self.config.vocab_size,))

    def prompt(self, sequence: int, tokens: Sequence[int]) -> None:
        """Run a prompt in calls of at most `rows` tokens; logits of its last token."""
        for start in range(0, len(tokens), self.rows):
            part = tokens[start : start + self.rows]
            last = len(tokens) - 1 - start
            self.run([(int(t), start + i, sequence, i == last) for i, t in enumerate(part)])

    def fill(self, batch: int, context: int, room: int) -> None:
        self.open(batch, context + room)
        state = self._state(batch, context)
        for sequence in range(batch):
            buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
            api = self.api
            if not api.llama_state_seq_set_data(self.context_handle, buffer, len(state), sequence):
                raise RuntimeError("llama.cpp refused the stored cache state")
        self.batch, self.context = batch, context
        self.decode(1)

    def _state(self, batch: int, context: int) -> bytearray:
        """A sequence's cache of `context` tokens, computed once and kept on disk: a prompt of 8,192
        tokens takes minutes, and what the numbers are makes no difference to the speed. (A state
        fits only contexts for the same number of sequences.)"""
        api = self.api
        version = getattr(__import__("llama_cpp"), "__version__", "0")
        stem = os.path.basename(self.path).rpartition("-")[0]
        path = cache_directory() / f"{stem}-{batch}x{context}-{version}.state"
        if not path.exists():
            self.prompt(0, random_tokens(self.config, 1, context)[0].tolist())
            size = api.llama_state_seq_get_size(self.context_handle, 0)
            buffer = (ctypes.c_uint8 * size)()
            api.llama_state_seq_get_data(self.context_handle, buffer, size, 0)
            temporary = path.with_name(path.name + ".writing")
            temporary.write_bytes(bytes(buffer))
            temporary.replace(path)
            api.llama_memory_clear(self.memory, True)
        return bytearray(path.read_bytes())

    def decode(self, steps: int) -> tuple[float, float]:
        tokens = [int(row[0]) for row in random_tokens(self.config, self.batch, 1)]
        watch = Stopwatch()
        for step in range(steps):
            position = self.context + step
            self.run([(token, position, s, True) for s, token in enumerate(tokens)])
            tokens = [int(self.logits(s).argmax()) for s in range(self.batch)]
        taken = watch.read()
        for sequence in range(self.batch):
            self.api.llama_memory_seq_rm(self.memory, sequence, self.context, -1)
        return taken

    def prefill(self, batch: int, length: int) -> tuple[float, float]:
        prompts = random_tokens(self.config, batch, length).tolist()
        self.open(batch, length, min(2048, max(512, length)))
        watch = Stopwatch()
        for sequence, tokens in enumerate(prompts):
            self.prompt(sequence, tokens)
            int(self.logits(-1).argmax())
        taken = watch.read()
        self.close_context()
        return taken

    def weight_bytes(self) -> int:
        return os.path.getsize(self.path)


@functools.cache
def _silent(api: Any) -> Any:
    """A log function that drops everything; llama.cpp keeps it for the life of the process."""
    return api.llama_log_callback(lambda level, text, data: None)


def import_llama_cpp() -> Any:
    """llama-cpp-python's low-level module; raises MissingPeerError."""
    try:
        import llama_cpp.llama_cpp as api
    except ImportError as error:
        raise MissingPeerError("llama-cpp-python", INSTALL) from error
    return api
