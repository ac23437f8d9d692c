"""A tokenised corpus: one flat array of token ids and the documents' boundaries.

Held in memory, or in a memory-mapped file when a directory is given, so that a corpus larger than
memory trains as well. The file is keyed by the tokenizer and the source, written under a temporary
name and renamed: an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from serval.errors import DataError

_CHUNK = 256


class Corpus:
    """tokens: uint32 [total], starts: int64 [documents + 1]."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens, self.starts = tokens, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, index: int) -> np.ndarray:
        """Tokens [length] of one document, a view in the corpus's dtype, its end token included."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Tokenizer, end_token: int, path: Path | None = None
    ) -> Corpus:
        """Tokenise documents, each closed by `end_token`. With `path`, the tokens go to that file.

        Raises DataError when there is no document.
        """
        if path is not None and path.exists() and path.with_suffix(".starts.npy").exists():
            return cls.open(path)
        lengths = array("q", [0])
        if path is None:
            buffer = array("I")
            for ids in _encode(texts, tokenizer, end_token):
                buffer.extend(ids)
                lengths.append(len(ids))
            tokens = np.frombuffer(buffer, dtype=np.uint32) if len(buffer) else np.empty(0, "u4")
            return cls._checked(tokens, lengths)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as out:
                for ids in _encode(texts, tokenizer, end_token):
                    out.write(np.asarray(ids, dtype=np.uint32).tobytes())
                    lengths.append(len(ids))
            if len(lengths) == 1:
                raise DataError("the corpus has no documents; check the data source")
            np.save(path.with_suffix(".starts.npy"), np.cumsum(np.frombuffer(lengths, "i8")))
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Corpus:
        tokens = np.memmap(path, dtype=np.uint32, mode="r")
        return cls(tokens, np.load(path.with_suffix(".starts.npy")))

    @classmethod
    def _checked(cls, tokens: np.ndarray, lengths: array) -> Corpus:
        if len(lengths) == 1:
            raise DataError("the corpus has no documents; check the data source")
        return cls(tokens, np.cumsum(np.frombuffer(lengths, "i8")))


def _encode(texts: Iterable[str], tokenizer: Tokenizer, end_token: int) -> Iterator[list[int]]:
    source = iter(texts)
    while chunk := list(islice(source, _CHUNK)):
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            yield [*encoding.ids, end_token]
