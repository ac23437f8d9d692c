"""Requests and what comes back: `Request` (one prompt), `Sequence` (one of its n continuations),
`RequestOutput`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from serval.cache.manager import SequenceCache
from serval.engine.constrained import Constraint
from serval.engine.detokenizer import Detokenizer
from serval.engine.params import SamplingParams
from serval.engine.penalties import TokenCounts

__all__ = [
    "CompletionOutput",
    "Delta",
    "FinishReason",
    "Logprob",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Sequence",
]

FinishReason = Literal["stop", "length", "abort"]


@dataclass
class Logprob:
    """One token's log-probability, its rank (1 = most likely) and its text."""

    logprob: float
    rank: int
    text: str = ""


@dataclass
class CompletionOutput:
    """One continuation. logprobs: per token, token id -> `Logprob`; the chosen token comes first.
    stop_reason: the stop string or stop token id that ended it, or None."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """A finished request. prompt_logprobs has None for the first token, which nothing predicts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass
class Delta:
    """What one step added to one continuation; the last has a finish_reason."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine.

    arrival: the order of arrival, which is the order of service. adapter: number of its LoRA
    adapter, 0 for none. on_delta: called with every
    `Delta`, from the thread that steps the engine; text is decoded as it comes only if it is set.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: int
    seed: int
    on_delta: Callable[[Delta], None] | None = None
    constraint: Constraint | None = None
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    adapter: int = 0

    @property
    def finished(self) -> bool:
        """Whether all n continuations have ended."""
        return len(self.sequences) == self.params.n and all(
            sequence.finish_reason is not None for sequence in self.sequences
        )


class Sequence:
    """One continuation: its tokens, where they live in the cache, and its sampling state.

    Args:
        request: the request it belongs to.
        branch: which of the request's n continuations, from 0.
        cache: its block tables; `cache.num_tokens` tokens are computed, the rest is still to run.
        stop_ids: tokens that end it.
    """

    def __init__(
        self, request: Request, branch: int, cache: SequenceCache, stop_ids: frozenset[int]
    ) -> None:
        self.request, self.branch, self.cache = request, branch, cache
        self.params = request.params
        self.order = (request.arrival, branch)
        self.stop_ids = stop_ids
        self.num_prompt = len(request.prompt_token_ids)
        self._tokens = np.zeros(self.num_prompt + 64, dtype=np.int64)
        self._tokens[: self.num_prompt] = request.prompt_token_ids
        self.length = self.num_prompt
        self.width = 1  # running slots it takes: n until its siblings have been forked
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.detokenizer: Detokenizer | None = None
        self.constraint: Constraint | None = None
        self.counts: TokenCounts | None = None
        self.text_end: int | None = None  # where a stop string cut the text
        self.stop_scanned = 0  # characters already searched for stop strings
        self.hidden_tokens = 0  # trailing stop tokens that are not part of the text
        self._sent = 0  # characters already given out as deltas

    def fork(self, branch: int, cache: SequenceCache) -> Sequence:
        """A sibling that shares everything up to here."""
        other = Sequence(self.request, branch, cache, self.stop_ids)
        other._tokens, other.length = self._tokens.copy(), self.length
        other.logprobs = None if self.logprobs is None else list(self.logprobs)
        other.detokenizer = None if self.detokenizer is None else self.detokenizer.copy()
        other.constraint = None if self.constraint is None else self.constraint.copy()
        other.counts = None if self.counts is None else self.counts.copy()
        other.stop_scanned, other._sent = self.stop_scanned, self._sent
        return other

    @property
    def adjusts_logits(self) -> bool:
        """Whether the sampler must change this sequence's logits before it chooses."""
        return (
            self.constraint is not None
            or self.counts is not None
            or self.params.logit_bias is not None
            or self.num_output < self.params.min_tokens
        )

    @property
    def tokens(self) -> np.ndarray:
        """int64 [length]: prompt and output, a view."""
        return self._tokens[: self.length]

    @property
    def output_ids(self) -> list[int]:
        """The generated token ids."""
        return self._tokens[self.num_prompt : self.length].tolist()

    @property
    def num_output(self) -> int:
        """Generated tokens so far."""
        return self.length - self.num_prompt

    @property
    def remaining(self) -> int:
        """Known tokens that the decoder has still to run."""
        return self.length - self.cache.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt position's log-probabilities are still missing."""
        done = self.request.prompt_logprobs
        return self.branch == 0 and done is not None and len(done) < self.num_prompt

    def append(self, token: int) -> None:
        """Add a generated token."""
        if self.length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self.length] = token
        self.length += 1

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token: a function of seed, branch and position
        alone, so that neither batch nor schedule can change what is drawn."""
        counter = struct.pack("<QII", self.request.seed & (2**64 - 1), self.branch, self.num_output)
        word = hashlib.blake2b(counter, digest_size=8).digest()
        return (int.from_bytes(word, "little") >> 12) * 2.0**-52

    def new_text(self, final: bool, held: int) -> str:
        """Decoded text not given out yet, except the last `held` characters unless `final`."""
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.text
        end = len(text) if self.text_end is None else self.text_end
        if not final:
            end -= held
        new = text[self._sent : end]
        self._sent = max(self._sent, end)
        return new
