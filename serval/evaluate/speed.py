"""Tokens per second of an engine: prefill and decode at chosen batch sizes, and what memory holds.

Prefill is the time from prompts to their first tokens; decode the rest of a generation, the
prefill's time taken off. Medians of several runs; prompts differ between runs, so that no prefix is
reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter

from serval.cache.memory import cache_bytes_per_token
from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
from serval.evaluate.scorer import trunk_layers
from serval.models.decoder import Decoder


@dataclass(frozen=True)
class Speed:
    """Tokens per second at one batch size. prompt, output: tokens per sequence."""

    batch: int
    prompt: int
    output: int
    prefill: float
    decode: float


def measure_speed(
    llm: LLM,
    vocab_size: int,
    *,
    batch: int,
    prompt: int,
    output: int,
    repeats: int = 3,
    seed: int = 0,
) -> Speed:
    """Generate from random prompts after one warm-up run."""
    rng = Random(f"{seed}/{batch}")

    def run(tokens: int) -> float:
        prompts = [[rng.randrange(vocab_size) for _ in range(prompt)] for _ in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        start = perf_counter()
        llm.generate(prompts, params)
        return perf_counter() - start

    run(2)
    first = median(run(1) for _ in range(repeats))
    whole = median(run(output) for _ in range(repeats))
    decoding = max(whole - first, 1e-9)
    return Speed(
        batch=batch,
        prompt=prompt,
        output=output,
        prefill=batch * prompt / first,
        decode=batch * (output - 1) / decoding,
    )


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all parameters and buffers as they lie in memory."""
    tensors = [*decoder.parameters(), *decoder.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def cache_bytes(decoder: Decoder, kv: str) -> int:
    """Bytes that one token takes in the cache, over all layers."""
    return cache_bytes_per_token(trunk_layers(decoder), kv, decoder.norm.weight.dtype)
