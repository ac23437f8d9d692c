"""What the server needs of an engine, and nothing more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass
class TokenLogprob:
    """One position: the token there, its log-probability, and the most likely alternatives."""

    token_id: int
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Piece:
    """What one choice of one request gained since the last piece."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # "stop", "length" or "abort"


@dataclass
class Batch:
    """Pieces that arrived together. `prompt_logprobs` comes once, before the first piece."""

    pieces: list[Piece]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


class Stream(Protocol):
    """A running request: iterate over it, and close it when nobody listens any more."""

    def __aiter__(self) -> AsyncIterator[Batch]: ...

    async def __anext__(self) -> Batch: ...

    def close(self) -> None:
        """Abort the request unless it finished; its cache blocks are free at the engine's next
        step. Closing twice does nothing."""
        ...


class Backend(Protocol):
    """An engine behind the server."""

    tokenizer: Any
    max_model_len: int

    @property
    def alive(self) -> bool:
        """Whether prompts can still be answered."""
        ...

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Mapping[str, Any],
        lora: str | None = None,
    ) -> Stream:
        """Start one prompt; `sampling` holds fields of `SamplingParams`, `lora` names an adapter.

        Raises ServalError when the request is invalid, EngineStoppedError when the engine has
        stopped; then, and when cancelled, nothing runs. All methods are called on the event loop's
        thread.
        """
        ...

    def stats(self) -> dict[str, float]:
        """The numbers of `metrics.ENGINE_METRICS`."""
        ...

    def interrupt(self, error: Exception) -> None:
        """Abort all running requests; whoever listens to one gets `error`."""
        ...

    def close(self) -> None:
        """Stop the engine's thread."""
        ...
