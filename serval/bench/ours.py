"""Serval behind the calls that decode and prefill measure (see `peers.py`).

Decode steps are whole engine steps: schedule, run, sample greedily, deliver.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serval.bench.peers import Stopwatch, random_tokens
from serval.bench.shapes import SHAPES, fill_parameters, fill_tensor, random_block
from serval.cache.layouts.base import CacheView, Layout
from serval.cache.memory import cache_budget
from serval.compress.compressed_tensors import quantization_config_of
from serval.compress.install import install
from serval.compress.scheme import QuantizedWeight, WeightScheme
from serval.compress.targets import targets
from serval.engine.llm import LLM
from serval.engine.request import SamplingParams
from serval.evaluate.speed import weight_bytes
from serval.models.decoder import Decoder

BLOCK = 32  # tokens of a cache block

SCHEMES = {
    "int8": WeightScheme(8),
    "w4a8": WeightScheme(4),
    "w4a8-g128": WeightScheme(4, 128, scales="integer"),
}


HEADS = {8: WeightScheme(8), 4: WeightScheme(4, 32, scales="integer")}


class ServalEngine:
    """Serval with random weights of `shape`.

    weights: None for float32, or a key of SCHEMES, with embedding and head of `head` bits; integers
    are made directly, there is never a float model. kv: cache layout.
    """

    def __init__(
        self, shape: str, weights: str | None = None, kv: str = "full", head: int = 8
    ) -> None:
        torch.set_grad_enabled(False)
        self.config, self.kv = SHAPES[shape], kv
        with torch.device("meta"):
            decoder = Decoder(self.config)
        if weights is not None:
            install_random(decoder, SCHEMES[weights], HEADS[head])
        fill_parameters(decoder)
        self.decoder = decoder.eval()
        self.llm: LLM | None = None

    def _open(self, batch: int, length: int) -> LLM:
        self.llm = None  # frees the earlier cache first
        specs = self.decoder.attention_layers
        blocks = batch * (length // BLOCK + 1) + 1
        self.llm = LLM(
            self.decoder,
            kv=self.kv,
            max_model_len=length,
            cache_bytes=cache_budget(
                specs,
                self.kv,
                torch.float32,
                blocks=blocks,
                block_size=BLOCK,
                sequences=batch,
            ),
            block_size=BLOCK,
            max_sequences=batch,
            prefix_caching=False,
        )
        return self.llm

    def fill(self, batch: int, context: int, room: int) -> None:
        """Caches of random keys and values; no prompt is computed."""
        llm = self._open(batch, context + room + 1)
        for layout in llm.engine.memory.layouts:
            if layout.delayed:
                _store_random(layout)
                continue
            for tensors in layout.storage:
                for tensor in tensors:
                    _randomise(tensor)
        self.batch, self.context, self.room = batch, context, room
        self.decode(1)

    def _start(self) -> LLM:
        """`batch` sequences that look as if `context` tokens of each were computed."""
        assert self.llm is not None
        engine = self.llm.engine
        engine.abort_all("next round")
        params = SamplingParams(max_tokens=self.room, temperature=0.0, ignore_eos=True)
        prompts = random_tokens(self.config, self.batch, self.context + 1)
        for tokens in prompts.tolist():
            sequence = engine.add_request(tokens, params).sequences[0]
            engine.scheduler.waiting.remove(sequence)
            engine.manager.append(sequence.cache, self.context)
            engine.scheduler.add_running(sequence)
        return self.llm

    def decode(self, steps: int) -> tuple[float, float]:
        engine = self._start().engine
        watch = Stopwatch()
        for _ in range(steps):
            engine.step()
        taken = watch.read()
        engine.manager.check_integrity()
        return taken

    def prefill(self, batch: int, length: int) -> tuple[float, float]:
        llm = self._open(batch, length + 1)
        prompts = random_tokens(self.config, batch, length).tolist()
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        watch = Stopwatch()
        llm.generate(prompts, params)
        return watch.read()

    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, each counted once."""
        return weight_bytes(self.decoder)

    def cache_bytes_per_token(self) -> float:
        """Bytes of keys and values per token, all layers."""
        assert self.llm is not None
        return self.llm.memory.block_bytes // BLOCK


def install_random(decoder: Decoder, scheme: WeightScheme, table: WeightScheme) -> None:
    """Random integers of `scheme` in every linear of a decoder, of `table` in its embedding and
    head."""
    for target in targets(decoder):
        assert isinstance(target.module, (torch.nn.Linear, torch.nn.Embedding)), target.name
        if target.kind == "linear" or target.kind == "head" or decoder.lm_head is None:
            kind = scheme if target.kind == "linear" else table
            rows, columns = target.module.weight.shape
            install(decoder, target, random_weight(rows, columns, kind))
    decoder.quantization_config = quantization_config_of(decoder)


def random_weight(rows: int, columns: int, scheme: WeightScheme) -> QuantizedWeight:
    """Uniform codes with scales such that weights have the deviation of `random_block`'s."""
    block = np.random.default_rng(0).integers(
        scheme.lowest, scheme.highest + 1, (1 << 20) - 3, dtype=np.int8
    )
    codes = torch.empty(rows, columns, dtype=torch.int8)
    fill_tensor(codes, torch.from_numpy(block))
    groups = scheme.groups(columns)
    scale = 0.02 * 12**0.5 / (scheme.highest - scheme.lowest)
    made = QuantizedWeight(codes, torch.full((rows, groups), scale), scheme)
    if scheme.scales == "integer":
        made.integer = torch.full((rows, groups), 256, dtype=torch.int16)
        made.row_factor = torch.full((rows,), scale / 256)
    return made


def _store_random(layout: Layout, piece: int = 4096) -> None:
    """Fill every block of a layout whose bytes mean something together, by storing tokens."""
    tokens = layout.num_blocks * layout.block_size
    table = torch.arange(layout.num_blocks, dtype=torch.int32)[None]
    state = torch.zeros(1, dtype=torch.int32)
    for slot, spec in enumerate(layout.specs):
        k = torch.randn(piece, spec.num_key_value_heads, spec.head_dim)
        v = torch.randn(piece, spec.num_key_value_heads, spec.v_head_dim)
        for first in range(0, tokens, piece):
            count = min(piece, tokens - first)
            lens = torch.tensor([first + count], dtype=torch.int32)
            starts = torch.tensor([0, count], dtype=torch.int32)
            view = CacheView(
                torch.empty(0, dtype=torch.int64), table, lens, starts, [first + count], [count],
                state,
            )  # fmt: skip
            layout.fill(slot, view, k[:count], v[:count])


def _randomise(tensor: Tensor) -> None:
    """Plausible stored values: codes for integers, normal numbers or small positive scales for
    floats (scales have no axis of channels)."""
    if tensor.dtype == torch.int8:
        codes = np.random.default_rng(0).integers(-127, 128, 1 << 20, dtype=np.int8)
        fill_tensor(tensor, torch.from_numpy(codes))
    elif tensor.dim() == 3:
        tensor.fill_(0.02)
    else:
        fill_tensor(tensor, torch.from_numpy(random_block(std=1.0)).to(tensor.dtype))
