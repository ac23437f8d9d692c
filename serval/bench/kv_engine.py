"""Decoding with a cache of 2 bits against the full cache: whole engine steps at the Llama-3.2-1B
shape, int8 weights, one sequence of 32K tokens; tokens/s and resident memory.

Both engines hold random keys and values of the context when the clock starts, as in decode.py. The
floor is weights and cache read once at the measured read bandwidth.
"""

from __future__ import annotations

import torch

from serval.bench.harness import Case, Sample, Setup, compare, paired_rounds
from serval.bench.language_models import Bench, EngineSpec, serval
from serval.bench.shapes import SHAPES
from serval.bench.worker import Worker, WorkerPool
from serval.kernels.bandwidth import read_bandwidth

STEPS = 24  # of a round


def collect(setup: Setup) -> list[Case]:
    """`oscar` with `full` as its peer, batch 1."""
    shape, context, rounds = "llama-1b", 32768, 3
    if setup.quick:
        shape, context, rounds = "tiny", 128, 1
    name = f"oscar-engine-{shape}-decode-batch1-ctx{context}"
    if not setup.wants(name):
        return []
    setup.note(name)
    threads = torch.get_num_threads()
    ours = serval("int8, oscar cache", weights="int8", kv="oscar")
    peer = serval("int8, full cache", weights="int8", kv="full")

    def work(worker: Worker) -> Sample:
        wall, cpu = worker.call("decode", STEPS)
        return Sample(wall / STEPS, cpu / STEPS)

    with WorkerPool(threads) as pool:
        bench = Bench(shape, SHAPES[shape], pool)

        def prepared(worker: Worker) -> None:
            worker.call("fill", 1, context, STEPS)

        specs: tuple[EngineSpec, ...] = (ours, peer)
        outcomes = paired_rounds(
            [bench.contestant(spec, 1, context + STEPS, work, prepared) for spec in specs],
            rounds,
            setup.note,
        )
        mine = outcomes[ours.label]
        floor = None
        if mine.samples and not setup.quick:
            facts = bench.facts[ours.label]
            cached = context * facts["cache_bytes_per_token"]
            floor = (facts["weight_bytes"] + cached) / (read_bandwidth() * 1e9)
        metrics = bench.metrics(mine, outcomes[peer.label], 1)
        return [compare(name, mine, outcomes[peer.label], floor_seconds=floor, metrics=metrics)]
