"""Model shapes that speed is measured at, and their random weights.

Speed does not depend on the values of dense weights, so they are a repeated block of normal
numbers: a model of a billion parameters is ready in seconds. Quality is never measured on these.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from serval.models.config import ModelConfig, RopeConfig

LLAMA_1B = ModelConfig(  # meta-llama/Llama-3.2-1B
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
)

TINY = ModelConfig(  # what --quick runs; llama.cpp's Q8_0 needs rows of a multiple of 32
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    max_position_embeddings=1024,
    rope=RopeConfig(
        kind="llama3",
        theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    ),
    tie_word_embeddings=True,
)

SHAPES: dict[str, ModelConfig] = {
    "llama-1b": LLAMA_1B,
    "llama-1b-2of16layers": replace(LLAMA_1B, num_hidden_layers=2),
    "tiny": TINY,
}


def cache_directory() -> Path:
    """Where benchmark files live: $SERVAL_BENCH_DIR, else ~/.cache/serval/bench."""
    path = Path(os.environ.get("SERVAL_BENCH_DIR", "~/.cache/serval/bench")).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def linear_parameters(config: ModelConfig) -> int:
    """Weights that multiply every token: the layers' matrices, without embedding and head."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * heads
    return config.num_hidden_layers * (
        attention + 3 * config.hidden_size * config.intermediate_size
    )


def head_parameters(config: ModelConfig) -> int:
    """Weights of the language-model head."""
    return config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of causal attention over a prompt of `length` tokens, all layers."""
    assert config.head_dim is not None
    pairs = length * (length + 1) / 2
    return 4.0 * config.num_attention_heads * config.head_dim * pairs * config.num_hidden_layers


def key_value_elements(config: ModelConfig) -> int:
    """Numbers the KV cache holds per token, all layers."""
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def random_block(elements: int = 1 << 20, std: float = 0.02, seed: int = 0) -> np.ndarray:
    """float32 [elements], normal; an odd length, so that rows of a matrix differ."""
    return np.random.default_rng(seed).normal(0.0, std, elements - 3).astype(np.float32)


@torch.no_grad()
def fill_parameters(model: nn.Module) -> None:
    """Fill matrices from a repeated random block, norms with ones; parameters without storage get
    one."""
    block = torch.from_numpy(random_block())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                parameter = nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                setattr(module, name, parameter)
            if parameter.dim() > 1:
                fill_tensor(parameter, block)
            else:
                parameter.fill_(1.0)


@torch.no_grad()
def fill_tensor(tensor: Tensor, block: Tensor) -> None:
    """Copy `block` over and over into a contiguous tensor."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
