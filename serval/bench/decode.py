"""Decoding tokens/s at the Llama-3.2-1B shape with random weights, against transformers,
llama.cpp and, for W4A8, OpenVINO GenAI (contexts of 512 only).

The caches hold `context` tokens of random keys and values when the clock starts; a measured unit is
one step of one token for each sequence of the batch, greedy. Floor: the bytes that a step must
read, weights once and each sequence's keys and values once, at the measured read bandwidth.
"""

from __future__ import annotations

from serval.bench.harness import Case, Outcome, Sample, Setup, compare, paired_rounds
from serval.bench.language_models import (
    Bench,
    Engines,
    EngineSpec,
    for_size,
    llama_cpp,
    openvino,
    serval,
    transformers,
)
from serval.bench.shapes import SHAPES
from serval.bench.worker import Worker, WorkerPool
from serval.kernels.bandwidth import read_bandwidth

SECONDS = 2.0  # of one contestant's share of a round
ROOM = 64  # most steps of a round


def engines(threads: int) -> Engines:
    """Ours by the word that case names begin with, each with its peers."""
    exact = [transformers("static"), transformers("dynamic"), llama_cpp("F16", threads)]
    small, smallest = [llama_cpp("Q8_0", threads)], [llama_cpp("Q4_0", threads), openvino(threads)]
    return {
        "float32": (serval("float32"), exact),
        "int8": (serval("int8", weights="int8"), small),
        "int8-kv8": (serval("int8, int8 cache", weights="int8", kv="int8"), small),
        "w4a8": (serval("W4A8 per channel", weights="w4a8"), smallest),
        "w4a8g128": (serval("W4A8 g128", weights="w4a8-g128"), smallest),
        "w4a8g128-head4": (
            serval("W4A8 g128, 4-bit head", weights="w4a8-g128", head=4),
            smallest,
        ),
        "w4a8g128-kv8": (
            serval("W4A8 g128, int8 cache", weights="w4a8-g128", kv="int8"),
            smallest,
        ),
    }


def collect(setup: Setup) -> list[Case]:
    """All cases: batch 1 and 8, context 512 and 8192."""
    import torch

    threads = torch.get_num_threads()
    shape, rounds = "llama-1b", 5
    contexts: tuple[int, ...] = (512, 8192)
    if setup.quick:
        shape, contexts, rounds = "tiny", (64,), 1
    compared = engines(threads)
    cases: list[Case] = []
    with WorkerPool(threads) as pool:
        bench = Bench(shape, SHAPES[shape], pool)
        for batch in (1, 8):
            for context in contexts:
                names = {
                    kind: f"{kind}-{shape}-decode-batch{batch}-ctx{context}" for kind in compared
                }
                wanted = {kind: name for kind, name in names.items() if setup.wants(name)}
                if wanted:
                    setup.note(", ".join(wanted.values()))
                    chosen = for_size({k: compared[k] for k in wanted}, batch, context)
                    # Engines that do not fit into memory together are loaded anew in each round.
                    turns = min(rounds, 3) if batch * context > 20_000 else rounds
                    outcomes = _measure(setup, bench, chosen, batch, context, turns)
                    cases += _cases(setup, bench, wanted, chosen, outcomes, batch, context)
    return cases


def _measure(
    setup: Setup,
    bench: Bench,
    chosen: Engines,
    batch: int,
    context: int,
    rounds: int,
) -> dict[str, Outcome]:
    steps: dict[str, int] = {}

    def work(spec: EngineSpec, worker: Worker) -> Sample:
        if spec.label not in steps:
            wall, _ = worker.call("decode", 2)
            steps[spec.label] = max(2, min(ROOM, round(2 * SECONDS / wall)))
        wall, cpu = worker.call("decode", steps[spec.label])
        return Sample(wall / steps[spec.label], cpu / steps[spec.label])

    specs = {s.label: s for ours, peers in chosen.values() for s in (ours, *peers)}
    contestants = [
        bench.contestant(
            spec,
            batch,
            context + ROOM,
            lambda worker, spec=spec: work(spec, worker),  # type: ignore[misc]
            lambda worker: worker.call("fill", batch, context, ROOM),
        )
        for spec in specs.values()
    ]
    return paired_rounds(contestants, rounds, setup.note)


def _cases(
    setup: Setup,
    bench: Bench,
    names: dict[str, str],
    chosen: Engines,
    outcomes: dict[str, Outcome],
    batch: int,
    context: int,
) -> list[Case]:
    cases = []
    for kind, (spec, peers) in chosen.items():
        ours = outcomes[spec.label]
        floor = None
        if ours.samples and not setup.quick:
            facts = bench.facts[spec.label]
            cached = batch * context * facts["cache_bytes_per_token"]
            floor = (facts["weight_bytes"] + cached) / (read_bandwidth() * 1e9)
        for peer_spec in peers:
            peer = outcomes[peer_spec.label]
            metrics = bench.metrics(ours, peer, batch)
            cases.append(compare(names[kind], ours, peer, floor_seconds=floor, metrics=metrics))
    return cases
