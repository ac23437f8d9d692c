"""Random traffic: requests come, fork, are cancelled and preempted; no block is ever lost."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import SamplingParams
from serval.cache.memory import cache_state_bytes
from serval.engine.request import Request

from .helpers import greedy, tiny_decoder, tiny_llm


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spare=st.integers(0, 12),
    block=st.sampled_from([1, 4, 7]),
    batch=st.integers(6, 40),
    sequences=st.integers(2, 6),
    prefix_caching=st.booleans(),
    kv=st.sampled_from(["full", "bf16", "int8", ["full", "int8"], ["fp16", "full"]]),
)
def test_random_traffic(seed, spare, block, batch, sequences, prefix_caching, kv) -> None:
    random_traffic("gqa", seed, spare, block, batch, sequences, prefix_caching, kv)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spare=st.integers(0, 12),
    block=st.sampled_from([1, 4, 7, 64, 128]),
    batch=st.integers(6, 40),
    sequences=st.integers(2, 6),
    prefix_caching=st.booleans(),
    kv=st.sampled_from(
        [
            "full",
            "snapmla",
            "snapmla:config=a,fp8_queries=2",
            ["snapmla:config=c", "snapmla:config=d"],
        ]
    ),
)
def test_random_traffic_of_latents(
    seed, spare, block, batch, sequences, prefix_caching, kv
) -> None:
    random_traffic("mla", seed, spare, block, batch, sequences, prefix_caching, kv)


@settings(max_examples=16, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spare=st.integers(0, 4),
    batch=st.integers(6, 90),
    sequences=st.integers(2, 6),
    prefix_caching=st.booleans(),
    kv=st.sampled_from(
        [
            "oscar:residual=32",
            "oscar:residual=64,sinks=3",
            "kivi:residual=32",
            "int2:residual=32",
            "q4_0",
            ["q4_0:residual=64,sinks=2", "full"],
            ["oscar:residual=32", "full"],
            ["int4:residual=32", "oscar:residual=64,bits=4"],
        ]
    ),
)
def test_random_traffic_of_few_bits(seed, spare, batch, sequences, prefix_caching, kv) -> None:
    random_traffic("gqa", seed, spare, 32, batch, sequences, prefix_caching, kv, longest=130)


def random_traffic(
    model, seed, spare, block, batch, sequences, prefix_caching, kv, longest=44
) -> None:
    rng = random.Random(seed)
    unit = tiny_llm(model, kv=kv, block_size=block).memory.block_bytes
    specs = tiny_decoder(model).trunk_attention_layers
    states = sequences * cache_state_bytes(specs, kv, torch.float32)
    stem = 24 * longest // 44
    llm = tiny_llm(
        model,
        kv=kv,
        block_size=block,
        cache_bytes=unit * (-(-longest // block) + spare) + states,
        max_model_len=longest,
        max_batch_tokens=batch,
        max_sequences=sequences,
        prefix_caching=prefix_caching,
        seed=seed,
    )
    engine, manager = llm.engine, llm.memory.manager
    stems = [[rng.randrange(250) for _ in range(stem)] for _ in range(2)]
    alive: list[Request] = []
    every: list[Request] = []
    for _ in range(45):
        if rng.random() < 0.5 and len(alive) < 10:
            prompt = rng.choice(stems)[: rng.randint(1, stem)]
            prompt = prompt + [rng.randrange(250) for _ in range(rng.randint(0, 4))]
            params = SamplingParams(
                n=rng.choice([1, 1, 1, 2, sequences]),
                temperature=rng.choice([0, 1.0]),
                max_tokens=rng.choice([0, 1, 5, 12, None]),
                prompt_logprobs=rng.choice([None, None, 0]),
                presence_penalty=rng.choice([0, 0, 0.5]),
                stop=rng.choice([None, "e"]),
            )
            alive.append(engine.add_request(prompt, params))
            every.append(alive[-1])
        if alive and rng.random() < 0.1:
            victim = rng.choice(alive)
            used = manager.used_blocks
            assert engine.abort(victim.request_id)
            assert not engine.abort(victim.request_id)
            assert manager.used_blocks <= used
        engine.step()
        manager.check_integrity()
        alive = [request for request in alive if request.request_id in engine.requests]
        running = engine.scheduler.running
        assert sum(s.width for s in running) <= sequences
        assert [s.order for s in running] == sorted(s.order for s in running)
    for _ in range(3000):
        if engine.idle:
            break
        engine.step()
        manager.check_integrity()
    assert engine.idle
    assert not engine.requests
    assert manager.used_blocks == 0
    for request in every:
        for output in engine.output(request).outputs:
            assert output.finish_reason in ("stop", "length", "abort")
            limit = request.params.max_tokens
            assert limit is None or len(output.token_ids) <= limit


@pytest.mark.parametrize(("count", "limit"), [(1, 280), (32, 3000)])
def test_a_decode_step_costs_little_beside_the_model(count: int, limit: int) -> None:
    """Calls of functions per step, in Python and C, not the model's; measured 213 and 2532."""
    llm = tiny_llm(max_sequences=32, max_batch_tokens=128, cache_bytes=2**26)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(count):
        llm.engine.add_request([1 + i, 2, 3], params)
    for _ in range(5):
        llm.engine.step()
    runner = llm.engine.runner
    calls = _Calls()
    runner.decoder = _Uncounted(runner.decoder, calls)
    steps = 20
    sys.setprofile(calls)
    try:
        for _ in range(steps):
            llm.engine.step()
    finally:
        sys.setprofile(None)
    llm.engine.abort_all()
    assert calls.count / steps < limit


