"""POST /v1/chat/completions: a conversation in, a message out."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serval.server.backend import Piece, TokenLogprob
from serval.server.errors import bad_request
from serval.server.generation import EventStream, Generation, answer_whole, room_for
from serval.server.protocol import ChatCompletionRequest, NamedTool, Tool
from serval.server.sampling import sampling_fields
from serval.server.state import State
from serval.server.text import TextCodec
from serval.server.tools import Call, ToolParser, forced_call_schema


@dataclass
class _Job:
    """A checked request and its generation; one tool parser per choice when tools are in play."""

    body: ChatCompletionRequest
    state: State
    generation: Generation
    tool_names: list[str]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def parser(self) -> ToolParser | None:
        return ToolParser(self.tool_names) if self.tool_names else None

    @property
    def keep_calls(self) -> int | None:
        return 1 if self.body.parallel_tool_calls is False else None


async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, state: State
) -> Response:
    """Answer at once or as server-sent events; raises APIError for what cannot be served."""
    arrived = time.monotonic()
    state.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    tools = _active_tools(body)
    if body.continue_final_message:
        if body.messages[-1].role != "assistant":
            raise bad_request(
                "continue_final_message needs an assistant message at the end", "messages"
            )
        if body.add_generation_prompt:
            raise bad_request(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )

    async def prepare() -> _Job:
        return await _prepare(body, tools, state, arrived)

    if body.stream:
        return EventStream(lambda: _events(prepare))

    async def whole() -> Response:
        return JSONResponse(await _collect(await prepare()))

    return await answer_whole(request, whole())


def _active_tools(body: ChatCompletionRequest) -> list[Tool]:
    """The tools the model is told of; raises APIError 400 for a choice that names none of them."""
    choice = body.tool_choice
    tools = body.tools or []
    if choice == "none":
        return []
    if not tools and choice in ("auto", "required"):
        raise bad_request(f"tool_choice {choice!r} needs tools", "tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if all(tool.function.name != name for tool in tools):
            raise bad_request(f"tool_choice names {name!r}, which is not in tools", "tool_choice")
    return tools


async def _prepare(
    body: ChatCompletionRequest, tools: list[Tool], state: State, arrived: float
) -> _Job:
    state.admission.check(body.n or 1)  # before the work of tokenising
    _, prompt = await state.codec.encode_chat(
        body.messages,
        tools or None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        extra=body.chat_template_kwargs,
    )
    wanted = body.max_completion_tokens or body.max_tokens
    room = room_for(prompt, wanted, state)
    sampling = sampling_fields(body, state.codec, wanted or room)
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    if body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool):
        if "json_schema" in sampling or "regex" in sampling:
            raise bad_request("a demanded tool call excludes response_format", "tool_choice")
        named = body.tool_choice
        name = named.function.name if isinstance(named, NamedTool) else None
        sampling["json_schema"] = forced_call_schema([tool.model_dump() for tool in tools], name)
    generation = Generation(state, [prompt], sampling, arrived, body.model)
    return _Job(body, state, generation, [tool.function.name for tool in tools])


async def _collect(job: _Job) -> dict[str, Any]:
    parts: list[list[Piece]] = [[] for _ in range(job.generation.choices)]
    async for _, piece in job.generation.pieces():
        if piece is not None:
            parts[piece.index].append(piece)
    choices = []
    for index, pieces in enumerate(parts):
        text = "".join(piece.text for piece in pieces)
        reason = pieces[-1].finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        parser = job.parser()
        if parser is not None:
            before, calls = parser.push(text)
            after, late = parser.finish()
            calls = (calls + late)[: job.keep_calls]
            if calls:
                message["content"] = (before + after).strip() or None
                message["tool_calls"] = [call.as_dict() for call in calls]
                reason = "tool_calls" if reason == "stop" else reason
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": reason}
        choice["logprobs"] = None
        if job.body.logprobs:
            entries = [entry for piece in pieces for entry in piece.logprobs or []]
            choice["logprobs"] = _logprobs(entries, job)
        choices.append(choice)
    return {
        **_envelope(job, "chat.completion"),
        "choices": choices,
        "usage": job.generation.usage(),
    }


async def _events(
    prepare: Callable[[], Awaitable[_Job]],
) -> AsyncGenerator[dict[str, Any] | None, None]:
    job = await prepare()
    options = job.body.stream_options
    envelope = _envelope(job, "chat.completion.chunk")
    parsers = [job.parser() for _ in range(job.generation.choices)]
    calls_made = [0] * job.generation.choices
    async with aclosing(job.generation.pieces()) as pieces:
        async for _, piece in pieces:
            if piece is None:
                for index in range(job.generation.choices):
                    opening = {"role": "assistant", "content": ""}
                    yield {**envelope, "choices": [_delta(index, opening, None, None)]}
                continue
            delta: dict[str, Any] = {}
            reason = piece.finish_reason
            text, calls = _split(parsers[piece.index], piece)
            if text:
                delta["content"] = text
            made = calls_made[piece.index]
            if job.keep_calls is not None:
                calls = calls[: job.keep_calls - made]
            if calls:
                delta["tool_calls"] = [
                    {"index": made + i, **call.as_dict()} for i, call in enumerate(calls)
                ]
                calls_made[piece.index] = made + len(calls)
            if reason == "stop" and calls_made[piece.index]:
                reason = "tool_calls"
            logprobs = None
            if job.body.logprobs and piece.logprobs:
                logprobs = _logprobs(piece.logprobs, job)
            if not delta and reason is None and logprobs is None:
                continue
            event = {**envelope, "choices": [_delta(piece.index, delta, logprobs, reason)]}
            if options and options.continuous_usage_stats:
                event["usage"] = job.generation.usage()
            yield event
    if options and options.include_usage:
        yield {**envelope, "choices": [], "usage": job.generation.usage()}


def _split(parser: ToolParser | None, piece: Piece) -> tuple[str, list[Call]]:
    if parser is None:
        return piece.text, []
    text, calls = parser.push(piece.text)
    if piece.finish_reason is not None:
        more, late = parser.finish()
        text, calls = text + more, calls + late
    return text, calls


def _envelope(job: _Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.generation.model}


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(entries: list[TokenLogprob], job: _Job) -> dict[str, Any]:
    """OpenAI's chat logprobs object."""
    codec, width = job.state.codec, job.body.top_logprobs or 0
    return {
        "content": [
            {
                **_token(entry.token_id, entry.logprob or 0.0, codec),
                "top_logprobs": [_token(t, value, codec) for t, value in entry.top[:width]],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _token(token: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    return {
        "token": codec.token_text(token),
        "logprob": logprob,
        "bytes": list(codec.token_bytes(token)),
    }
