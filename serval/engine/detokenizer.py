"""Tokens to text, one token at a time.

A character may be spread over several tokens, so text is given out only up to the last complete
character; the pieces joined always equal the text of all tokens decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

REPLACEMENT = "\ufffd"
_LONG = 12  # pending tokens from which the window is cut although it still ends inside a character


def decode_function(tokenizer: Any, skip_special_tokens: bool = True) -> Callable[[Any], str]:
    """The cheapest exact `decode(list of ids) -> str` of a Hugging Face tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """Incremental decoding of one output.

    The window holds a few tokens that are already out (so that decoders which look at their left
    neighbour, as sentencepiece's leading space, see one) and the pending ones after them.
    """

    def __init__(self, decode: Callable[[Any], str]) -> None:
        self._decode = decode
        self.text = ""
        self._window: list[int] = []
        self._settled = 0  # tokens of the window whose text is out
        self._settled_text = ""  # their text
        self._given = 0  # characters of the pending text that are out

    def copy(self) -> Detokenizer:
        """An independent detokenizer in the same state."""
        other = Detokenizer(self._decode)
        other.__dict__.update(self.__dict__)
        other._window = list(self._window)
        return other

    def add(self, token: int) -> str:
        """Take one token; returns the text that became certain (possibly empty)."""
        self._window.append(token)
        text = self._decode(self._window)
        pending = text[len(self._settled_text) :]
        # An unfinished character decodes to one replacement mark at the very end.
        certain = pending[:-1] if pending.endswith(REPLACEMENT) else pending
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        self.text += new
        if len(certain) == len(pending):
            self._settle(len(self._window))
        elif len(self._window) - self._settled > _LONG:
            self._cut()
        return new

    def finish(self) -> str:
        """No more tokens come: returns what was held back."""
        pending = self._decode(self._window)[len(self._settled_text) :]
        new = pending[self._given :]
        self._given = len(pending)
        self.text += new
        return new

    def _settle(self, count: int) -> None:
        """The text of the first `count` window tokens is out: keep the last few as context."""
        drop = max(self._settled, count - 4) if count > 8 else 0
        if drop and not self._splits(drop):
            drop = 0
        self._window = self._window[drop:]
        self._settled = count - drop
        self._settled_text = self._decode(self._window[: self._settled])
        self._given = 0

    def _splits(self, at: int) -> bool:
        """Whether a character boundary lies before window token `at`."""
        head = self._decode(self._window[:at])
        return not head.endswith(REPLACEMENT)

    def _cut(self) -> None:
        """Many pending tokens without a clean end (invalid bytes): settle at a safe boundary."""
        whole = self._decode(self._window)
        for count in range(len(self._window) - 4, self._settled, -1):
            head = self._decode(self._window[:count])
            tail = self._decode(self._window[count:])
            if head + tail == whole:
                out = len(self._settled_text) + self._given
                self._window = self._window[count:]
                self._settled, self._settled_text = 0, ""
                self._given = out - len(head)
                return


def find_stop(text: str, start: int, stops: list[str]) -> tuple[int, str] | None:
    """The earliest stop string that ends after `start` characters: (its position, the string)."""
    best: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(0, start - len(stop) + 1))
        if at >= 0 and (best is None or at < best[0]):
            best = (at, stop)
    return best


def held_back(text: str, stops: list[str]) -> int:
    """Characters at the end of `text` that may be the start of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
