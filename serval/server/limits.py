"""What a client may ask for: the API key, the size of a body, and room in the queue."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serval.server.errors import APIError, error_response

PROTECTED = ("/v1/", "/tokenize", "/detokenize")
DISCARD_SECONDS = 5.0


class ApiKeyGuard:
    """Refuse requests to the API without `Authorization: Bearer KEY`.

    Keys are compared in constant time. The page, /health, /metrics and /stats stay open: they show
    no one's text.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(PROTECTED)
        if guarded and not self._known(Headers(scope=scope).get("authorization", "")):
            error = APIError(
                401,
                "missing or wrong API key; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _known(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer":
            return False
        token = given.strip().encode()
        matches = [hmac.compare_digest(token, key) for key in self.keys]  # all, whichever fits
        return True in matches


class BodyLimit:
    """413 for bodies over `max_bytes`, 408 for bodies that arrive for over `timeout` seconds."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float = 60.0) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes:
            if "100-continue" not in Headers(scope=scope).get("expect", "").lower():
                await _discard(receive)
            await error_response(self._too_large())(scope, receive, send)
            return
        received, complete = 0, False
        deadline = time.monotonic() + self.timeout

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # from here on, only a disconnect is awaited
                return await receive()
            left = max(0.0, deadline - time.monotonic())
            try:
                message = await asyncio.wait_for(receive(), left)
            except TimeoutError:
                complete = True
                detail = f"the body did not arrive within {self.timeout:g} seconds"
                raise HTTPException(408, detail, headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self.max_bytes:
                    if not complete:
                        await _discard(receive)
                    complete = True
                    raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, limited, send)

    def _too_large(self) -> APIError:
        text = f"the body is larger than {self.max_bytes} bytes, this server's limit"
        return APIError(413, text, code="body_too_large")


async def _discard(receive: Receive) -> None:
    """Read what the client still sends, for a while: closing at once would reset the connection
    and the client would never see the answer."""
    deadline = time.monotonic() + DISCARD_SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            message = await asyncio.wait_for(receive(), left)
            if message["type"] != "http.request" or not message.get("more_body", False):
                return
    except TimeoutError:
        return


class Admission:
    """Counts the sequences that clients are waiting for and refuses more than `capacity`.

    One HTTP request may ask for several sequences (prompts times `n`).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.in_flight = 0
        self.draining = False

    def check(self, sequences: int) -> None:
        """Raise APIError 429 (full), 503 (draining) or 400 (never fits) unless there is room."""
        if self.draining:
            raise APIError(503, "the server is shutting down", headers={"Retry-After": "5"})
        if sequences > self.capacity:
            raise APIError(
                400,
                f"the request asks for {sequences} sequences (prompts times n); this server takes "
                f"at most {self.capacity} at once",
                param="n",
            )
        if self.in_flight + sequences > self.capacity:
            raise APIError(
                429,
                f"the queue is full ({self.in_flight} sequences in flight, limit {self.capacity}); "
                "try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def admit(self, sequences: int) -> Iterator[None]:
        """Hold `sequences` places; raises what `check` raises."""
        self.check(sequences)
        self.in_flight += sequences
        try:
            yield
        finally:
            self.in_flight -= sequences
