"""Compressing weights: quantised modules that take the place of linears, embeddings and experts.

    result = run(CompressOptions("assets/serval-tiny", "out", weights="int8"))

A compressor (`COMPRESSORS`, one file per method) is a dataclass whose fields are the method's
parameters; see `Compressor` for what it implements. `targets.py` knows which modules of a decoder
may be replaced and how they are called in a checkpoint, `install.py` puts quantised modules
(`modules.py`, `expert_stack.py`) in their place, `storage.py` and `compressed_tensors.py` translate
to and from compressed-tensors' files, `pipeline.py` is the `serval compress` command.
"""

from __future__ import annotations

from serval.compress.compressor import CompressionReport, Compressor
from serval.compress.pipeline import CompressOptions, CompressResult, run
from serval.compress.registry import COMPRESSORS

__all__ = [
    "COMPRESSORS",
    "CompressOptions",
    "CompressResult",
    "CompressionReport",
    "Compressor",
    "run",
]
