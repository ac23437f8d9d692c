"""`AsyncLLM`: the step loop in one thread, requests and results on an asyncio loop.

The event loop never waits for a step: submissions and cancellations go to the worker through a
queue, deltas come back in one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from serval.engine.engine import EngineStats
from serval.engine.params import SamplingParams
from serval.engine.request import Delta, Request
from serval.errors import EngineStoppedError, RequestError

if TYPE_CHECKING:
    from serval.engine.llm import LLM

logger = logging.getLogger(__name__)

STOPPED = "the engine has stopped after an internal error; restart the process"


class RequestStream:
    """The deltas of one request, in the event loop that submitted it: `async for delta in stream`.

    Ends when all continuations are finished.
    """

    def __init__(self, owner: AsyncLLM, request_id: str, count: int) -> None:
        self.request_id = request_id
        self.request: Request | None = None
        self._owner, self._open = owner, count
        self._queue: asyncio.Queue[Delta | EngineStoppedError] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def push(self, delta: Delta | EngineStoppedError) -> None:
        """Called in the event loop; an error is raised to the listener."""
        self._queue.put_nowait(delta)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        if self._open <= 0:
            raise StopAsyncIteration
        delta = await self._queue.get()
        if isinstance(delta, EngineStoppedError):
            self._open = 0
            raise delta
        if delta.finish_reason is not None:
            self._open -= 1
        return delta

    def ready(self) -> list[Delta]:
        """The deltas that have arrived already; for listeners that fell behind."""
        found = []
        while self._open > 0 and not self._queue.empty():
            delta = self._queue.get_nowait()
            if isinstance(delta, EngineStoppedError):
                self._queue.put_nowait(delta)  # nothing comes after it
                break
            if delta.finish_reason is not None:
                self._open -= 1
            found.append(delta)
        return found

    def abort(self) -> None:
        """Cancel what is still running."""
        self._owner.abort(self.request_id)


class AsyncLLM:
    """Serve many requests at once from an `LLM`, whose engine it steps in a thread of its own."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine = llm, llm.engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outbox: list[tuple[RequestStream, Delta]] = []
        self._open: dict[str, bool] = {}  # request id -> still wanted
        self._streams: dict[str, RequestStream] = {}  # of the requests in _open
        self._draining = False
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="serval-engine", daemon=True)
        self._thread.start()

    async def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
        lora: str | None = None,
    ) -> RequestStream:
        """Queue a prompt; returns its stream. lora: the adapter to answer with. Raises
        `RequestError`, or `EngineStoppedError` when the engine's thread has ended; then nothing is
        queued."""
        if self._draining:
            raise RequestError("the engine is shutting down and takes no new requests")
        if not self.alive:
            raise EngineStoppedError(STOPPED)
        request_id = request_id or f"request-{uuid.uuid4().hex}"
        if request_id in self._open:
            raise RequestError(f"request id {request_id!r} is already in use")
        params = params or SamplingParams()
        stream = RequestStream(self, request_id, params.n)

        def prepare() -> Request:
            return self.engine.prepare(
                self.llm.encode(prompt, add_special_tokens),
                params,
                prompt=prompt if isinstance(prompt, str) else None,
                request_id=request_id,
                on_delta=lambda delta: self._outbox.append((stream, delta)),
                lora=lora,
            )

        self._open[request_id] = True
        self._streams[request_id] = stream
        try:
            # A grammar may take long to compile and a long text to tokenise: not in the event loop.
            request = await asyncio.to_thread(prepare)
        except BaseException:
            self._forget(request_id)
            raise
        stream.request = request
        self._commands.put(lambda: self._submit(request))
        if not self.alive:  # it ended meanwhile: nobody takes commands any more
            self._forget(request_id)
            raise EngineStoppedError(STOPPED)
        return stream

    async def stream(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        add_special_tokens: bool = True,
        lora: str | None = None,
    ) -> AsyncIterator[Delta]:
        """Continue a prompt, giving each `Delta` as it is made. A caller that stops listening, or
        is cancelled, cancels the request."""
        stream = await self.submit(
            prompt,
            params,
            request_id=request_id,
            add_special_tokens=add_special_tokens,
            lora=lora,
        )
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.abort()

    def abort(self, request_id: str) -> None:
        """Cancel a request: its blocks are free before the next step. Unknown ids are ignored."""
        if request_id in self._open:
            self._open[request_id] = False
            self._commands.put(lambda: self._abort(request_id))

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._stopped

    def stats(self) -> EngineStats:
        """A snapshot of what the engine is doing."""
        return self.engine.stats()

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests and wait for those that run. After `timeout` seconds the rest is
        cancelled; returns whether all of them finished by themselves."""
        self._draining = True
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while self._open and (end is None or loop.time() < end):
            await asyncio.sleep(0.02)
        clean = not self._open
        for request_id in list(self._open):
            self.abort(request_id)
        while self._open and self._thread.is_alive():
            await asyncio.sleep(0.005)
        return clean

    def shutdown(self) -> None:
        """Cancel everything and end the thread."""
        self._draining = True
        self._commands.put(None)
        self._thread.join()

    # In the worker thread

    def _work(self) -> None:
        try:
            self._loop()
        except BaseException:
            logger.critical("the engine's thread ended by an error", exc_info=True)
            raise
        finally:
            self._stop()

    def _stop(self) -> None:
        """Nothing runs from here on: whoever still waits is told so."""
        self._stopped = True
        for stream in list(self._streams.values()):
            with suppress(RuntimeError):  # its loop is closed: nobody listens any more
                stream.loop.call_soon_threadsafe(stream.push, EngineStoppedError(STOPPED))
        self._streams.clear()
        self._open.clear()

    def _forget(self, request_id: str) -> None:
        self._open.pop(request_id, None)
        self._streams.pop(request_id, None)

    def _loop(self) -> None:
        while True:
            if not self._run_commands():
                break
            with self.llm.lock:
                try:
                    self.engine.step()
                except Exception:
                    # The engine has cancelled its requests, whose clients are told; it goes on.
                    logger.exception("a step of the engine failed")
            self._flush()
        with self.llm.lock:
            self.engine.abort_all("the engine was shut down")
        self._flush()

    def _run_commands(self) -> bool:
        """Carry out what was asked since the last step; waits while there is nothing to do."""
        while True:
            try:
                command = self._commands.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            with self.llm.lock:
                try:
                    command()
                except Exception:
                    logger.exception("the engine could not carry out a command")
            if self._outbox:
                self._flush()

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except RequestError as error:  # its id is in use by LLM.generate
            self.engine.refuse(request, str(error))
            self._forget(request.request_id)
            return
        if not self._open.get(request.request_id, False):  # cancelled while it was prepared
            self.engine.abort(request.request_id)

    def _abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def _flush(self) -> None:
        """Hand the step's deltas to their event loops, one wake-up per loop."""
        outbox, self._outbox = self._outbox, []
        loops: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Delta]]] = {}
        for stream, delta in outbox:
            loops.setdefault(stream.loop, []).append((stream, delta))
            if delta.finish_reason is not None and stream.request_id not in self.engine.requests:
                self._forget(stream.request_id)
        for loop, deltas in loops.items():
            try:
                loop.call_soon_threadsafe(_push_all, deltas)
            except RuntimeError:  # that loop is closed: nobody listens any more
                for stream, _ in deltas:
                    self.engine.abort(stream.request_id)


def _push_all(deltas: list[tuple[RequestStream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.push(delta)
