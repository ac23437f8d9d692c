"""Child processes that end with their parent, however the parent ends.

As a script, `python child.py PARENT COMMAND...` ties itself to the process PARENT and becomes the
command. It imports nothing of Serval, so a command starts as fast as without it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tied(command: Sequence[str]) -> list[str]:
    """`command`, started so that it ends with this process."""
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), *command]


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM raises SystemExit(143), so that `with` blocks clean up; by default
    Python would end at once. Outside the main thread, where no handler can be set, does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _become(parent: int, command: list[str]) -> None:
    end_with_parent()
    if os.getppid() != parent:  # it ended before the kernel was asked
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
