"""Output that follows a JSON schema, a regular expression, a list of choices or a Lark grammar.

llguidance (Microsoft, https://github.com/guidance-ai/llguidance) walks the grammar and says which
tokens may come next; the sampler never sees the others.
"""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from serval.engine.params import SamplingParams
from serval.errors import RequestError


class Constraint:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        self._vocab_size = vocab_size

    def allowed(self) -> np.ndarray:
        """bool [vocab_size]: which tokens may come next."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].view(np.bool_)

    def accept(self, token: int) -> bool:
        """Advance by one token; False if the grammar cannot take it."""
        return self._matcher.consume_token(token)

    @property
    def error(self) -> str:
        """Why the matcher gave up (a grammar beyond its limits), or an empty string."""
        return self._matcher.get_error() if self._matcher.is_error() else ""

    @property
    def complete(self) -> bool:
        """Whether the text is finished: nothing but the end may follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Constraint:
        """An independent constraint in the same state."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size)


class ConstraintCompiler:
    """Turns the constraint of a request's parameters into a `Constraint`.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: rows of the model's output head, at least the tokenizer's vocabulary.
        eos_token_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos_token_ids
        self._ll: LLTokenizer | None = None
        self._lock = threading.Lock()  # requests are prepared in several threads

    def compile(self, params: SamplingParams) -> Constraint | None:
        """None when nothing constrains the output; `RequestError` when the grammar is invalid."""
        if not params.constrained:
            return None
        try:
            grammar = _grammar(params)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"the output constraint is invalid: {error}") from None
        with self._lock:
            vocabulary = self._vocabulary()
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the output constraint is invalid: {_cause(matcher)}")
        return Constraint(matcher, self._vocab_size)

    def _vocabulary(self) -> LLTokenizer:
        if self._ll is None:  # about a second for a large vocabulary, so only when first needed
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise RequestError(
                    "constrained output needs a fast tokenizer (a tokenizer.json); this model has "
                    "none"
                )
            plain = type(backend).from_str(backend.to_str())
            plain.no_padding()
            plain.no_truncation()
            eos = self._eos or [self._vocab_size - 1]
            size = max(self._vocab_size, plain.get_vocab_size(with_added_tokens=True))
            self._ll = LLTokenizer(plain.to_str(), n_vocab=size, eos_token=eos)
            self._vocab_size = size
        return self._ll


def _grammar(params: SamplingParams) -> str:
    if params.json_schema is not None:
        schema = params.json_schema
        return LLMatcher.grammar_from_json_schema(
            schema if isinstance(schema, str) else json.dumps(schema)
        )
    if params.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_literal, params.choice)))
    assert params.grammar is not None
    return LLMatcher.grammar_from_lark(params.grammar)


def _literal(text: str) -> str:
    """`text` as a Rust regular expression: only its special characters may be escaped."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/])", r"\\\1", text)


def _cause(matcher: LLMatcher) -> str:
    """The first line, and the line that says why when a regular expression is at fault."""
    first, *rest = matcher.get_error().strip().split("\n")
    why = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    return " ".join([first[:200], *why[:1]])
