"""Supervised fine-tuning data: conversations or prompt and completion, one JSON object per line.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}

Conversations go through the model's chat template. What the assistant says, and its end of turn,
is to be predicted; everything else is context (weight 0) unless `mask_prompt` is off. Each document
ends in the end-of-text token. Documents are packed whole into rows of at most `row_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from serval.data.packing import Document
from serval.data.sources import split_of
from serval.errors import DataError

Format = Literal["auto", "chat", "completion"]
_OPEN_ROWS = 16  # rows that a document may still be put into


@dataclass
class Instructions:
    """Tokenised documents of a split. cut: documents shortened to the row; dropped: documents of
    which nothing to predict was left."""

    documents: list[tuple[np.ndarray, np.ndarray]]
    cut: int = 0
    dropped: int = 0


class Encoder:
    """Turns one JSON object into tokens and loss weights.

    tokenizer: a Hugging Face tokenizer, with a chat template if there are conversations. eos: the
    id that ends a document.
    """

    def __init__(
        self, tokenizer: Any, eos: int, format: Format = "auto", mask_prompt: bool = True
    ) -> None:
        self.tokenizer, self.eos = tokenizer, eos
        self.format, self.mask_prompt = format, mask_prompt

    def encode(self, row: Any, where: str) -> Document:
        """(token ids, weights) of a row; raises DataError naming `where`."""
        kind = self.format
        if kind == "auto":
            kind = "chat" if isinstance(row, dict) and "messages" in row else "completion"
        if kind == "chat":
            pieces = self._conversation(row, where)
        else:
            pieces = self._completion(row, where)
        tokens: list[int] = []
        weights: list[float] = []
        for ids, predicted in pieces:
            tokens += ids
            weights += [1.0 if predicted or not self.mask_prompt else 0.0] * len(ids)
        if tokens and tokens[-1] != self.eos:
            tokens.append(self.eos)
            weights.append(weights[-1])
        return tokens, weights

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _completion(self, row: Any, where: str) -> list[tuple[list[int], bool]]:
        for key in ("prompt", "completion"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{where}: expected texts 'prompt' and 'completion', or a list 'messages'; "
                    f"found: {found}"
                )
        prompt = self._ids(row["prompt"], special=True)  # as the server encodes a prompt
        while prompt and prompt[-1] == self.eos:  # some tokenizers close every text
            prompt.pop()
        return [(prompt, False), (self._ids(row["completion"]), True)]

    def _conversation(self, row: Any, where: str) -> list[tuple[list[int], bool]]:
        messages = _messages(row, where)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{where}: the conversation has no message of the assistant to learn")
        tools = row.get("tools")
        text = self._template(messages, tools, False, where)
        spans = self._spans(messages, tools, turns, text, where)
        if spans is None:  # a template that rewrites earlier turns (hidden reasoning)
            spans = self._spans(messages, tools, turns[-1:], text, where)
        if spans is None:
            raise DataError(
                f"{where}: the chat template does not put the assistant's turn after its own "
                "generation prompt; what to predict cannot be told. Set data.chat_template"
            )
        pieces, at = [], 0
        for start, end in spans:
            pieces += [(self._ids(text[at:start]), False), (self._ids(text[start:end]), True)]
            at = end
        rest = self._ids(text[at:]) if text[at:].strip() else []  # a closing newline, dropped
        return [*pieces, (rest, False)] if rest else pieces

    def _spans(
        self, messages: list[dict[str, Any]], tools: Any, turns: list[int], text: str, where: str
    ) -> list[tuple[int, int]] | None:
        """Where in `text` the assistant's `turns` are; None if earlier text does not stay."""
        spans = []
        eos = self.tokenizer.eos_token or ""
        for turn in turns:
            before = self._template(messages[:turn], tools, True, where)
            after = self._template(messages[: turn + 1], tools, False, where)
            if not (after.startswith(before) and text.startswith(after)):
                return None
            said = after[len(before) :]
            if eos and said.rstrip().endswith(eos):
                said = said.rstrip()  # what follows the end of a turn is not the assistant's
            spans.append((len(before), len(before) + len(said)))
        return spans

    def _template(
        self, messages: list[dict[str, Any]], tools: Any, generate: bool, where: str
    ) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{where}: a conversation, but the model's tokenizer has no chat template; give a "
                "Jinja file as data.chat_template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=generate, tokenize=False
            )
        except Exception as error:  # a template may raise anything on what it does not expect
            raise DataError(f"{where}: the chat template refused it: {error}") from error


def _messages(row: Any, where: str) -> list[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a non-empty list 'messages'")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message is an object with a role, got {message!r:.80}")
    return messages


def read_rows(path: str | Path) -> Iterator[tuple[str, str, Any]]:
    """(where, line, object) of each line of a JSONL file; raises DataError naming the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; expected a JSONL file") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, line, json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON ({error})") from error


def read_instructions(
    path: str | Path,
    encoder: Encoder,
    row_tokens: int,
    split: Literal["train", "validation"] | None = None,
    validation_fraction: float = 0.0,
) -> Instructions:
    """Tokenise a file, or the part of it that a hash of each line sends to `split`.

    Documents longer than `row_tokens` are cut at their end. Raises DataError naming the line.
    """
    found = Instructions([])
    for where, line, row in read_rows(path):
        if split is not None and split_of(line, validation_fraction) != split:
            continue
        tokens, weights = encoder.encode(row, where)
        found.cut += len(tokens) > row_tokens
        kept = weights[1:row_tokens]  # nothing predicts a document's first token
        if not any(kept):
            found.dropped += 1
            continue
        document = (
            np.array(tokens[:row_tokens], dtype=np.int32),
            np.array(weights[:row_tokens], dtype=np.float32),
        )
        found.documents.append(document)
    return found


class InstructionStream:
    """An endless, resumable stream of packed rows (`serval.train.stream.TokenStream`).

    Every epoch has its own order, drawn from (seed, epoch), and holds each document once. Rows are
    filled first-fit and never padded: they have at most `row_tokens` tokens.
    """

    def __init__(
        self, documents: Sequence[tuple[np.ndarray, np.ndarray]], row_tokens: int, seed: int
    ) -> None:
        if not documents:
            raise DataError("there is no document to train on")
        self.documents, self.row_tokens, self.seed = documents, row_tokens, seed
        self.epoch = self.place = 0
        self._rows = self._pack()

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the current epoch."""
        return len(self._rows)

    def next(self) -> tuple[Tensor, list[int], Tensor]:
        """(tokens int64 [T], document lengths, weights float32 [T]), T <= row_tokens."""
        if self.place == len(self._rows):
            self.epoch, self.place = self.epoch + 1, 0
            self._rows = self._pack()
        chosen = [self.documents[i] for i in self._rows[self.place]]
        self.place += 1
        tokens = np.concatenate([tokens for tokens, _ in chosen]).astype(np.int64)
        weights = np.concatenate([weights for _, weights in chosen])
        lengths = [len(tokens) for tokens, _ in chosen]
        return torch.from_numpy(tokens), lengths, torch.from_numpy(weights)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]
        self._rows = self._pack()

    def _pack(self) -> list[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
        rows: list[list[int]] = []
        room: list[int] = []
        for index in order.tolist():
            need = len(self.documents[index][0])
            first = max(0, len(rows) - _OPEN_ROWS)
            row = next((r for r in range(first, len(rows)) if room[r] >= need), None)
            if row is None:
                rows.append([])
                room.append(self.row_tokens)
                row = len(rows) - 1
            rows[row].append(index)
            room[row] -= need
        return rows
