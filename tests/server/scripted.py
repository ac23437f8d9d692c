"""A backend that says what a test tells it to, to reach cases no small model produces."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from serval.server.backend import Batch, Piece


class ScriptedStream:
    """Plays `pieces`, `delay` seconds apart; `hang` leaves it waiting at the end."""

    def __init__(self, owner: ScriptedBackend, name: str, batches: list[Batch]) -> None:
        self.owner, self.name, self.batches = owner, name, list(batches)

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> Batch:
        await asyncio.sleep(self.owner.delay)
        if self.owner.failure is not None:
            raise self.owner.failure
        if not self.batches:
            if self.owner.hang:
                await asyncio.Event().wait()
            self.owner.live.discard(self.name)
            raise StopAsyncIteration
        return self.batches.pop(0)

    def close(self) -> None:
        if self.name in self.owner.live:
            self.owner.live.discard(self.name)
            self.owner.aborted.append(self.name)


class ScriptedBackend:
    """Answers every prompt with the same text, cut into `pieces`."""

    def __init__(self, tokenizer: Any, pieces: list[str], max_model_len: int = 256) -> None:
        self.tokenizer, self.pieces, self.max_model_len = tokenizer, pieces, max_model_len
        self.delay = 0.0
        self.hang = False
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.seen: list[Mapping[str, Any]] = []
        self.closed = False
        self.alive = True

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: Mapping[str, Any],
        lora: str | None = None,
    ) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        self.seen.append(sampling)
        self.live.add(request_id)
        batches = []
        last = len(self.pieces) - 1
        for i, text in enumerate(self.pieces):
            reason = "stop" if i == last and not self.hang else None
            choices = range(sampling.get("n", 1))
            batches.append(Batch([Piece(c, text, [i], None, reason) for c in choices]))
        return ScriptedStream(self, request_id, batches)

    def stats(self) -> dict[str, float]:
        return {"running": len(self.live), "waiting": 0, "cache_usage": 0.0, "preemptions": 3}

    def interrupt(self, error: Exception) -> None:
        self.failure = error

    def close(self) -> None:
        self.closed = True
