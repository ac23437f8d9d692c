"""Tokens per second of an engine: prefill and decode at chosen batch sizes, and what memory holds.

Prefill is the time from prompts to their first tokens; decode the rest of a generation, the
prefill's time taken off. Medians of several runs; prompts differ between runs, so that no prefix is
reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter

from serval.cache.memory import cache_bytes_per_token
from serval.engine.llm import LLM
from serval.engine.params import SamplingParams
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
    llm: LLM, *, batch: int, prompt: int, output: int, repeats: int = 3, seed: int = 0
) -> Speed:
    """Generate from random prompts after one warm-up run."""
    return measure_speeds(
        [llm], batch=batch, prompt=prompt, output=output, repeats=repeats, seed=seed
    )[0]


def measure_speeds(
    llms: Sequence[LLM], *, batch: int, prompt: int, output: int, repeats: int = 3, seed: int = 0
) -> list[Speed]:
    """Measure several engines in turn, round by round, so that a machine that slows down meanwhile
    slows them all; the order of the result is that of `llms`."""
    rng = Random(f"{seed}/{batch}")
    first: list[list[float]] = [[] for _ in llms]
    whole: list[list[float]] = [[] for _ in llms]
    for turn in range(-1, repeats):  # turn -1 warms up
        for index, llm in enumerate(llms):
            for tokens, times in ((1, first[index]), (output, whole[index])):
                took = _generate(llm, rng, batch, prompt, tokens if turn >= 0 else 2)
                if turn >= 0:
                    times.append(took)
    speeds = []
    for prefilling, generating in zip(map(median, first), map(median, whole), strict=True):
        decoding = max(generating - prefilling, 1e-9)
        prefill, decode = batch * prompt / prefilling, batch * (output - 1) / decoding
        speeds.append(Speed(batch, prompt, output, prefill, decode))
    return speeds


def _generate(llm: LLM, rng: Random, batch: int, prompt: int, tokens: int) -> float:
    """Seconds to generate `tokens` tokens from each of `batch` random prompts."""
    vocabulary = llm.decoder.config.vocab_size
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    start = perf_counter()
    llm.generate(prompts, params)
    return perf_counter() - start


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all parameters and buffers as they lie in memory."""
    tensors = [*decoder.parameters(), *decoder.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def cache_bytes(decoder: Decoder, kv: str) -> float:
    """Bytes that one token takes in the cache, over all layers."""
    return cache_bytes_per_token(decoder.trunk_attention_layers, kv, decoder.norm.weight.dtype)
