"""A tokenizer of 600 entries with a chat template, trained on a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serval.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

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
