"""Every answer that is not a success has OpenAI's error body; nobody ever sees a traceback.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import difflib
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serval.errors import EngineStoppedError, ServalError

log = logging.getLogger("serval.server")

CLIENT_GONE = 499  # nginx's number for "the client closed the connection"; only logs see it

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class APIError(Exception):
    """An answer other than 200, with everything OpenAI's error body says about it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A 400; `param` names the offending field."""
    return APIError(400, message, param=param, code=code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object. Lone surrogates, which JSON can smuggle in, become '?'."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": _clean(message),
            "type": kind,
            "param": _clean(param) if param is not None else None,
            "code": code,
        }
    }


def error_response(error: APIError) -> JSONResponse:
    """The HTTP answer for an APIError."""
    body = error_body(error.status, error.message, error.param, error.code)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def as_api_error(error: Exception) -> APIError:
    """Turn whatever ended a request into an answer; the unexpected is logged and told as 500."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, EngineStoppedError):
        return APIError(503, str(error), code="engine_stopped")
    if isinstance(error, ServalError):
        return bad_request(str(error))
    log.exception("request failed", exc_info=error)
    return APIError(500, "internal error; the server's log has the details", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer validation errors, framework errors and our own errors in OpenAI's form."""
    app.add_exception_handler(APIError, _on_known_error)
    app.add_exception_handler(ServalError, _on_known_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


class ErrorShield:
    """Outermost ASGI layer: an exception nobody handled is logged once and answered as 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            answer = error_response(as_api_error(error))
            if not started:
                await answer(scope, receive, send)


async def _on_known_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(as_api_error(error))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such route: {request.method} {request.url.path}; see /openapi.json"
    elif error.status_code == 405:
        message = f"{request.url.path} does not accept {request.method}"
    headers = dict(error.headers) if error.headers else None
    return error_response(APIError(error.status_code, message, headers=headers))


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = describe_validation(list(error.errors()))
    return error_response(bad_request(message, param))


def describe_validation(problems: list[Any]) -> tuple[str, str | None]:
    """Say the first problem in one line: (message, name of the field or None).

    A field that accepts several shapes produces one problem per shape; those are joined.
    """
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return f"the body is not valid JSON: {reason}", None
    path = _path(first["loc"])
    if first["type"] == "missing" and not path:
        return "the request has no body; send a JSON object", None
    field = path[0] if path else None
    if first["type"] == "extra_forbidden":
        name = str(path[-1])
        known = (first.get("ctx") or {}).get("known") or _known_fields(path)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown field {'.'.join(map(str, path))!r}{hint}", str(field)
    same = [p for p in problems if _path(p["loc"])[:1] == path[:1]]
    reasons = list(dict.fromkeys(_reason(p) for p in same))[:4]
    where = ".".join(str(part) for part in path) or "body"
    if len(reasons) > 1:
        where = str(field)
    return f"{where}: {' or '.join(reasons)}", None if field is None else str(field)


def _known_fields(path: list[Any]) -> list[str]:
    from serval.server.protocol import ChatCompletionRequest, CompletionRequest

    if len(path) > 1:
        return []
    return [*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields]


def _path(loc: Any) -> list[Any]:
    """Drop 'body' and the markers pydantic adds for branches of a union."""
    parts = list(loc)[1:] if loc and loc[0] in ("body", "path", "query") else list(loc)
    if parts and isinstance(parts[0], int) and len(parts) == 1:
        return []  # the byte offset of a JSON error
    inner = [part for part in parts[1:] if isinstance(part, int) or not _is_branch(part)]
    return parts[:1] + inner


def _is_branch(part: str) -> bool:
    """Whether pydantic put this into a path to say which member of a union it tried."""
    return part in ("str", "int", "float", "bool") or part.startswith(
        ("list[", "dict[", "literal[", "constrained-", "function-")
    )


def _reason(problem: Any) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:300]


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
