"""uvicorn with a graceful end.

The first SIGTERM or SIGINT stops accepting, lets running requests finish for `drain_seconds`, ends
those that remain with an error their clients can read, and exits with 0. A second signal exits at
once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from serval.server.errors import APIError
from serval.server.state import State


class DrainingServer(uvicorn.Server):
    """Serves an application whose state is `state`; calls `ready` once it listens."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: State,
        drain_seconds: float,
        ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.state, self.drain_seconds, self.ready = state, drain_seconds, ready

    def serve_on(self, listener: socket.socket) -> int:
        """Serve on a bound socket until a signal arrives; returns the exit code."""
        self.run(sockets=[listener])
        return 0 if self.started else 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end, which would hide the exit code."""
        handlers = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # asked twice: nothing is worth waiting for
        self.should_exit = True
        self.state.admission.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        error = APIError(503, "the server shut down before the answer was finished")
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self.drain_seconds, self.state.backend.interrupt, error)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()
