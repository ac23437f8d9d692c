"""A tokenizer of 320 entries with a chat template, a random model, and a server with both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serval.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from serval.models import checkpoint
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.server.app import create_app
from serval.server.engine import EngineBackend
from serval.server.state import AppOptions
from tests.server.live import LiveServer

TEXT = (
    "The serval is a wild cat of Africa. It has long legs, large ears and a spotted coat. "
    "Write a list of cats, then say which one can jump the highest. Größe, naïve, 猫 and 🐈.\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([TEXT], 320), directory, max_length=256)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def model_dir(tokenizer_dir: Path) -> Path:
    """The same directory with a random two-layer model beside the tokenizer."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    checkpoint.save(Decoder(config), tokenizer_dir)
    return tokenizer_dir


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[LiveServer]:
    """A server with the real engine on a free port of this machine."""
    backend = EngineBackend.load(str(model_dir), cache_bytes=2**20, max_sequences=16)
    options = AppOptions(model_names=("tiny", "alias"), max_in_flight=200, max_body_bytes=2**20)
    with LiveServer(create_app(backend, options), backend) as live:
        yield live
        live.check_integrity()
