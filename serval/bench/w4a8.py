"""Linear layers with 4-bit weights and 8-bit activations at the shapes of Llama-3.2-1B and
Llama-3.1-8B, against torch and ggml, and the scale forms against each other.

A measured unit is one product [M, K] x [N, K]^T, quantisation of the activations included. Up to
eight rows the weights are used in turn from more copies than the caches hold, so each comes from
memory. Floor: the weight's bytes at measured read bandwidth, or the operations at the roof of
integer dot products in registers, whichever is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from serval import kernels
from serval.bench import ggml
from serval.bench.harness import (
    Case,
    Contestant,
    MissingPeerError,
    Sample,
    Setup,
    compare,
    paired_rounds,
)
from serval.bench.w4a8_gpu import collect_gpu, random_weight
from serval.kernels import PackedWeight
from serval.kernels.bandwidth import int4_roof, int8_roof, read_bandwidth

SHAPES = {  # [N, K]
    "1b-q": (2048, 2048),
    "1b-k": (512, 2048),
    "1b-gate": (8192, 2048),
    "1b-down": (2048, 8192),
    "8b-q": (4096, 4096),
    "8b-k": (1024, 4096),
    "8b-gate": (14336, 4096),
    "8b-down": (4096, 14336),
}
ROWS = (1, 8, 64, 512)
SCHEMES: dict[str, tuple[int, int | None, str]] = {  # bits, group, scales
    "w4a8-channel": (4, None, "channel"),
    "w4a8-integer-g128": (4, 128, "integer"),
    "w4a8-integer-g32": (4, 32, "integer"),
    "w4a8-float-g128": (4, 128, "float"),
    "w4a8-float-g32": (4, 32, "float"),
    "w8a8-channel": (8, None, "channel"),
}
FLOAT, INT8, GGML = "torch float32", "torch._int_mm int8", "ggml Q4_0 repacked"
PEERS = {  # of each scheme: engines, or another scheme of ours
    "w4a8-channel": (FLOAT, GGML),
    "w4a8-integer-g128": ("w4a8-channel", FLOAT, GGML, INT8),
    "w4a8-integer-g32": ("w4a8-channel", GGML),
    "w4a8-float-g128": ("w4a8-integer-g128",),
    "w4a8-float-g32": ("w4a8-integer-g32",),
    "w8a8-channel": (FLOAT,),
}
FEW = 8  # rows up to which weights come from memory
STREAMED = 256 << 20  # bytes of weights between two uses of the same one
INT8_ROWS = 64  # where torch's int8 product is measured: it needs more than 16 rows


def _repeat(calls: list[Callable[[], Any]], seconds: float) -> Callable[[], Sample]:
    """A measurement of one of `calls`, used in turn for at least `seconds` a round."""

    def measure() -> Sample:
        done, begin, cpu = 0, time.perf_counter(), time.process_time()
        while True:
            for call in calls:
                call()
            done += len(calls)
            elapsed = time.perf_counter() - begin
            if elapsed >= seconds:
                return Sample(elapsed / done, (time.process_time() - cpu) / done)

    return measure


def _clone(packed: PackedWeight) -> PackedWeight:
    scales = packed.group_scales
    return packed._replace(
        data=packed.data.clone(),
        factor=packed.factor.clone(),
        group_scales=None if scales is None else scales.clone(),
    )


class _Shape:
    """One weight shape: the contestants at one number of rows, made when asked for."""

    def __init__(self, n: int, k: int, seconds: float, streamed: int) -> None:
        self.n, self.k, self.seconds, self.streamed = n, k, seconds, streamed
        self.packed: dict[str, PackedWeight] = {}
        self.products: list[ggml.Product] = []

    def close(self) -> None:
        """Free what ggml holds."""
        for product in self.products:
            product.close()
        self.products.clear()

    def copies(self, nbytes: int, rows: int) -> int:
        """How many weights of `nbytes` are used in turn."""
        return max(2, -(-self.streamed // nbytes)) if rows <= FEW else 2

    def ours(self, scheme: str, rows: int) -> list[Callable[[], Any]]:
        if scheme not in self.packed:
            self.packed[scheme] = random_weight(self.n, self.k, *SCHEMES[scheme], "cpu")
        weight = self.packed[scheme]
        x = torch.randn(rows, self.k)
        weights = [weight] + [_clone(weight) for _ in range(self.copies(weight.nbytes, rows) - 1)]
        return [partial(kernels.quantized_linear, x, each) for each in weights]

    def float32(self, rows: int) -> list[Callable[[], Any]]:
        x, count = torch.randn(rows, self.k), self.copies(4 * self.n * self.k, rows)
        weights = [torch.randn(self.n, self.k) for _ in range(count)]
        return [partial(functional.linear, x, each) for each in weights]

    def int8(self, rows: int) -> list[Callable[[], Any]]:
        x = torch.randint(-127, 128, (rows, self.k), dtype=torch.int8)
        weight = torch.randint(-127, 128, (self.n, self.k), dtype=torch.int8)
        return [partial(torch._int_mm, x, weight.T)]

    def ggml(self, rows: int) -> list[Callable[[], Any]]:
        block = ggml.quantize_q4_0(torch.randn(64, self.k))  # speed does not depend on values
        stored = np.tile(block, (-(-self.n // 64), 1))[: self.n]
        count = self.copies(stored.nbytes, rows)
        product = ggml.Product(stored, rows, torch.get_num_threads(), count)
        self.products.append(product)
        if not product.repacked:
            raise MissingPeerError("ggml with repacking", "pip install 'serval-llm[bench]'")
        product.set_input(torch.randn(rows, self.k))
        return [partial(product.run, index) for index in range(count)]

    def contestant(self, name: str, rows: int) -> Contestant:
        makers: dict[str, Callable[[int], list[Callable[[], Any]]]] = {
            FLOAT: self.float32,
            INT8: self.int8,
            GGML: self.ggml,
        }
        make = makers.get(name) or partial(self.ours, name)
        held: list[Callable[[], Sample]] = []

        def measure() -> Sample:
            if not held:
                calls = make(rows)
                for call in calls:
                    call()
                held.append(_repeat(calls, self.seconds))
            return held[0]()

        return Contestant(name, measure)


def _floor(scheme: str, nbytes: int, operations: float) -> tuple[float, float]:
    """Least seconds for reading the weight, and for the arithmetic."""
    roof = int4_roof() if SCHEMES[scheme][0] == 4 else int8_roof()
    return nbytes / (read_bandwidth() * 1e9), operations / (roof * 1e9) if roof else 0.0


def _cases(name: str, shape: _Shape, rows: int, setup: Setup) -> list[Case]:
    wanted = {
        scheme: case for scheme in PEERS if setup.wants(case := f"{scheme}-{name}-rows{rows}")
    }
    if not wanted:
        return []
    setup.note(f"[{shape.n}, {shape.k}], {rows} rows")
    peers = {s: [p for p in PEERS[s] if p != INT8 or rows == INT8_ROWS] for s in wanted}
    names = dict.fromkeys([*wanted, *(peer for group in peers.values() for peer in group)])
    contestants = [shape.contestant(each, rows) for each in names]
    outcomes = paired_rounds(contestants, 1 if setup.quick else 5, lambda line: None)
    shape.close()
    threads, operations = torch.get_num_threads(), 2.0 * rows * shape.n * shape.k
    cases = []
    for scheme, case in wanted.items():
        ours, nbytes = outcomes[scheme], shape.packed[scheme].nbytes
        metrics: dict[str, Any] = {}
        floor = None
        if ours.samples:
            metrics["gop_per_s_per_core"] = operations / ours.seconds / 1e9 / threads
            if rows <= FEW:
                metrics["gb_per_s"] = nbytes / ours.seconds / 1e9
        if not setup.quick:
            reading, computing = _floor(scheme, nbytes, operations)
            floor = max(reading if rows <= FEW else 0.0, computing)
        cases += [
            compare(case, ours, outcomes[peer], floor_seconds=floor, metrics=metrics)
            for peer in peers[scheme]
        ]
    return cases


def collect(setup: Setup) -> list[Case]:
    """Every scheme, shape and number of rows on the CPU, then on a GPU where there is one."""
    shapes = {"tiny": (96, 128)} if setup.quick else SHAPES
    cases: list[Case] = []
    for name, (n, k) in shapes.items():
        shape = _Shape(n, k, *((0.001, 0) if setup.quick else (0.03, STREAMED)))
        for rows in ROWS[:2] if setup.quick else ROWS:
            cases += _cases(name, shape, rows, setup)
    return cases + collect_gpu(setup)
