"""One HTTP request: admission, all its prompts at once, counting, and clean endings."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serval.server.backend import Batch, Piece, Stream, TokenLogprob
from serval.server.errors import (
    CLIENT_GONE,
    APIError,
    as_api_error,
    bad_request,
    error_body,
    error_response,
)
from serval.server.state import State

T = TypeVar("T")


class Generation:
    """Runs `prompts` with the same sampling and yields (prompt index, piece) as they come.

    model: the name that the client gave, of the model or of an adapter. Counts tokens for `usage`
    and the metrics. Leaving the iteration early, by an exception, by
    `aclose` or by cancellation, aborts whatever still runs.
    """

    def __init__(
        self,
        state: State,
        prompts: list[list[int]],
        sampling: Mapping[str, Any],
        arrived: float,
        model: str | None = None,
    ) -> None:
        self.model, self.lora = state.resolve(model)
        self.backend, self.admission = state.backend, state.admission
        self.metrics = state.metrics
        self.prompts, self.sampling, self.arrived = prompts, sampling, arrived
        self.request_id = uuid.uuid4().hex
        self.choices = int(sampling.get("n", 1))
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self.cached: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        self._last: dict[tuple[int, int], float] = {}

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Everything the engine says, after one (0, None) that says the request was accepted.

        Raises APIError or ServalError before that when it was not.
        """
        with self.admission.admit(len(self.prompts) * self.choices):
            streams: list[Stream] = []
            try:
                for i, prompt in enumerate(self.prompts):
                    name = f"{self.request_id}-{i}"
                    streams.append(
                        await self.backend.generate(name, prompt, self.sampling, self.lora)
                    )
                self.metrics.prompt_tokens.inc(self.prompt_tokens)
                yield 0, None
                finished = 0
                merged = _merge(streams) if len(streams) > 1 else _numbered(streams[0])
                async with aclosing(merged):
                    async for number, batch in merged:
                        self.cached[number] = max(self.cached.get(number, 0), batch.cached_tokens)
                        if batch.prompt_logprobs is not None:
                            self.prompt_logprobs[number] = batch.prompt_logprobs
                        for piece in batch.pieces:
                            self._count(number, piece)
                            finished += piece.finish_reason is not None
                            yield number, piece
                if finished < len(self.prompts) * self.choices:
                    raise APIError(500, "the engine ended the request early", code="internal_error")
                self.metrics.duration.observe(time.monotonic() - self.arrived)
            finally:
                for stream in streams:
                    stream.close()

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, for what was generated so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }

    def _count(self, prompt: int, piece: Piece) -> None:
        if piece.finish_reason is not None:
            self.metrics.finished.labels(piece.finish_reason).inc()
        fresh = len(piece.token_ids)
        if not fresh:
            return
        now = time.monotonic()
        key = (prompt, piece.index)
        if key in self._last:
            gap = (now - self._last[key]) / fresh
            for _ in range(fresh):
                self.metrics.between_tokens.observe(gap)
        else:
            self.metrics.first_token.observe(now - self.arrived)
        self._last[key] = now
        self.completion_tokens += fresh
        self.metrics.generated_tokens.inc(fresh)


async def _numbered(stream: Stream) -> AsyncGenerator[tuple[int, Batch], None]:
    async for batch in stream:
        yield 0, batch


async def _merge(streams: list[Stream]) -> AsyncGenerator[tuple[int, Batch], None]:
    """Batches of several streams, in order of arrival; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, Batch | None, Exception | None]] = asyncio.Queue(maxsize=64)

    async def forward(index: int, stream: Stream) -> None:
        try:
            async for batch in stream:
                await queue.put((index, batch, None))
            await queue.put((index, None, None))
        except Exception as error:
            await queue.put((index, None, error))

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, batch, error = await queue.get()
            if error is not None:
                raise error
            if batch is None:
                left -= 1
            else:
                yield index, batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """Await `work`, but cancel it, and return None, as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return None
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer_whole(request: Request, work: Awaitable[Response]) -> Response:
    """The response `work` makes; generation stops at once when the client goes away."""
    response = await unless_gone(request.receive, work)
    return response if response is not None else Response(status_code=CLIENT_GONE)


class EventStream(Response):
    """Server-sent events, each written when it happens.

    `events` yields JSON-able dicts, or None once the engine accepted the request. The status line
    waits for the first of either, so that a refused request gets a proper status; an error later
    becomes a last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Callable[[], AsyncGenerator[dict[str, Any] | None, None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": data, "more_body": more})
            # Sending does not yield; without this, a loop that fell behind would write on and on
            # before it could notice that the client is gone.
            await asyncio.sleep(0)

        try:
            events = self.events()
            async with aclosing(events):
                async for event in events:
                    await write(b"" if event is None else _sse(event))
        except Exception as error:
            problem = as_api_error(error)
            if not started:
                await error_response(problem)(scope, receive, send)
                return
            body = error_body(problem.status, problem.message, problem.param, problem.code)
            await write(_sse(body))
        await write(b"data: [DONE]\n\n", more=False)


def _sse(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def room_for(prompt: list[int], wanted: int | None, state: State) -> int:
    """How many tokens may follow `prompt`.

    Raises APIError 400 when the prompt, or `wanted` tokens after it (None: any number), do not fit
    the context or the server's limit per request.
    """
    context, ceiling = state.max_model_len, state.options.max_tokens
    room = context - len(prompt)
    if not prompt:
        raise bad_request("the prompt is empty; give at least one token", "prompt")
    if room < 1:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens, but this server's context holds {context}, the "
            "answer included; shorten the prompt",
            code="context_length_exceeded",
        )
    if wanted is not None and wanted > room:
        raise bad_request(
            f"the prompt has {len(prompt)} tokens and {wanted} more are asked for, but this "
            f"server's context holds {context}; shorten the prompt or lower max_tokens to at most "
            f"{room}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if wanted is not None and ceiling is not None and wanted > ceiling:
        raise bad_request(
            f"{wanted} tokens are asked for; this server gives at most {ceiling} per request",
            param="max_tokens",
        )
    return room if ceiling is None else min(room, ceiling)
