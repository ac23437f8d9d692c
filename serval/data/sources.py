"""Where documents come from: the standard library, folders, JSONL, Parquet, Hugging Face data sets.

A source is an iterable of text documents in a fixed order. `split_of` sends a document to training
or validation by a hash of its own text, so that a split never depends on order or on other files.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serval.errors import ConfigError, DataError, MissingExtraError
from serval.registry import Entry

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".html", ".c", ".h", ".cpp", ".js", ".tex"}
_STDLIB_SKIP = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}


def stdlib(path: str | None = None, **_: Any) -> Iterator[str]:
    """The Python standard library's sources, sorted by path; tests and vendored parts left out."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if _STDLIB_SKIP.isdisjoint(file.relative_to(root).parts[:-1]):
            text = _read(file)
            if len(text) > 200:
                yield text


def folder(path: str, **_: Any) -> Iterator[str]:
    """Every text file below a folder, sorted by path."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"data path {path!r} is not a folder; give a folder of text files")
    found = False
    for file in sorted(root.rglob("*")):
        if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES:
            text = _read(file)
            if text.strip():
                found = True
                yield text
    if not found:
        kinds = ", ".join(sorted(TEXT_SUFFIXES))
        raise DataError(f"no text in folder {path!r}: expected non-empty files ending in {kinds}")


def jsonl(path: str, field: str = "text", **_: Any) -> Iterator[str]:
    """One JSON object per line; `field` holds the text."""
    try:
        handle = open(path, encoding="utf-8")  # noqa: SIM115 closed by the with below
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {error.strerror}") from error
    with handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error.msg})") from error
            yield _field(row, field, f"{path}:{number}")


def parquet(path: str, field: str = "text", **_: Any) -> Iterator[str]:
    """A Parquet file or a folder of them; column `field` holds the text."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    target = Path(path)
    files = sorted(target.rglob("*.parquet")) if target.is_dir() else [target]
    if not files or not files[0].exists():
        raise DataError(f"no Parquet file at {path!r}")
    for file in files:
        table = pq.ParquetFile(file)
        if field not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise DataError(f"{file} has no column {field!r}; its columns: {names}")
        for batch in table.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                if value:
                    yield value


def huggingface(path: str, field: str = "text", split: str = "train", **_: Any) -> Iterator[str]:
    """A Hugging Face data set by name or local directory, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    try:
        rows = datasets.load_dataset(path, split=split, streaming=True)
    except Exception as error:
        raise DataError(f"cannot load data set {path!r} ({split}): {error}") from error
    for number, row in enumerate(rows):
        yield _field(row, field, f"{path}[{number}]")


SOURCES: dict[str, Entry] = {
    "stdlib": Entry("serval.data.sources:stdlib", "sources of the Python standard library"),
    "folder": Entry("serval.data.sources:folder", "text files below a folder"),
    "jsonl": Entry("serval.data.sources:jsonl", "JSON lines with a text field"),
    "parquet": Entry("serval.data.sources:parquet", "Parquet files with a text column"),
    "huggingface": Entry("serval.data.sources:huggingface", "a Hugging Face data set"),
}


def check_source(kind: str, path: str | None = None, field: str = "text") -> None:
    """Raises ConfigError for an unknown source, a missing path, or a field the source has not."""
    if kind not in SOURCES:
        raise ConfigError(f"unknown data source {kind!r}; choose one of: {', '.join(SOURCES)}")
    if path is None and kind != "stdlib":
        raise ConfigError(f"data source {kind!r} needs a path")
    if field != "text" and not _takes_field(kind):
        able = ", ".join(name for name in SOURCES if _takes_field(name))
        raise ConfigError(
            f"data.field is {field!r}, but source {kind!r} reads whole files; leave it out "
            f"(sources with fields: {able})"
        )


def _takes_field(kind: str) -> bool:
    return "field" in inspect.signature(SOURCES[kind].load()).parameters


def source_state(path: str | None) -> str:
    """A digest of the files at `path` (None: the standard library) by name, size and time; of
    nothing for a name that is no local file or folder."""
    root = Path(path or sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            stat = file.stat()
            name = file.relative_to(root)
            digest.update(f"{name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def documents(kind: str, path: str | None = None, field: str = "text") -> Iterator[str]:
    """Iterate the documents of source `kind`; raises ConfigError for an unknown kind, DataError
    for a source that cannot be read or holds no text."""
    check_source(kind, path, field)
    loader: Callable[..., Iterator[str]] = SOURCES[kind].load()
    count = 0
    for text in loader(path, field=field) if path is not None else loader():
        count += 1
        yield text
    if count == 0:
        raise DataError(f"data source {kind!r} ({path or 'default path'}) holds no text")


def split_of(text: str, validation_fraction: float) -> str:
    """ "train" or "validation", decided by the document's own hash."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    held_out = int.from_bytes(digest[:8], "big") < validation_fraction * 2**64
    return "validation" if held_out else "train"


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: no text field {field!r} (found: {keys}); name it with data.field, or with "
            "--text-field of `serval eval`"
        )
    return row[field]
