"""The FastAPI application: routes, layers and OpenAPI description."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from starlette.middleware import Middleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import serval
from serval.errors import EngineStoppedError
from serval.server import answers, errors
from serval.server.backend import Backend
from serval.server.chat import create_chat_completion
from serval.server.completions import create_completion
from serval.server.errors import APIError, ErrorShield, bad_request
from serval.server.limits import Admission, ApiKeyGuard, BodyLimit
from serval.server.metrics import CONTENT_TYPE, CountRequests, Metrics
from serval.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from serval.server.state import AppOptions, State
from serval.server.text import TextCodec

PAGE = Path(__file__).parent / "page" / "index.html"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(backend: Backend, options: AppOptions | None = None) -> FastAPI:
    """The server's ASGI application around a running engine.

    The application owns `backend` from here on and closes it when it shuts down.
    """
    options = options or AppOptions()
    admission = Admission(options.max_in_flight)
    codec = TextCodec(backend.tokenizer, options.chat_template)
    metrics = Metrics(backend.stats)
    state = State(backend, options, codec, admission, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        codec.close()
        backend.close()

    layers = [
        Middleware(CountRequests, metrics=metrics),
        Middleware(ErrorShield),
        Middleware(BodyLimit, max_bytes=options.max_body_bytes, timeout=options.body_timeout),
    ]
    if options.api_keys:
        layers.insert(2, Middleware(ApiKeyGuard, keys=tuple(options.api_keys)))
    app = FastAPI(
        title="Serval",
        version=serval.__version__,
        description="OpenAI-compatible API of a Serval server.",
        docs_url=None,  # the usual documentation pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=layers,
    )
    app.state.serval = state
    errors.install(app)
    _add_openai_routes(app, state)
    _add_text_routes(app, state)
    _add_service_routes(app, state)
    app.openapi = lambda: answers.describe(app, bool(options.api_keys))  # type: ignore[method-assign]
    return app


def _add_openai_routes(app: FastAPI, state: State) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "serval",
            "root": state.model,
            "parent": state.model if name in state.options.adapters else None,
            "max_model_len": state.max_model_len,
        }

    @app.get("/v1/models", responses=answers.ok(answers.ModelList))
    async def list_models() -> Response:
        """The models of this server: one, under each of its names, and its adapters."""
        names = [*state.options.model_names, *state.options.adapters]
        cards = [card(name) for name in names]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model:path}", responses=answers.ok(answers.ModelCard, 404))
    async def retrieve_model(model: str) -> Response:
        """One model by name."""
        state.check_model(model)
        return JSONResponse(card(model))

    @app.post("/v1/completions", responses=answers.generation(answers.Completion))
    async def completions(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        """Continue a text."""
        return await create_completion(request, body, state)

    @app.post("/v1/chat/completions", responses=answers.generation(answers.ChatCompletion))
    async def chat_completions(
        request: Request, body: Annotated[ChatCompletionRequest, Body()]
    ) -> Response:
        """Answer a conversation."""
        return await create_chat_completion(request, body, state)


def _add_text_routes(app: FastAPI, state: State) -> None:
    codec = state.codec

    @app.post("/tokenize", responses=answers.ok(answers.Tokens, 400, 404, 413))
    async def tokenize(body: Annotated[TokenizeRequest, Body()]) -> Response:
        """Token ids of a text or a conversation."""
        state.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if body.messages is not None:
            generate = body.add_generation_prompt is not False
            _, ids = await codec.encode_chat(
                body.messages, body.tools, add_generation_prompt=generate
            )
        else:
            special = body.add_special_tokens is not False
            ids = await codec.encode(body.prompt or "", special_tokens=special, param="prompt")
        answer: dict[str, Any] = {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": state.max_model_len,
            "token_strs": None,
        }
        if body.return_token_strs:
            answer["token_strs"] = [codec.token_text(token) for token in ids]
        return JSONResponse(answer)

    @app.post("/detokenize", responses=answers.ok(answers.Text, 400, 404, 413))
    async def detokenize(body: Annotated[DetokenizeRequest, Body()]) -> Response:
        """Text of token ids."""
        state.check_model(body.model)
        text = await codec.run(4 * len(body.tokens), lambda: codec.decode(body.tokens))
        return JSONResponse({"prompt": text})


def _add_service_routes(app: FastAPI, state: State) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/health", responses=answers.ok(answers.Health, 503))
    async def health() -> Response:
        """200 while requests are accepted; 503 while the server shuts down, or when its engine has
        stopped."""
        if state.admission.draining:
            raise APIError(503, "the server is shutting down")
        if not state.backend.alive:
            raise EngineStoppedError("the engine has stopped; restart the server")
        return JSONResponse({"status": "ok"})

    @app.get("/stats", responses=answers.ok(answers.Stats))
    async def stats() -> Response:
        """The numbers the chat page shows."""
        return JSONResponse(state.stats())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(state.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)
