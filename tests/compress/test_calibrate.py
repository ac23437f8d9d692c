from __future__ import annotations

import json

import pytest
import torch

from serval.compress.calibrate import Calibration, own_tokens
from serval.data.tokenizer import save_tokenizer, train_tokenizer
from serval.errors import ConfigError, DataError
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder


def unused():
    raise AssertionError("the model was loaded")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    text = " ".join(f"word{i} and number {i * i};\n" for i in range(400))
    save_tokenizer(train_tokenizer([text], 300), directory, 128)
    return directory


def test_text_gives_windows_of_the_length_asked_for(model_dir, tmp_path):
    config = decoder().config
    (tmp_path / "a.txt").write_text("word1 and number 7;\n" * 300)
    (tmp_path / "b.txt").write_text("short")
    for source in (tmp_path, tmp_path / "a.txt"):
        made = Calibration(str(source), samples=5, length=40).tokens(config, model_dir, unused)
        assert [len(tokens) for tokens in made] == [40] * 5
        again = Calibration(str(source), samples=5, length=40).tokens(config, model_dir, unused)
        assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"number {i};"}) + "\n" for i in range(30)))
    made = Calibration(str(rows), samples=2, length=20, field="body").tokens(
        config, model_dir, unused
    )
    assert [len(tokens) for tokens in made] == [20, 20]


def test_short_text_gives_one_short_sample(model_dir, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word3 and number 9;")
    made = Calibration(str(path), samples=4, length=100).tokens(decoder().config, model_dir, unused)
    assert len(made) == 1
    assert 2 <= len(made[0]) < 40


def test_long_texts_are_cut_without_a_word(model_dir, tmp_path, caplog, capfd):
    from transformers.utils import logging

    (tmp_path / "a.txt").write_text("word1 and number 7;\n" * 3000)
    logging.enable_propagation()
    try:
        Calibration(str(tmp_path / "a.txt"), samples=2, length=200).tokens(
            decoder().config, model_dir, unused
        )
    finally:
        logging.disable_propagation()
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_windows_start_with_what_the_tokenizer_puts_first(model_dir, tmp_path):
    settings = json.loads((model_dir / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    text = tmp_path / "a.txt"
    text.write_text("word1 and number 7;\n" * 300)
    made = Calibration(str(text), samples=3, length=16).tokens(decoder().config, tmp_path, unused)
    assert all(tokens[0] == 0 and len(tokens) == 16 for tokens in made)
    assert all((tokens[1:] != 0).all() for tokens in made)


def test_missing_or_empty_text_is_refused(model_dir, tmp_path):
    config = decoder().config
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(DataError, match=r"empty.txt' is empty"):
        Calibration(str(empty)).tokens(config, model_dir, unused)
    with pytest.raises(DataError, match="does not exist"):
        Calibration(str(tmp_path / "none")).tokens(config, model_dir, unused)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        Calibration(str(tmp_path / "empty.jsonl")).tokens(config, model_dir, unused)
    with pytest.raises(ConfigError, match="at least one sample"):
        Calibration(samples=0)


def test_random_tokens_follow_the_first_token(model_dir):
    config = decoder(bos_token_id=3).config
    made = torch.stack(Calibration("random", 6, 4000).tokens(config, model_dir, unused))
    assert made.shape == (6, 128)
    assert (made[:, 0] == 3).all()
    assert made.max() > 150


@pytest.mark.parametrize("make", [decoder, mla_decoder])
def test_own_tokens_are_those_the_model_finds_likely(make):
    model = make()
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    head.weight.data.mul_(5.0)  # a confident model
    made = own_tokens(model, samples=3, length=40)
    assert [len(tokens) for tokens in made] == [40] * 3
    with torch.no_grad():
        hidden = model(torch.cat(made), PackedBatch.from_lengths([40] * 3))
        likely = model.logits(hidden).log_softmax(-1).view(3, 40, -1)
    tokens = torch.stack(made)
    own = likely[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    shuffled = likely[:, :-1].gather(-1, tokens[:, 1:, None].roll(7, 1)).mean()
    assert own > shuffled + 1
