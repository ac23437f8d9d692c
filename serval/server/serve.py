"""`serval serve MODEL`: load the model and listen, until a signal ends it (`draining`)."""

from __future__ import annotations

import logging
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serval.errors import ConfigError
from serval.kernels import jit

if TYPE_CHECKING:
    from fastapi import FastAPI

DTYPES = ("float32", "bfloat16", "float16")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass
class ServeOptions:
    """Everything `serval serve` can be told.

    Args:
        model: checkpoint directory or hub name.
        host, port: where to listen; port 0 picks a free one.
        served_model_name: names clients may use; empty: the last part of `model`.
        api_key: keys that open the API; empty: open to everyone who can connect.
        kv: cache layout. policy: what the cache keeps of long texts (None: everything).
        max_model_len: context in tokens (None: the model's).
        cache_bytes: size of the KV cache (None: the engine decides).
        max_sequences: sequences computed together (None: the engine decides); max_batch_tokens:
            rows of one step (None: the engine decides).
        block_size: tokens per cache block. prefix_caching: reuse the cache of prompts that start
            alike. dtype: float32, bfloat16 or float16 (None: the engine decides). seed: for
            requests that bring none.
        max_in_flight: sequences accepted, running or waiting; more get 429.
        max_body_bytes: larger bodies get 413.
        max_tokens: most tokens of one answer (None: what the context holds).
        chat_template: a Jinja file that replaces the tokenizer's template.
        lora: "name=directory" of plain PEFT LoRA adapters; clients choose one as their model.
        drain_seconds: time running requests get to finish after SIGTERM.
        engine: further keyword arguments of `serval.LLM`.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: list[str] = field(default_factory=list)
    api_key: list[str] = field(default_factory=list)
    kv: str = "full"
    policy: str | None = None
    max_model_len: int | None = None
    cache_bytes: int | None = None
    max_sequences: int | None = None
    max_batch_tokens: int | None = None
    block_size: int | None = None
    prefix_caching: bool = True
    dtype: str | None = None
    seed: int = 0
    max_in_flight: int = 256
    max_body_bytes: int = 8 * 2**20
    max_tokens: int | None = None
    chat_template: Path | None = None
    lora: list[str] = field(default_factory=list)
    drain_seconds: float = 30.0
    log_level: str = "info"
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must lie between 0 and 65535, got {self.port}")
        if self.log_level not in LOG_LEVELS:
            known = ", ".join(LOG_LEVELS)
            raise ConfigError(f"--log-level must be one of {known}, got {self.log_level!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in (
            "max_in_flight",
            "max_body_bytes",
            "max_tokens",
            "max_model_len",
            "max_sequences",
            "max_batch_tokens",
            "block_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        adapters = self.adapters()
        for name in self.served_model_name or [default_name(self.model)]:
            if name in adapters:
                raise ConfigError(
                    f"--lora {name}=...: the model itself has that name; choose another"
                )
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("--api-key must not be empty")
        if self.drain_seconds < 0:
            raise ConfigError(f"--drain-seconds must not be negative, got {self.drain_seconds}")

    def adapters(self) -> dict[str, Path]:
        """name -> directory of every --lora; raises ConfigError for one that is not NAME=PATH."""
        found: dict[str, Path] = {}
        for given in self.lora:
            name, equals, path = given.partition("=")
            if not (equals and name.strip() and path.strip()):
                raise ConfigError(f"--lora {given!r}: expected NAME=DIRECTORY")
            if name in found:
                raise ConfigError(f"--lora {name} is given twice")
            found[name] = Path(path)
        return found


def run(options: ServeOptions) -> int:
    """Serve until a signal arrives; returns the process's exit code.

    Raises ConfigError (address in use, unreadable template) and CheckpointError before listening.
    """
    began = time.perf_counter()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("serval").setLevel(options.log_level.upper())
    listener = _bind(options.host, options.port)
    try:
        app = build_app(options)
        return _serve(app, listener, options, began)
    finally:
        listener.close()


def build_app(options: ServeOptions) -> FastAPI:
    """Load the model, start its engine, and wrap both in the application."""
    template = None
    if options.chat_template is not None:
        try:
            template = options.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"--chat-template {options.chat_template}: {why}") from error
    jit.prepare()  # all kernels at once on a first start, instead of one after the other in a step
    from serval.server.app import create_app
    from serval.server.engine import EngineBackend
    from serval.server.state import AppOptions

    backend = EngineBackend.load(options.model, **engine_arguments(options))
    names = options.served_model_name or [default_name(options.model)]
    app_options = AppOptions(
        model_names=tuple(names),
        adapters=tuple(options.adapters()),
        api_keys=tuple(options.api_key),
        max_in_flight=options.max_in_flight,
        max_body_bytes=options.max_body_bytes,
        max_tokens=options.max_tokens,
        chat_template=template,
    )
    return create_app(backend, app_options)


def engine_arguments(options: ServeOptions) -> dict[str, Any]:
    """The keyword arguments of `serval.LLM`; what was not chosen is left to it."""
    chosen = {
        name: getattr(options, name)
        for name in (
            "kv",
            "policy",
            "max_model_len",
            "cache_bytes",
            "max_sequences",
            "max_batch_tokens",
            "block_size",
            "prefix_caching",
            "dtype",
            "seed",
        )
    }
    if options.dtype is not None:
        import torch

        chosen["dtype"] = getattr(torch, options.dtype)
    chosen["lora"] = options.adapters() or None
    return {name: value for name, value in chosen.items() if value is not None} | options.engine


def default_name(model: str) -> str:
    """What clients call the model when nobody chose a name: a directory's last part, a hub name
    as it is."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is noticed before loading."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port "
            "or --host"
        ) from error
    listener.set_inheritable(False)
    return listener


def _serve(app: FastAPI, listener: socket.socket, options: ServeOptions, began: float) -> int:
    import uvicorn

    from serval.server.draining import DrainingServer

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning" if options.log_level == "info" else options.log_level,
        access_log=options.log_level == "debug",
        server_header=False,
        timeout_keep_alive=30,
        # The application's own deadline ends requests first; this is the net below it.
        timeout_graceful_shutdown=int(options.drain_seconds) + 10,
        ws="none",
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    state = app.state.serval

    def ready() -> None:
        took = time.perf_counter() - began
        print(
            f"Serving {state.model} at {url} (chat page: {url}/, API: {url}/v1), context "
            f"{state.max_model_len} tokens, ready in {took:.1f} s",
            flush=True,
        )
        if host not in ("127.0.0.1", "::1") and not options.api_key:
            print(f"warning: anyone who reaches {url} can use it; set --api-key", file=sys.stderr)

    return DrainingServer(config, state, options.drain_seconds, ready).serve_on(listener)
