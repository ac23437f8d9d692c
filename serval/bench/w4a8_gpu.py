"""Quantised linear layers on a GPU against cuBLAS in bfloat16; no cases where there is no GPU.

A measured unit is one product [M, K] x [N, K]^T, quantisation of the activations included. Layers
are run in a CUDA graph, one after another, over enough copies of the weight that none is found in
the L2 cache: what is timed is the device, not Python. Floor: the weight's bytes at measured
bandwidth, or the operations at the measured roof of their dtype, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from serval import kernels
from serval.bench.harness import Case, Contestant, Sample, Setup, compare, paired_rounds
from serval.kernels import PackedWeight

SHAPES = {  # [N, K] of gate and up together, and of the output projection
    "llama-1b-gate-up": (16384, 2048),
    "llama-8b-gate-up": (28672, 4096),
    "llama-8b-o": (4096, 4096),
}
ROWS = (1, 8, 64, 512, 4096)
SCHEMES: dict[str, tuple[int, int | None, str, str]] = {  # bits, group, scales, activations
    "w4a8-channel": (4, None, "channel", "token"),
    "w4a8-integer-g128": (4, 128, "integer", "token"),
    "w4a8-integer-g32": (4, 32, "integer", "token"),
    "w4a8-float-g128": (4, 128, "float", "token"),
    "w8a8-channel": (8, None, "channel", "token"),
    "w4a16-float-g128": (4, 128, "float", "none"),
}
STREAMED = 256 << 20  # bytes of weights between two uses of the same one: several L2 caches
PEER = "cuBLAS bfloat16"


def random_weight(
    rows: int, columns: int, bits: int, group: int | None, mode: str, device: str
) -> PackedWeight:
    """A packed weight of random codes."""
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), dtype=torch.int8, device=device)
    scales = torch.rand(rows, columns // (group or columns), device=device) * 1e-3 + 1e-3
    if mode != "integer":
        return kernels.pack_weight(codes, scales, bits=bits, group_size=group)
    integer = torch.randint(20, 60, scales.shape, dtype=torch.int16, device=device)
    factor = torch.full((rows,), 1e-5, device=device)
    return kernels.pack_weight(
        codes, scales, bits=bits, group_size=group, integer=integer, row_factor=factor
    )


def _timed(run: Callable[[], object], times: int) -> float:
    """Seconds of one `run`, on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One CUDA graph of all `calls`, compiled and warmed up before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def contestant(name: str, calls: Sequence[Callable[[], object]]) -> Contestant:
    """Seconds of one of `calls`, which do equal work on different weights."""
    run = captured(calls)

    def measure() -> Sample:
        run()
        estimate = max(_timed(run, 1), 1e-6)
        return Sample(_timed(run, max(3, int(0.05 / estimate))) / len(calls))

    return Contestant(name, measure)


@dataclass(frozen=True)
class Roofs:
    """Bytes per second of a copy, operations per second of large int8 and bfloat16 products."""

    bandwidth: float
    int8: float
    bfloat16: float

    @classmethod
    def measured(cls) -> Roofs:
        """Of the current CUDA device."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        size = 8192
        small = torch.ones(size, size, dtype=torch.int8, device="cuda")
        wide = small.bfloat16()
        runs = [
            partial(target.copy_, source),
            partial(torch._int_mm, small, small.T),
            partial(torch.mm, wide, wide.T),
        ]
        seconds = []
        for run in runs:
            run()
            seconds.append(_timed(run, 10))
        operations = 2.0 * size**3
        return cls(
            2 * source.numel() / seconds[0], operations / seconds[1], operations / seconds[2]
        )

    def floor(self, nbytes: int, rows: int, n: int, k: int, activations: str) -> float:
        """Least seconds of a product with a weight [n, k] of `nbytes`."""
        operations = self.bfloat16 if activations == "none" else self.int8
        return max(nbytes / self.bandwidth, 2.0 * rows * n * k / operations)


def copies(nbytes: int) -> int:
    """Weights of `nbytes` that are used in turn."""
    return max(2, -(-STREAMED // nbytes))


def collect_gpu(setup: Setup) -> list[Case]:
    """Every scheme, shape and number of rows; no cases without a CUDA device."""
    if not torch.cuda.is_available():
        return []
    roofs = Roofs.measured()
    cases: list[Case] = []
    for shape, (n, k) in list(SHAPES.items())[-1 if setup.quick else 0 :]:
        count = copies(2 * n * k)
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(count)]
        for scheme, settings in SCHEMES.items():
            names = {rows: f"gpu-{scheme}-{shape}-rows{rows}" for rows in ROWS}
            wanted = {rows: name for rows, name in names.items() if setup.wants(name)}
            if not wanted:
                continue
            made = random_weight(n, k, *settings[:3], "cuda")
            weights = [made] + [
                random_weight(n, k, *settings[:3], "cuda") for _ in range(copies(made.nbytes) - 1)
            ]
            for rows, name in wanted.items():
                setup.note(name)
                floor = roofs.floor(made.nbytes, rows, n, k, settings[3])
                cases.append(_case(name, rows, weights, dense, settings[3], floor, setup))
    return cases


def _case(
    name: str,
    rows: int,
    weights: Sequence[PackedWeight],
    dense: Sequence[Tensor],
    activations: str,
    floor: float,
    setup: Setup,
) -> Case:
    x = torch.randn(rows, weights[0].inputs, dtype=torch.bfloat16, device="cuda")
    linear = partial(kernels.quantized_linear, x, activations=activations)
    contestants = [
        contestant(name, [partial(linear, packed) for packed in weights]),
        contestant(PEER, [partial(functional.linear, x, weight) for weight in dense]),
    ]
    outcomes = paired_rounds(contestants, 2 if setup.quick else 5, setup.note)
    metrics = {"device": torch.cuda.get_device_name()}
    return compare(name, outcomes[name], outcomes[PEER], floor_seconds=floor, metrics=metrics)
