"""Tokenizer training, the saved layout, and what the format promises."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from serval.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from serval.errors import ConfigError, DataError


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_numbers_split_by_three_whatever_stands_around(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("482917").tokens == ["482", "917"]
    assert tokenizer.encode(" 482917.").tokens[1:3] == ["482", "917"]
    assert tokenizer.encode("4829").tokens[0] == "482"


def test_saved_tokenizer_loads_in_transformers_with_its_chat_template(tokenizer, tmp_path) -> None:
    save_tokenizer(tokenizer, tmp_path, max_length=512)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x + 482917\n"
    assert ours(text).input_ids == theirs(text).input_ids == tokenizer.encode(text).ids
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.model_max_length == 512


def test_too_small_vocabulary_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size is 100"):
        train_tokenizer(["x"], 100)


def test_too_little_text_says_how_far_it_reaches() -> None:
    with pytest.raises(DataError, match="only supports"):
        train_tokenizer(["ab"], 5000)


def test_missing_tokenizer_names_the_directory(tmp_path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