class _Calls:
    """A profiler that counts calls while it is `on`."""

    def __init__(self) -> None:
        self.count, self.on = 0, True

    def __call__(self, frame: object, event: str, argument: object) -> None:
        self.count += self.on and event in ("call", "c_call")


class _Uncounted:
    def __init__(self, decoder, calls: _Calls) -> None:
        self._decoder, self._calls = decoder, calls

    def __call__(self, *args):
        return self._without(self._decoder, *args)

    def logits(self, *args):
        return self._without(self._decoder.logits, *args)

    def _without(self, function, *args):
        self._calls.on = False
        try:
            return function(*args)
        finally:
            self._calls.on = True


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_served_in_order_of_arrival_without_starvation(prefix_caching: bool) -> None:
    unit = tiny_llm().memory.block_bytes
    llm = tiny_llm(
        cache_bytes=unit * 9, max_model_len=72, max_sequences=4, prefix_caching=prefix_caching
    )
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    lengths = [50, 3, 50, 3, 50, 3, 3, 50]
    batch = [[rng.randrange(250) for _ in range(n)] for n in lengths]
    requests = [llm.engine.add_request(prompt, params) for prompt in batch]
    first_token: dict[str, int] = {}
    for step in range(1000):
        if llm.engine.idle:
            break
        llm.engine.step()
        llm.memory.manager.check_integrity()
        for request in requests:
            if request.sequences[0].num_output:
                first_token.setdefault(request.request_id, step)
    order = [first_token[request.request_id] for request in requests]
    # A long prompt is never overtaken by a shorter one that came later.
    assert order == sorted(order)
    for prompt, request in zip(batch, requests, strict=True):
        assert request.sequences[0].output_ids == greedy(tiny_decoder(), prompt, 20)
    assert llm.stats().preemptions > 0


def test_a_long_prompt_does_not_stop_running_sequences() -> None:
    llm = tiny_llm(max_batch_tokens=16, max_sequences=4)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    short = llm.engine.add_request([1, 2], params)
    llm.engine.step()
    llm.engine.add_request(list(range(120)), params)
    for step in range(1, 8):
        llm.engine.step()
        assert short.sequences[0].num_output == 1 + step
    llm.engine.abort_all()
    assert llm.memory.manager.used_blocks == 0


def test_abort_frees_blocks_at_once() -> None:
    llm = tiny_llm()
    params = SamplingParams(n=3, max_tokens=50, ignore_eos=True)
    request = llm.engine.add_request(list(range(30)), params)
    for _ in range(4):
        llm.engine.step()
    assert llm.memory.manager.used_blocks > 0
    llm.engine.abort(request.request_id)
    assert llm.memory.manager.used_blocks == 0
    llm.memory.manager.check_integrity()
    assert [o.finish_reason for o in llm.engine.output(request).outputs] == ["abort"] * 3


def test_a_finished_prompt_is_reused_while_it_runs() -> None:
    llm = tiny_llm()
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompt = list(range(40))
    llm.engine.add_request(prompt, params)
    llm.engine.step()
    second = llm.engine.add_request([*prompt, 41, 42], params)
    llm.engine.step()
    assert second.num_cached_tokens == 40
    assert llm.memory.manager.used_blocks == 5 + 1 + 1  # five shared, one own block each
