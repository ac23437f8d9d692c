"""Every loader on small files, and their errors."""

from __future__ import annotations

import json

import pytest

from serval.data.sources import documents, split_of
from serval.errors import ConfigError, DataError


def test_standard_library_comes_without_tests_in_a_fixed_order() -> None:
    first, second = documents("stdlib"), documents("stdlib")
    heads = [next(first) for _ in range(5)]
    assert heads == [next(second) for _ in range(5)]
    assert all(len(text) > 200 for text in heads)


def test_folder_reads_text_and_passes_over_the_rest(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    (tmp_path / "empty.txt").write_text("  \n")
    assert list(documents("folder", str(tmp_path))) == ["beta", "alpha"]


def test_folder_without_text_is_an_error_that_names_it(tmp_path) -> None:
    with pytest.raises(DataError, match=f"no text in folder '{tmp_path}'"):
        list(documents("folder", str(tmp_path)))
    with pytest.raises(DataError, match="is not a folder"):
        list(documents("folder", str(tmp_path / "nowhere")))


def test_jsonl_takes_the_field_and_names_bad_lines(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"body": "one"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    assert list(documents("jsonl", str(path), "body")) == ["one", "two"]
    with pytest.raises(DataError, match=r"x\.jsonl:1: no text field 'text' \(found: body\)"):
        list(documents("jsonl", str(path)))
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not valid JSON"):
        list(documents("jsonl", str(path)))


def test_parquet_file_and_folder(tmp_path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow (extra: data) is not installed")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", "", "two"]}), tmp_path / "a.parquet")
    assert list(documents("parquet", str(tmp_path))) == ["one", "two"]
    assert list(documents("parquet", str(tmp_path / "a.parquet"))) == ["one", "two"]
    with pytest.raises(DataError, match="no column 'body'; its columns: text"):
        list(documents("parquet", str(tmp_path), "body"))


def test_hugging_face_data_set_from_a_local_directory(tmp_path) -> None:
    pytest.importorskip("datasets", reason="datasets (extra: data) is not installed")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    assert list(documents("huggingface", str(tmp_path))) == ["one"]


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown data source 'web'; choose one of: stdlib"):
        next(documents("web"))
    with pytest.raises(ConfigError, match="needs a path"):
        next(documents("jsonl"))


def test_split_depends_on_the_text_alone_and_keeps_its_share() -> None:
    texts = [f"document {i}" for i in range(4000)]
    held = [t for t in texts if split_of(t, 0.1) == "validation"]
    assert 300 < len(held) < 500
    assert all(split_of(t, 0.2) == "validation" for t in held)
