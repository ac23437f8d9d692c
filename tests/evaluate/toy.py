"""A small decoder with random weights, and a tokenizer small enough to train in a test."""

from __future__ import annotations

import torch

from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


def toy_decoder(seed: int = 0, **changes: object) -> Decoder:
    values: dict = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    } | changes
    torch.manual_seed(seed)
    return Decoder(ModelConfig(**values)).eval()


def tokens(count: int, seed: int = 0, vocab: int = 320) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count,), generator=generator).tolist()
