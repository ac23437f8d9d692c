"""A real server in a thread, and what tests ask of it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI


class LiveServer:
    """Runs an application with uvicorn on a free loopback port; use as a context manager."""

    def __init__(self, app: FastAPI, backend: Any) -> None:
        self.app, self.backend = app, backend
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self) -> LiveServer:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.server.started
        return self

    def __exit__(self, *exc: Any) -> None:
        self.server.should_exit = True
        self._thread.join()
        self.listener.close()

    @property
    def used_blocks(self) -> int:
        """Cache blocks that live sequences hold."""
        return self.backend.llm.engine.manager.used_blocks

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Wait until no sequence is left; fails when one stays."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            idle = self.backend.llm.engine.idle and not self.backend.live
            if idle and not self.app.state.serval.admission.in_flight:
                break
            time.sleep(0.01)
        assert self.app.state.serval.admission.in_flight == 0
        assert not self.backend.live
        assert self.used_blocks == 0

    def check_integrity(self) -> None:
        """Nothing runs, no block is held, and the cache's books agree."""
        self.wait_idle()
        with self.backend.llm.lock:
            self.backend.llm.engine.manager.check_integrity()
