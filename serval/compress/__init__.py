"""Compressing weights: quantised modules that take the place of linears, embeddings and experts.

    result = run(CompressOptions("assets/serval-tiny", "out", weights="gptq"))
    compress_decoder(decoder, Method(weights="rtn", bits=4, group_size=64))

A method is one file and one line in `RECIPES`; `recipe.py` says what it implements and `block.py`
what it sees. `blockwise.py` takes a decoder through a method part by part, `pipeline.py` is the
`serval compress` command around it. `install.py` puts quantised modules (`modules.py`,
`expert_stack.py`) into a decoder; `storage.py` and `compressed_tensors.py` translate to and from
compressed-tensors' files. `maskprune/` removes heads and channels instead (`serval prune`).
"""

from __future__ import annotations

from serval.compress.calibrate import Calibration
from serval.compress.method import Method
from serval.compress.pipeline import (
    Compression,
    CompressOptions,
    CompressResult,
    compress_decoder,
    run,
)
from serval.compress.registry import PRUNERS, RECIPES, ROTATIONS

__all__ = [
    "PRUNERS",
    "RECIPES",
    "ROTATIONS",
    "Calibration",
    "CompressOptions",
    "CompressResult",
    "Compression",
    "Method",
    "compress_decoder",
    "run",
]
