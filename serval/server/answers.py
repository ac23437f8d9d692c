"""Shapes of the answers, for the OpenAPI description; the answers themselves are plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CalledFunction(BaseModel):
    name: str
    arguments: str


class MadeCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[MadeCall] = []


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"]


class Stats(BaseModel):
    model: str
    max_model_len: int
    running: int
    waiting: int
    in_flight: int
    draining: bool
    cache_usage: float


_REASONS = {
    400: "The request is wrong; the message says what to change.",
    401: "Missing or wrong API key.",
    404: "Unknown model or route.",
    413: "The body is too large.",
    429: "The queue is full; try again later.",
    500: "Internal error.",
    503: "The server is shutting down.",
}


# One server-sent event: its data is a chunk as JSON text, or "[DONE]".
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}


def ok(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses: `model` on success, OpenAI's error body on `statuses`."""
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": _REASONS[status]} for status in statuses
    }
    return {200: {"model": model}, **failures}


def generation(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Like `ok`, for routes that may also stream."""
    responses = ok(model, 400, 404, 413, 429, 500, 503)
    responses[200]["content"] = {"text/event-stream": {"schema": _EVENT}}
    return responses


def describe(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document, without the 422 answers that FastAPI assumes and this server never
    gives, and with the API key where one is needed."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for path, operations in schema["paths"].items():
        guarded = needs_key and path.startswith(("/v1/", "/tokenize", "/detokenize"))
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if guarded:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = {
                    "description": _REASONS[401],
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
    if needs_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    app.openapi_schema = schema
    return schema
