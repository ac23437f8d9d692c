"""A small tokenizer shared by the tests of the data room."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from serval.data.tokenizer import train_tokenizer
from serval.data.words import key_names


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    numbers = " ".join(f"{n:03d}" for n in range(1000))
    return train_tokenizer([numbers, "\n".join(key_names()), "The code of it is\n"] * 3, 1800)
