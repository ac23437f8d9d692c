"""An engine in a process of its own: its memory is counted honestly and really given back.

The child is `python -m serval.bench.worker FD`; it receives (class path, arguments), builds that
object, and answers method calls over a pipe. `WorkerPool` keeps workers alive while they fit into
memory and ends the largest ones when they do not.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serval.bench.child import end_with_parent
from serval.bench.harness import MissingPeerError
from serval.bench.machine import memory_bytes
from serval.errors import ServalError


class WorkerError(ServalError):
    """A call in a worker process failed; the text ends with the child's error."""


class Worker:
    """One object in a child process. target: "module:Class"; threads: OpenMP threads it gets."""

    def __init__(self, target: str, arguments: dict[str, Any], threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the worker
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serval.bench.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        self._pipe = ours
        self._name = target
        self.prepared_for: object = None  # for whoever uses it: what state it was put in
        try:
            self._ask(("make", target, arguments))
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object; raises MissingPeerError or WorkerError."""
        return self._ask(("call", method, arguments))

    def resident_bytes(self) -> int:
        """Resident memory of the child now."""
        return _status_bytes(self._process.pid, "VmRSS")

    def peak_bytes(self) -> int:
        """Largest resident memory of the child so far."""
        return _status_bytes(self._process.pid, "VmHWM")

    def _ask(self, message: tuple[Any, ...]) -> Any:
        try:
            self._pipe.send(message)
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            reason = "out of memory?" if code == -9 else self._tail()
            raise WorkerError(f"{self._name} ended with code {code}: {reason}") from error
        if kind == "missing":
            raise MissingPeerError(*value)
        if kind == "error":
            raise WorkerError(f"{self._name}: {value}")
        return value

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-500:]

    def close(self) -> None:
        self._pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _status_bytes(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


class WorkerPool:
    """Workers by name, started when first called.

    A worker is given with an estimate of its bytes; before one starts, the largest of the others
    end until the estimate fits into the memory that is available (less a reserve).
    """

    def __init__(self, threads: int, reserve: int = 2 * 2**30) -> None:
        self.threads, self.reserve = threads, reserve
        self._workers: dict[str, Worker] = {}
        self._estimates: dict[str, int] = {}

    def get(self, name: str, target: str, arguments: dict[str, Any], estimate: int) -> Worker:
        """The worker `name`, started if it is not running."""
        if name not in self._workers:
            while self._workers and memory_bytes() - self.reserve < estimate:
                self.end(max(self._workers, key=lambda other: self._estimates[other]))
            self._workers[name] = Worker(target, arguments, self.threads)
            self._estimates[name] = estimate
        return self._workers[name]

    def end(self, name: str) -> None:
        """End the worker `name` if it runs; its memory returns to the machine."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        for name in list(self._workers):
            self.end(name)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection) -> None:
    instance: Any = None
    while True:
        try:
            action, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if action == "make":
                module, _, attribute = name.partition(":")
                instance = getattr(importlib.import_module(module), attribute)(**arguments)
                answer: tuple[str, Any] = ("value", None)
            else:
                answer = ("value", getattr(instance, name)(*arguments))
        except MissingPeerError as error:
            answer = ("missing", (error.peer, error.install))
        except BaseException as error:
            traceback.print_exc()
            answer = ("error", f"{type(error).__name__}: {error}")
        pipe.send(answer)


if __name__ == "__main__":
    end_with_parent()
    _serve(Connection(int(sys.argv[1])))
