"""The `data` section of a recipe, and building tokenizer and streams from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random

from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from serval.data.chat import ChatDocuments
from serval.data.corpus import Corpus
from serval.data.packing import Document, Maker, PackedStream, Part
from serval.data.sources import check_source, documents, source_state, split_of
from serval.data.synthetic import TRAINING_TASKS, Encode, Filler, make_sample, training_document
from serval.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from serval.data.words import NOUNS, key_names
from serval.errors import ConfigError, DataError


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TokenizerOptions(_Options):
    """Train a tokenizer of `vocab_size` on the training text, or load one from `path`."""

    path: str | None = None
    vocab_size: int = 8192


class PartOptions(_Options):
    """A generated part: its share of all tokens, the lengths of its documents in tokens, and the
    weight of answers (assistant turns in conversations) in the loss."""

    share: float = Field(ge=0, le=1)
    min_length: int = Field(64, ge=32)
    max_length: int = Field(2048, ge=32)
    answer_weight: float = Field(1.0, gt=0)


class DataOptions(_Options):
    """Where tokens come from.

    source, path, field: see `serval.data.sources`. tasks: generated long-context tasks by name.
    chat: share of conversations. cache: folder for the tokenised corpus (default: in memory).
    """

    source: str = "stdlib"
    path: str | None = None
    field: str = "text"
    row_tokens: int = Field(2048, ge=64)
    validation_fraction: float = Field(0.02, gt=0, lt=1)
    validation_rows: int = Field(16, ge=1)
    tokenizer: TokenizerOptions = TokenizerOptions()
    tasks: dict[str, PartOptions] = {}
    chat: PartOptions | None = None
    length_warmup_rows: int = Field(0, ge=0)
    cache: str | None = None


@dataclass
class Data:
    """A tokenizer, the training stream and the validation stream of a recipe."""

    tokenizer: Tokenizer
    train: PackedStream
    validation: PackedStream


def build(options: DataOptions, seed: int) -> Data:
    """Build tokenizer and streams. Raises ConfigError or DataError naming what is wrong."""
    check_options(options)
    tokenizer = make_tokenizer(options, seed)
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ConfigError(f"the tokenizer has no {END_OF_TEXT} token to close documents with")
    train = _corpus(options, "train", tokenizer, end)
    validation = _corpus(options, "validation", tokenizer, end)
    parts = _parts(options, tokenizer)
    return Data(
        tokenizer,
        PackedStream(train, parts, options.row_tokens, seed, options.length_warmup_rows),
        PackedStream(validation, [], options.row_tokens, seed),
    )


def make_tokenizer(options: DataOptions, seed: int) -> Tokenizer:
    """Load the recipe's tokenizer, or train it on its text and samples of its tasks."""
    if options.tokenizer.path is not None:
        loaded = load_tokenizer(options.tokenizer.path)
        return loaded.backend_tokenizer
    texts: Iterator[str] = _texts(options, "train")
    return train_tokenizer(chain(texts, _task_texts(options, seed)), options.tokenizer.vocab_size)


def held_out_texts(options: DataOptions) -> list[str]:
    """Documents of the validation split, never trained on."""
    return list(_texts(options, "validation"))


def check_options(options: DataOptions) -> None:
    """Raises ConfigError for what can be told to be wrong before any text is read."""
    check_source(options.source, options.path, options.field)
    unknown = sorted(set(options.tasks) - set(TRAINING_TASKS))
    if unknown:
        raise ConfigError(
            f"data.tasks.{unknown[0]}: unknown task; choose: {', '.join(TRAINING_TASKS)}"
        )
    shares = sum(part.share for part in options.tasks.values())
    shares += options.chat.share if options.chat else 0.0
    if shares > 1:
        raise ConfigError(f"data.tasks and data.chat shares add up to {shares:.2f}, above 1")


def _texts(options: DataOptions, split: str) -> Iterator[str]:
    for text in documents(options.source, options.path, options.field):
        if split_of(text, options.validation_fraction) == split:
            yield text


def _corpus(options: DataOptions, split: str, tokenizer: Tokenizer, end: int) -> Corpus:
    path = None
    if options.cache is not None:
        state = source_state(options.path)
        keys = (options.source, options.path, options.field, options.validation_fraction, state)
        digest = hashlib.sha256(f"{tokenizer.to_str()}|{keys}".encode()).hexdigest()[:16]
        path = Path(options.cache) / f"{split}-{digest}.tokens"
    try:
        return Corpus.from_texts(_texts(options, split), tokenizer, end, path)
    except DataError as error:
        raise DataError(
            f"{error} ({split} split; with few documents raise data.validation_fraction, "
            f"now {options.validation_fraction})"
        ) from error


def _task_texts(options: DataOptions, seed: int) -> Iterator[str]:
    """Samples of the tasks, so that keys and numbers become whole tokens."""
    if not options.tasks and options.chat is None:
        return
    for _ in range(24):
        yield " ".join(f"{n:03d}" for n in range(1000))
        for separator in (" ", "\n"):
            yield separator + separator.join(key_names()[:: len(NOUNS) - 1])
    filler = Filler(["pass"], lambda text: [0] * (len(text) // 4))
    for task in options.tasks:
        for index in range(200):
            rng = Random(f"{seed}/{task}/{index}")
            sample = make_sample(task, rng, filler, 1024)
            yield "".join(text for text, _ in sample.context)


def _parts(options: DataOptions, tokenizer: Tokenizer) -> list[Part]:
    if not options.tasks and options.chat is None:
        return []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    filler_texts = list(islice(_texts(options, "train"), 2000))
    filler = Filler(filler_texts, encode)
    parts = []
    for name, part in options.tasks.items():
        parts.append(_part(name, part, _task_maker(name, filler, part.answer_weight)))
    if options.chat is not None:
        chat, answer_weight = ChatDocuments(filler_texts, filler), options.chat.answer_weight

        def make_chat(rng: Random, length: int) -> Document:
            return _encode_pieces(chat.draw(rng, length), encode, length, answer_weight)

        parts.append(_part("chat", options.chat, make_chat))
    return parts


def _part(name: str, part: PartOptions, make: Maker) -> Part:
    return Part(name, part.share, make, part.min_length, max(part.min_length, part.max_length))


def _task_maker(name: str, filler: Filler, answer_weight: float) -> Maker:
    def make(rng: Random, length: int) -> Document:
        return training_document(name, rng, filler, length, answer_weight)

    return make


def _encode_pieces(
    pieces: list[tuple[str, bool]], encode: Encode, length: int, answer_weight: float
) -> Document:
    tokens: list[int] = []
    weights: list[float] = []
    for text, predictable in pieces:
        ids = encode(text)
        tokens += ids
        weights += [answer_weight if predictable else 0.0] * len(ids)
    return tokens[:length], weights[:length]
