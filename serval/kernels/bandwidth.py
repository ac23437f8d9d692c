"""What this machine can do: the roofs against which benchmarks state a fraction.

Each function measures for a fraction of a second and returns the best of several repeats, because
other work on the machine can only make a repeat slower. Results are cached per number of threads.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass

import torch

from serval.kernels import jit

_READ = jit.Kernel("probe", "probe_read", "plpi")
_FMA = jit.Kernel("probe", "probe_fma", "lipi")
_INT8 = jit.Kernel("probe", "probe_int8", "lipi")
_INT4 = jit.Kernel("probe", "probe_int4", "lipi")


@dataclass(frozen=True)
class Roofs:
    """Measured limits; units in the names. A zero means that it could not be measured without a
    compiler."""

    threads: int
    read_gb_per_s: float
    float32_gflop_per_s: float
    int8_gop_per_s: float

    def to_dict(self) -> dict[str, float]:
        """As a JSON-ready dict."""
        return asdict(self)


def read_bandwidth(threads: int | None = None, *, megabytes: int = 256, repeats: int = 7) -> float:
    """GB/s of `threads` threads (default: torch's) reading a buffer far larger than the caches."""
    return _read_bandwidth(threads or torch.get_num_threads(), megabytes, repeats)


@functools.cache
def _read_bandwidth(threads: int, megabytes: int, repeats: int) -> float:
    return measure_read_bandwidth(threads, megabytes, repeats)


def measure_read_bandwidth(threads: int, megabytes: int = 256, repeats: int = 7) -> float:
    """As `read_bandwidth`, measured anew: on a machine that others use too, the roof moves."""
    buffer = torch.ones(megabytes * 2**20 // 4)
    out = torch.zeros(threads)
    function = _READ.get()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        if function is not None:
            function(buffer.data_ptr(), buffer.numel(), out.data_ptr(), threads)
        else:
            buffer.sum()
        best = min(best, time.perf_counter() - begin)
    return buffer.nbytes / best / 1e9


@functools.cache
def _compute(kind: str, threads: int) -> float:
    """Giga-operations per second of independent multiply-adds in registers, over all threads."""
    function = {"float32": _FMA, "int8": _INT8, "int4": _INT4}[kind].get()
    if function is None:
        return 0.0
    seconds = torch.zeros(threads)
    rounds, repeats = 20_000, 400  # tens of microseconds each: other work may hit many of them
    operations = function(rounds, repeats, seconds.data_ptr(), threads)
    return rounds * 12 * operations * float(seconds.reciprocal().sum()) / 1e9


def float32_roof(threads: int | None = None) -> float:
    """GFLOP/s of float32 multiply-adds in registers."""
    return _compute("float32", threads or torch.get_num_threads())


def int8_roof(threads: int | None = None) -> float:
    """GOP/s of the 8-bit dot products that `quantized_linear` uses on this CPU, in registers."""
    return _compute("int8", threads or torch.get_num_threads())


def int4_roof(threads: int | None = None) -> float:
    """GOP/s of the products of 4-bit weights and 8-bit activations, in registers."""
    return _compute("int4", threads or torch.get_num_threads())


@functools.cache
def matmul_roof(size: int = 2048, repeats: int = 10) -> float:
    """GFLOP/s of a large float32 matrix product with torch's threads: what a library reaches of
    `float32_roof`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def roofs(threads: int | None = None) -> Roofs:
    """All limits for `threads` threads (default: torch's)."""
    threads = threads or torch.get_num_threads()
    return Roofs(threads, read_bandwidth(threads), float32_roof(threads), int8_roof(threads))
