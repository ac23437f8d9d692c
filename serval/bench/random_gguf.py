"""GGUF files with random weights, for the llama.cpp peer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from serval.bench.harness import MissingPeerError
from serval.bench.shapes import cache_directory, random_block
from serval.compress.gguf_file import import_gguf, write_gguf
from serval.errors import ServalError
from serval.models.config import ModelConfig

_Q6_K_VALUES, _Q6_K_BYTES = 256, 210


def random_gguf(config: ModelConfig, kind: str) -> Path:
    """The cached GGUF file with random weights of this shape and type, written on first use. In
    a Q4_0 file embedding and head are Q6_K, as llama.cpp's own quantiser makes them."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    path = cache_directory() / f"random-{digest[:16]}-{kind}.gguf"
    if path.exists():
        return path
    try:
        gguf = import_gguf()
    except ServalError as error:
        raise MissingPeerError("gguf", "pip install 'serval-llm[bench]'") from error
    block = random_block()
    made: dict[tuple[Any, ...], np.ndarray] = {}

    def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape, np.float32) if len(shape) == 1 else np.resize(block, shape)

    def encode(array: np.ndarray, kind_: Any) -> np.ndarray:
        key = (array.shape, kind_)
        if key not in made:
            if kind_ == gguf.GGMLQuantizationType.Q6_K:
                made[key] = _random_q6_k(*array.shape)
            else:
                made[key] = gguf.quants.quantize(array, kind_)
        return made[key]

    table = "q6_k" if kind == "Q4_0" and config.hidden_size % _Q6_K_VALUES == 0 else None
    return write_gguf(path, config, weights, kind.lower(), table_kind=table, encode=encode)


def _random_q6_k(rows: int, columns: int) -> np.ndarray:
    """Valid blocks: 4 + 2 bits of each code, 16 int8 scales, one float16 scale."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows * columns // _Q6_K_VALUES, _Q6_K_BYTES), dtype=np.uint8)
    blocks[:, 192:208] = 16
    blocks[:, 208:] = np.frombuffer(np.float16(0.02 / 18 / 16).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
