"""Compresses a checkpoint and kills its own process, as `kill -9` would, after some parts."""

from __future__ import annotations

import os
import signal
import sys

from serval.compress import Calibration, CompressOptions, run

if __name__ == "__main__":
    source, out, weights, after = sys.argv[1:]

    def note(line: str) -> None:
        global finished
        finished += 1
        if finished == int(after):
            os.kill(os.getpid(), signal.SIGKILL)

    finished = 0
    run(
        CompressOptions(
            source,
            out,
            weights=weights,
            group_size=4,
            calibration=Calibration("random", samples=3, length=20),
        ),
        note=note,
    )
