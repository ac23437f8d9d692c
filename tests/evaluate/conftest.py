from __future__ import annotations

from pathlib import Path

import pytest

from serval.data.tokenizer import save_tokenizer, train_tokenizer
from serval.models import checkpoint
from tests.evaluate.toy import toy_decoder

TEXT = """
def read(path):
    with open(path) as file:
        return file.read()

class Reader:
    def __init__(self, path):
        self.path = path
"""


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of text documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.py").write_text(TEXT.replace("path", f"path_{number}") * 6)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint with random weights and a trained tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = [TEXT, "The code of red fox is 123456.\n" * 3, "the cat = dog\n" * 9]
    tokenizer = train_tokenizer(alphabet, 300)
    decoder = toy_decoder(vocab_size=300, max_position_embeddings=512, eos_token_id=2)
    checkpoint.save(decoder, folder)
    save_tokenizer(tokenizer, folder, 512)
    return folder
