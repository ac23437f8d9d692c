"""How tokens are chosen: the sampling parameters of a request, checked when they are made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from serval.errors import RequestError


@dataclass
class SamplingParams:
    """How a request's tokens are chosen and when it stops. Raises `RequestError` on a bad value.

    n: samples of the same prompt. temperature: 0 is greedy. top_k: 0 keeps all. top_p, min_p:
    nucleus (arXiv 1904.09751) and minimum probability relative to the best token (arXiv
    2407.01082). repetition_penalty: divides positive and multiplies negative logits of tokens in
    prompt or output (arXiv 1909.05858); presence_penalty and frequency_penalty are subtracted once
    per token, and once per occurrence, of the output. logit_bias: token id -> added to its logit.

    max_tokens: None runs to the end of the context; 0 only scores the prompt. min_tokens: no stop
    before that many. stop, stop_token_ids: end the text before this string or token. ignore_eos:
    do not stop at the end-of-text token. seed: same seed, same text, whatever else is in the batch.

    logprobs: per output token its log-probability, its rank, and those of the best `logprobs`
    tokens, under the model's own distribution (before penalties and temperature).
    prompt_logprobs: the same for the prompt.

    At most one of json_schema (a JSON schema as dict or text), json_object, regex, choice and
    grammar (Lark) constrains the output.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = 128
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        self._integer("n", 1)
        for name in ("top_k", "min_tokens"):
            self._integer(name, 0)
        for name in ("max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0)
        self._number("temperature", 0, math.inf)
        self._number("top_p", 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0 and at most 1, got 0")
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0.01, 100)  # beyond that logits overflow
        self._number("presence_penalty", -math.inf, math.inf)
        self._number("frequency_penalty", -math.inf, math.inf)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})"
            )
        if self.seed is not None and (
            not isinstance(self.seed, int) or isinstance(self.seed, bool)
        ):
            raise RequestError(f"seed must be an integer, got {self.seed!r}")
        self._check_stop()
        self._check_bias()
        self._check_constraint()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def constrained(self) -> bool:
        """Whether a grammar restricts the output."""
        given = (self.json_schema, self.regex, self.choice, self.grammar)
        return self.json_object or any(value is not None for value in given)

    def _integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise RequestError(f"{name} must be an integer of at least {low}, got {value!r}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not low <= value <= high:
            raise RequestError(f"{name} must be a number {_range(low, high)}, got {value!r}")

    def _check_stop(self) -> None:
        if self.stop is not None and not isinstance(self.stop, (str, list, tuple)):
            raise RequestError(f"stop must be a string or a list of strings, got {self.stop!r}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop strings must be non-empty strings, got {text!r}")
        for token in self.stop_token_ids or []:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise RequestError(f"stop_token_ids must be token ids, got {token!r}")

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        try:
            bias = {int(token): float(value) for token, value in self.logit_bias.items()}
        except (AttributeError, TypeError, ValueError):
            raise RequestError(
                f"logit_bias must map token ids to numbers, got {self.logit_bias!r}"
            ) from None
        for token, value in bias.items():
            if token < 0 or not math.isfinite(value):
                raise RequestError(f"logit_bias[{token}] must be a finite number, got {value!r}")
        self.logit_bias = bias

    def _check_constraint(self) -> None:
        names = ("json_schema", "regex", "choice", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) > 1:
            raise RequestError(f"give at most one constraint, got {', '.join(given)}")
        if self.choice is not None and not (
            isinstance(self.choice, (list, tuple))
            and self.choice
            and all(isinstance(text, str) and text for text in self.choice)
        ):
            raise RequestError("choice must be a non-empty list of non-empty strings")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise RequestError(f"{name} must be a string, got {value!r}")
        if self.json_schema is not None and not isinstance(self.json_schema, (dict, str)):
            raise RequestError(
                f"json_schema must be an object or JSON text, got {self.json_schema!r}"
            )
        if isinstance(self.json_schema, str):
            try:
                json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"json_schema is not valid JSON: {error}") from None


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return "that is finite"
    return f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
