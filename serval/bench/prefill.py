"""Prefill tokens/s at the Llama-3.2-1B shape with random weights, against transformers,
llama.cpp and, for W4A8 and up to 4096 tokens in all, OpenVINO GenAI.

A measured unit is the whole call: `batch` prompts of `context` tokens, from nothing to their first
token. Floor: the operations of the weights and of causal attention at a measured roof: of float32
matrix products for float32, of integer dot products in registers for int8 and W4A8 (whose attention
is float32: the true floor lies higher).

65,536 tokens at once would take an hour a round, so that case runs 2 of the 16 layers and says so
in its name; every layer costs the same, and the ratio with it.
"""

from __future__ import annotations

from collections.abc import Callable

from serval.bench.harness import Case, Sample, Setup, compare, paired_rounds
from serval.bench.language_models import (
    Bench,
    Engines,
    for_size,
    llama_cpp,
    openvino,
    serval,
    transformers,
)
from serval.bench.shapes import SHAPES, attention_flops, head_parameters, linear_parameters
from serval.bench.worker import Worker, WorkerPool
from serval.kernels.bandwidth import int4_roof, int8_roof, matmul_roof
from serval.models.config import ModelConfig

# Operations per nanosecond that each kind of ours could reach, by the word of its case name.
ROOFS: dict[str, Callable[[], float]] = {
    "float32": matmul_roof,
    "int8": int8_roof,
    "w4a8": int4_roof,
    "w4a8g128": int4_roof,
}


def engines(threads: int) -> Engines:
    """Ours by the word that case names begin with, each with its peers."""
    smallest = [llama_cpp("Q4_0", threads), openvino(threads)]
    return {
        "float32": (
            serval("float32"),
            [transformers("dynamic"), llama_cpp("F16", threads)],
        ),
        "int8": (serval("int8", weights="int8"), [llama_cpp("Q8_0", threads)]),
        "w4a8": (serval("W4A8 per channel", weights="w4a8"), smallest),
        "w4a8g128": (serval("W4A8 g128", weights="w4a8-g128"), smallest),
    }


def prompt_flops(config: ModelConfig, batch: int, length: int) -> float:
    """FLOPs that `batch` prompts need: every weight for every token, the head for the last."""
    each = 2.0 * (linear_parameters(config) * length + head_parameters(config))
    return batch * (each + attention_flops(config, length))


def collect(setup: Setup) -> list[Case]:
    """All cases: batch 1 and 8, prompts of 512 and 8192 tokens, for W4A8 also of 2048; the longer,
    the fewer rounds."""
    import torch

    threads = torch.get_num_threads()
    shape = "llama-1b"
    contexts: tuple[int, ...] = (512, 2048, 8192)
    if setup.quick:
        shape, contexts = "tiny", (64,)
    compared = engines(threads)
    cases: list[Case] = []
    with WorkerPool(threads) as pool:
        for batch in (1, 8):
            for context in contexts:
                large = batch * context > 20_000
                part = f"{shape}-2of16layers" if large else shape
                config = SHAPES[part]
                bench = Bench(part, config, pool)
                rounds = 1 if setup.quick else max(1, min(5, 8192 // (batch * context)))
                names = {
                    kind: f"{kind}-{part}-prefill-batch{batch}-ctx{context}"
                    for kind in compared
                    if context != 2048 or kind.startswith("w4a8")
                }
                wanted = {k: compared[k] for k, name in names.items() if setup.wants(name)}
                chosen = for_size(wanted, batch, context)
                if not chosen:
                    continue
                setup.note(", ".join(names[kind] for kind in chosen))

                def work(worker: Worker, batch: int = batch, context: int = context) -> Sample:
                    return Sample(*worker.call("prefill", batch, context))

                def warm(worker: Worker) -> None:
                    worker.call("prefill", 1, 32)

                specs = {s.label: s for ours, peers in chosen.values() for s in (ours, *peers)}
                contestants = [
                    bench.contestant(spec, batch, context, work, warm) for spec in specs.values()
                ]
                outcomes = paired_rounds(contestants, rounds, setup.note)
                for kind, (spec, peers) in chosen.items():
                    floor = None
                    if not setup.quick:
                        roof = ROOFS[kind]()
                        floor = prompt_flops(config, batch, context) / (roof * 1e9)
                    for peer in peers:
                        pair = outcomes[spec.label], outcomes[peer.label]
                        metrics = bench.metrics(*pair, batch * context)
                        cases.append(
                            compare(names[kind], *pair, floor_seconds=floor, metrics=metrics)
                        )
    return cases
