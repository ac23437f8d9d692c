"""Packed rows: full, mixed by share, resumable at any row; corpora in memory and on disk."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.data.corpus import Corpus
from serval.data.options import (
    DataOptions,
    PartOptions,
    TokenizerOptions,
    build,
    held_out_texts,
    make_tokenizer,
)
from serval.data.packing import PackedStream, Part
from serval.data.tokenizer import save_tokenizer
from serval.errors import ConfigError, DataError


def corpus_of(lengths: list[int]) -> Corpus:
    starts = np.cumsum([0, *lengths])
    return Corpus(np.arange(starts[-1], dtype=np.uint32), starts)


def digits(rng: Random, length: int) -> tuple[list[int], list[float]]:
    return [rng.randrange(10) for _ in range(length)], [0.5] * length


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=12),
    row=st.integers(64, 400),
    share=st.floats(0, 0.9),
    rows_before=st.integers(0, 6),
)
def test_stream_fills_rows_and_resumes_exactly(lengths, row, share, rows_before) -> None:
    def make() -> PackedStream:
        return PackedStream(corpus_of(lengths), [Part("digits", share, digits, 32, 128)], row, 7, 4)

    stream = make()
    for _ in range(rows_before):
        stream.next()
    resumed = make()
    resumed.load_state_dict(stream.state_dict())
    for _ in range(4):
        tokens, documents, weights = stream.next()
        assert tokens.shape == weights.shape == (row,)
        assert sum(documents) == row
        again = resumed.next()
        assert torch.equal(tokens, again[0])
        assert documents == again[1]
        assert torch.equal(weights, again[2])


def test_an_epoch_visits_every_document_once() -> None:
    stream = PackedStream(corpus_of([100] * 30), [], 100, 0)
    first = {int(stream.next()[0][0]) for _ in range(30)}
    assert first == set(range(0, 3000, 100))
    order = [int(stream.next()[0][0]) for _ in range(30)]
    assert set(order) == first
    assert order != sorted(order)


def test_shares_are_kept_over_many_rows() -> None:
    parts = [Part("a", 0.3, digits, 32, 64), Part("b", 0.2, digits, 32, 256)]
    stream = PackedStream(corpus_of([1000] * 5), parts, 512, 0)
    for _ in range(60):
        stream.next()
    total = sum(stream.counts.values())
    assert stream.counts["a"] / total == pytest.approx(0.3, abs=0.02)
    assert stream.counts["b"] / total == pytest.approx(0.2, abs=0.02)


def test_corpus_on_disk_equals_corpus_in_memory(tokenizer, tmp_path) -> None:
    texts = ["one two", "three", "four five six"]
    memory = Corpus.from_texts(texts, tokenizer, 0)
    disk = Corpus.from_texts(texts, tokenizer, 0, tmp_path / "c.tokens")
    reopened = Corpus.from_texts([], tokenizer, 0, tmp_path / "c.tokens")
    for other in (disk, reopened):
        assert len(other) == len(memory) == 3
        for i in range(3):
            assert np.array_equal(other.document(i), memory.document(i))
    assert memory.document(1)[-1] == 0


def test_empty_corpus_is_an_error_and_leaves_no_file(tokenizer, tmp_path) -> None:
    with pytest.raises(DataError, match="no documents"):
        Corpus.from_texts([], tokenizer, 0, tmp_path / "c.tokens")
    assert list(tmp_path.iterdir()) == []


def write_folder(path) -> None:
    for i in range(40):
        (path / f"{i}.txt").write_text(f"document {i} says: " + "word " * (20 + i))


def test_build_from_a_folder_with_tasks_and_chat(tmp_path) -> None:
    write_folder(tmp_path)
    options = DataOptions(
        source="folder",
        path=str(tmp_path),
        row_tokens=256,
        validation_fraction=0.2,
        tokenizer=TokenizerOptions(vocab_size=600),
        tasks={"key_value": PartOptions(share=0.3, max_length=200)},
        chat=PartOptions(share=0.2, max_length=200),
    )
    data = build(options, seed=1)
    for _ in range(20):
        tokens, _, _ = data.train.next()
        assert int(tokens.max()) < 600
    assert data.train.counts["key_value"] > 0
    assert data.train.counts["chat"] > 0
    held = held_out_texts(options)
    assert 0 < len(held) < 40


def test_wrong_options_name_their_key(tmp_path) -> None:
    write_folder(tmp_path)
    base = {"source": "folder", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"data\.tasks\.chess: unknown task"):
        build(DataOptions(**base, tasks={"chess": PartOptions(share=0.1)}), 0)
    with pytest.raises(ConfigError, match="above 1"):
        build(
            DataOptions(
                **base, tasks={"mqar": PartOptions(share=0.9)}, chat=PartOptions(share=0.2)
            ),
            0,
        )


def test_generated_documents_grow_over_the_first_rows() -> None:
    def lengths(warmup: int, rows: range) -> list[int]:
        parts = [Part("digits", 0.9, digits, 32, 512)]
        stream = PackedStream(corpus_of([1000] * 5), parts, 2048, 0, length_warmup_rows=warmup)
        made: list[int] = []
        parts[0].make = lambda rng, length: made.append(length) or digits(rng, length)
        for row in range(rows.stop):
            if row == rows.start:
                made.clear()
            stream.next()
        return made

    early, late = lengths(40, range(4)), lengths(40, range(40, 44))
    assert max(early) <= 32 * (512 / 32) ** 0.33  # from a quarter of the way, on a log scale
    assert max(late) > 256
    assert max(lengths(0, range(4))) > 256


def test_a_chat_answer_weighs_what_the_recipe_says(tmp_path) -> None:
    write_folder(tmp_path)
    options = DataOptions(
        source="folder",
        path=str(tmp_path),
        row_tokens=256,
        validation_fraction=0.2,
        tokenizer=TokenizerOptions(vocab_size=400),
        chat=PartOptions(share=1.0, max_length=200, answer_weight=3.0),
    )
    _, _, weights = build(options, seed=1).train.next()
    assert {0.0, 3.0} <= set(weights.tolist()) <= {0.0, 1.0, 3.0}


def test_a_cached_corpus_follows_its_field_and_files(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "word " * (20 + i), "body": "other " * (30 + i)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = DataOptions(
        source="jsonl",
        path=str(path),
        validation_fraction=0.2,
        tokenizer=TokenizerOptions(vocab_size=262),
        cache=str(tmp_path / "cache"),
    )
    tokenizer_dir = tmp_path / "tokenizer"
    save_tokenizer(make_tokenizer(options, 0), tokenizer_dir, 64)
    options.tokenizer.path = str(tokenizer_dir)

    def tokens() -> np.ndarray:
        return build(options, 0).train.corpus.tokens

    first = tokens()
    assert np.array_equal(first, tokens())
    options.field = "body"
    assert not np.array_equal(first, tokens())
    options.field = "text"
    path.write_text("\n".join(map(json.dumps, rows[:30])))
    assert len(tokens()) < len(first)
