"""POST /v1/completions: text in, text out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serval.server.backend import Piece, TokenLogprob
from serval.server.errors import bad_request
from serval.server.generation import EventStream, Generation, answer_whole, room_for
from serval.server.protocol import CompletionRequest
from serval.server.sampling import sampling_fields
from serval.server.state import State
from serval.server.text import TextCodec


@dataclass
class _Job:
    """A checked request: its prompts as text (when echoed) and tokens, and its generation."""

    body: CompletionRequest
    state: State
    generation: Generation
    texts: list[str]
    id: str
    created: int

    @property
    def choices(self) -> int:
        return self.generation.choices


async def create_completion(request: Request, body: CompletionRequest, state: State) -> Response:
    """Answer at once or as server-sent events; raises APIError for what cannot be served."""
    arrived = time.monotonic()
    state.check_model(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of is not supported; use n", "best_of")
    if body.suffix:
        raise bad_request("suffix is not supported; this model only continues text", "suffix")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")

    async def prepare() -> _Job:
        return await _prepare(body, state, arrived)

    if body.stream:
        return EventStream(lambda: _events(prepare))

    async def whole() -> Response:
        return JSONResponse(await _collect(await prepare()))

    return await answer_whole(request, whole())


async def _prepare(body: CompletionRequest, state: State, arrived: float) -> _Job:
    codec = state.codec
    texts, prompts = [], []
    given = _prompts(body.prompt)
    state.admission.check(len(given) * (body.n or 1))  # before the work of tokenising
    for prompt in given:
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            ids = await codec.encode(prompt, special_tokens=special, param="prompt")
            texts.append(prompt)
        else:
            for token in prompt:
                codec.check_id(token, "prompt")
            ids = prompt
            texts.append(codec.decode(prompt) if body.echo else "")
        prompts.append(ids)
    room = min(room_for(ids, body.max_tokens, state) for ids in prompts)
    # OpenAI's default of 16 tokens, or fewer where fewer fit.
    sampling = sampling_fields(body, codec, body.max_tokens or min(16, room))
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
        if body.echo:
            sampling["prompt_logprobs"] = body.logprobs
    generation = Generation(state, prompts, sampling, arrived, body.model)
    return _Job(body, state, generation, texts, f"cmpl-{uuid.uuid4().hex}", int(time.time()))


def _prompts(prompt: Any) -> list[str] | list[list[int]]:
    """The four shapes OpenAI allows, as a list of texts or of token lists."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


async def _collect(job: _Job) -> dict[str, Any]:
    count = len(job.texts) * job.choices
    parts: list[list[Piece]] = [[] for _ in range(count)]
    async for prompt, piece in job.generation.pieces():
        if piece is not None:
            parts[prompt * job.choices + piece.index].append(piece)
    choices = []
    for index, pieces in enumerate(parts):
        text = "".join(piece.text for piece in pieces)
        logprobs = None
        prompt = index // job.choices
        echo = job.texts[prompt] if job.body.echo else ""
        if job.body.logprobs is not None:
            entries = [e for piece in pieces for e in piece.logprobs or []]
            if job.body.echo:
                entries = job.generation.prompt_logprobs.get(prompt, []) + entries
            logprobs = _logprobs(entries, job.state.codec, job.body.logprobs, 0)
        choices.append(_choice(index, echo + text, logprobs, pieces[-1].finish_reason))
    return {**_envelope(job), "choices": choices, "usage": job.generation.usage()}


async def _events(
    prepare: Callable[[], Awaitable[_Job]],
) -> AsyncGenerator[dict[str, Any] | None, None]:
    job = await prepare()
    options = job.body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    offsets: dict[int, int] = {}
    echoed: set[int] = set()
    async with aclosing(job.generation.pieces()) as pieces:
        async for prompt, piece in pieces:
            if piece is None:
                yield None
                continue
            index = prompt * job.choices + piece.index
            text, entries = piece.text, piece.logprobs or []
            if job.body.echo and index not in echoed:
                echoed.add(index)
                text = job.texts[prompt] + text
                entries = job.generation.prompt_logprobs.get(prompt, []) + entries
            if not text and not piece.token_ids and piece.finish_reason is None:
                continue
            logprobs = None
            if job.body.logprobs is not None:
                start = offsets.get(index, 0)
                logprobs = _logprobs(entries, job.state.codec, job.body.logprobs, start)
                offsets[index] = start + sum(len(token) for token in logprobs["tokens"])
            event = {
                **_envelope(job),
                "choices": [_choice(index, text, logprobs, piece.finish_reason)],
            }
            if continuous:
                event["usage"] = job.generation.usage()
            yield event
    if options and options.include_usage:
        yield {**_envelope(job), "choices": [], "usage": job.generation.usage()}


def _envelope(job: _Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.generation.model,
    }


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(
    entries: list[TokenLogprob], codec: TextCodec, width: int, offset: int
) -> dict[str, Any]:
    """OpenAI's legacy logprobs object; `text_offset` counts from `offset` characters."""
    tokens = [codec.token_text(entry.token_id) for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.logprob is None:
            top.append(None)
            continue
        alternatives = {codec.token_text(t): value for t, value in reversed(entry.top[:width])}
        alternatives.setdefault(codec.token_text(entry.token_id), entry.logprob)
        top.append(alternatives)
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": top,
        "text_offset": offsets,
    }
