"""Calibration tokens: from text, from the model itself, or random.

    text: windows of documents drawn with a seed; documents shorter than a window are joined
    self: the model continues its first token at temperature 1 (data-free, arXiv 2305.17888)
    random: tokens drawn evenly from the vocabulary (FPTQ, arXiv 2308.15987, table 6)

Sequences start as the model expects: with the tokens that its tokenizer puts before a text, or the
config's `bos_token_id`. First tokens draw most of the attention and carry the largest activations
in many models; static scales that never saw them clip them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from serval.cache.memory import PagedMemory, cache_budget
from serval.data.options import DataOptions
from serval.data.sources import documents, source_state, split_of
from serval.data.tokenizer import load_tokenizer
from serval.errors import ConfigError, DataError
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder

SELF, RANDOM, STDLIB = "self", "random", "stdlib"

_CHARACTERS_PER_TOKEN = 12  # more than text has: what is encoded of a document to fill a window


@dataclass(frozen=True)
class Calibration:
    """Which tokens a recipe is calibrated on.

    source: "self", "random", "stdlib" (the standard library without what is held out for
    evaluation), or a text file, JSONL or Parquet file or folder. samples, length: sequences, and
    tokens of each. field: which one of JSONL or Parquet holds the text.
    """

    source: str = STDLIB
    samples: int = 64
    length: int = 512
    field: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ConfigError(
                f"calibration needs at least one sample of two tokens, got samples={self.samples} "
                f"and length={self.length}"
            )

    def state(self) -> str:
        """Changes when the text at a path does."""
        if self.source in (SELF, RANDOM, STDLIB):
            return self.source
        return source_state(self.source)

    def tokens(
        self, config: ModelConfig, model_dir: Path, load: Callable[[], Decoder]
    ) -> list[Tensor]:
        """int64 [length] each, at most the model's positions; fewer or shorter ones when the text
        is short. load: gives the float model, called for "self" only. Raises DataError for text
        that is missing or empty."""
        length = min(self.length, config.max_position_embeddings)
        if self.source == RANDOM:
            return random_tokens(config, self.samples, length, self.seed)
        if self.source == SELF:
            return own_tokens(load(), self.samples, length, self.seed)
        return text_tokens(self._texts(), load_tokenizer(model_dir), self, length)

    def _texts(self) -> list[str]:
        if self.source == STDLIB:
            held_out = DataOptions.model_validate({}).validation_fraction
            return [text for text in documents(STDLIB) if split_of(text, held_out) == "train"]
        path = Path(self.source).expanduser()
        if not path.exists():
            raise DataError(
                f"calibration text {self.source!r} does not exist; give a text file, a .jsonl or "
                f".parquet file, a folder, or one of: {STDLIB}, {SELF}, {RANDOM}"
            )
        kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix.lower(), "folder")
        if path.is_file() and kind == "folder":
            texts = [path.read_text(encoding="utf-8", errors="replace")]
        else:
            texts = list(documents(kind, str(path), self.field))
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise DataError(f"calibration text {self.source!r} is empty; give some text")
        return texts


def text_tokens(
    texts: Sequence[str], tokenizer: Any, calibration: Calibration, length: int
) -> list[Tensor]:
    """Windows of `length` tokens, each from a document of its own where they are long enough. The
    documents are taken in random order, again from the start when they run out."""
    prefix = [int(token) for token in tokenizer("").input_ids]
    prefix = prefix[: length - 1]
    end = tokenizer.eos_token_id
    room = length - len(prefix)
    random = Random(calibration.seed)
    made: list[Tensor] = []
    window: list[int] = []
    pieces = _pieces(texts, tokenizer, room, random)
    seen = 0
    while len(made) < calibration.samples:
        piece = next(pieces)
        seen += 1
        window += piece if end is None or len(piece) >= room else [*piece, end]
        if len(window) >= room:
            made.append(torch.tensor(prefix + window[:room]))
            window = []
        elif seen >= len(texts) and not made:  # all the text there is
            made.append(torch.tensor(prefix + window))
            break
    return made


def _pieces(texts: Sequence[str], tokenizer: Any, room: int, random: Random) -> Iterator[list[int]]:
    """Tokens of documents, at most `room` of each from a random place; endless."""
    while True:
        for index in random.sample(range(len(texts)), len(texts)):
            text, characters = texts[index], room * _CHARACTERS_PER_TOKEN
            start = random.randrange(max(1, len(text) - characters // 2))
            start = 0 if start < characters // 8 else text.find("\n", start) + 1
            part = text[start : start + characters]
            yield [
                int(t)
                for t in tokenizer(part, add_special_tokens=False, verbose=False).input_ids[:room]
            ]


def random_tokens(config: ModelConfig, samples: int, length: int, seed: int = 0) -> list[Tensor]:
    """Sequences of tokens drawn evenly from the vocabulary, after the config's first token."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(config.vocab_size, (samples, length), generator=generator)
    if config.bos_token_id is not None:
        drawn[:, 0] = config.bos_token_id
    return list(drawn)


@torch.inference_mode()
def own_tokens(decoder: Decoder, samples: int, length: int, seed: int = 0) -> list[Tensor]:
    """Sequences sampled from the model at temperature 1, all at once, after the config's first
    token, or without one after a random token."""
    config = decoder.config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(samples, length, dtype=torch.int64)
    tokens[:, 0] = torch.randint(config.vocab_size, (samples,), generator=generator)
    if config.bos_token_id is not None:
        tokens[:, 0] = config.bos_token_id
    cache = _Lockstep(decoder, samples, length)
    for step in range(length - 1):
        logits = decoder.logits(decoder(tokens[:, step], cache.batch())).float()
        tokens[:, step + 1] = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(
            1
        )
    return list(tokens)


BLOCK_SIZE = 32


class _Lockstep:
    """A paged cache of sequences that grow together, one block table each for every layer."""

    def __init__(self, decoder: Decoder, samples: int, length: int) -> None:
        blocks = samples * -(-length // BLOCK_SIZE)
        specs, dtype = decoder.trunk_attention_layers, decoder.norm.weight.dtype
        self.memory = PagedMemory.of(
            decoder,
            "full",
            cache_bytes=cache_budget(
                specs, "full", dtype, blocks=blocks, block_size=BLOCK_SIZE, sequences=samples
            ),
            max_model_len=length,
            block_size=BLOCK_SIZE,
            prefix_caching=False,
            max_sequences=samples,
        )
        self.caches = [self.memory.manager.create() for _ in range(samples)]

    def batch(self) -> PackedBatch:
        """The next token of each sequence."""
        for cache in self.caches:
            self.memory.manager.append(cache, 1)
        return self.memory.batch(self.caches, [1] * len(self.caches))
