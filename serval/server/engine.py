"""The server's backend over `AsyncLLM`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from serval.engine.async_engine import AsyncLLM, RequestStream
from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
from serval.engine.request import Delta, Logprob
from serval.errors import ConfigError
from serval.server.backend import Batch, Piece, TokenLogprob
from serval.server.errors import APIError

log = logging.getLogger("serval.server")


class EngineStream:
    """One running request; see `backend.Stream`."""

    def __init__(self, owner: EngineBackend, stream: RequestStream, params: SamplingParams) -> None:
        self._owner, self._stream, self._params = owner, stream, params
        self._first = True
        self._unfinished = params.n
        self.error: Exception | None = None

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> Batch:
        if self.error is not None:
            raise self.error
        first = await self._stream.__anext__()
        deltas = [first, *self._stream.ready()]
        for delta in deltas:
            if delta.finish_reason is not None:
                self._unfinished -= 1
                if not self._unfinished:
                    self._owner.live.discard(self)
            if delta.finish_reason == "abort":
                self._check_abort(delta)
        batch = Batch(_pieces(deltas))
        if self._first:
            self._first = False
            request = self._stream.request
            assert request is not None
            batch.cached_tokens = request.num_cached_tokens
            self._owner.prefix_query_tokens += len(request.prompt_token_ids)
            if request.prompt_logprobs is not None:
                ids = request.prompt_token_ids
                batch.prompt_logprobs = [
                    _token_logprob(token, entry)
                    for token, entry in zip(ids, request.prompt_logprobs, strict=True)
                ]
        return batch

    def close(self) -> None:
        if self in self._owner.live:
            self._owner.live.discard(self)
            self._stream.abort()

    def interrupt(self, error: Exception) -> None:
        """Abort, and let whoever listens have `error`."""
        self.error = error
        self._stream.abort()

    def _check_abort(self, delta: Delta) -> None:
        """Raise what an abort that no client asked for should be told as."""
        if self.error is not None:
            raise self.error
        reason = delta.stop_reason
        if self._params.constrained and (reason is None or str(reason).startswith("no token can")):
            return  # the constraint is a dead end, or beyond its limits: the client's own
        log.error("the engine aborted a request: %s", reason)
        raise APIError(
            500, "internal error; the server's log has the details", code="internal_error"
        )


class EngineBackend:
    """See `backend.Backend`."""

    def __init__(self, llm: LLM) -> None:
        if llm.tokenizer is None:
            raise ConfigError(
                "this model comes without a tokenizer; put its tokenizer.json beside the weights"
            )
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.max_model_len = llm.max_model_len
        self.engine = AsyncLLM(llm)
        self.live: set[EngineStream] = set()
        self.prefix_query_tokens = 0
        self._cache_bytes = llm.memory.nbytes

    @classmethod
    def load(cls, model: str, **arguments: Any) -> EngineBackend:
        """Load a checkpoint directory or hub name; `arguments` go to `LLM`."""
        return cls(LLM(model, **arguments))

    @property
    def alive(self) -> bool:
        return self.engine.alive

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Mapping[str, Any],
        lora: str | None = None,
    ) -> EngineStream:
        params = SamplingParams(**sampling)
        stream = await self.engine.submit(token_ids, params, request_id=request_id, lora=lora)
        running = EngineStream(self, stream, params)
        self.live.add(running)
        return running

    def stats(self) -> dict[str, float]:
        now = self.engine.stats()
        total = max(now.cache_total_blocks, 1)
        return {
            "running": now.running,
            "waiting": now.waiting,
            "cache_usage": now.cache_used_blocks / total,
            "cache_blocks": now.cache_total_blocks,
            "cache_bytes": self._cache_bytes,
            "preemptions": now.preemptions,
            "prefix_hit_tokens": now.prefix_hit_tokens,
            "prefix_query_tokens": self.prefix_query_tokens,
            "tokens_per_second": now.tokens_per_second,
        }

    def interrupt(self, error: Exception) -> None:
        for stream in list(self.live):
            stream.interrupt(error)

    def close(self) -> None:
        self.engine.shutdown()


def _pieces(deltas: list[Delta]) -> list[Piece]:
    """One piece per choice: what came while nobody listened is told in one go."""
    merged: dict[int, Piece] = {}
    for delta in deltas:
        piece = _piece(delta)
        before = merged.setdefault(piece.index, piece)
        if before is not piece:
            before.text += piece.text
            before.token_ids = before.token_ids + piece.token_ids
            before.finish_reason = piece.finish_reason
            if piece.logprobs:
                before.logprobs = (before.logprobs or []) + piece.logprobs
    return list(merged.values())


def _piece(delta: Delta) -> Piece:
    logprobs = None
    if delta.logprobs is not None:
        logprobs = [
            _token_logprob(token, entry)
            for token, entry in zip(delta.token_ids, delta.logprobs, strict=True)
        ]
    return Piece(delta.index, delta.text, delta.token_ids, logprobs, delta.finish_reason)


def _token_logprob(token: int, entry: dict[int, Logprob] | None) -> TokenLogprob:
    if entry is None:
        return TokenLogprob(token, None)
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return TokenLogprob(token, entry[token].logprob, [(t, e.logprob) for t, e in ranked])
