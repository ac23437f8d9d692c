"""Every cache policy in the engine: random traffic, forks, preemption, exactness."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import SamplingParams
from serval.cache.memory import cache_state_bytes
from serval.cache.policies import POLICIES

from .helpers import tiny_decoder, tiny_llm

LONGEST = 120


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(sorted(POLICIES)),
    keep=st.sampled_from([0.1, 0.3, 0.7, 1]),
    least=st.sampled_from([0, 16]),
    blocks=st.integers(0, 12),
    batch=st.integers(8, 50),
    sequences=st.integers(2, 6),
    model_kv=st.sampled_from(
        [
            ("gqa", "full", 4),
            ("gqa", ["int8", "full"], 7),
            ("gqa", "oscar:residual=32", 32),
            ("gqa", ["full", "kivi:residual=32"], 32),
            ("sliding-sinks", "bf16", 4),
            ("mla", "full", 5),
            ("mla", "snapmla", 8),
        ]
    ),
)
def test_random_traffic(seed, policy, keep, least, blocks, batch, sequences, model_kv) -> None:
    model, kv, block = model_kv
    rng = random.Random(seed)
    unit = tiny_llm(model, kv=kv, block_size=block).memory.block_bytes
    specs = tiny_decoder(model).trunk_attention_layers
    states = sequences * cache_state_bytes(specs, kv, torch.float32)
    llm = tiny_llm(
        model,
        kv=kv,
        policy=f"{policy}:keep={keep},least={least},start=2",
        block_size=block,
        cache_bytes=unit * (-(-LONGEST // block) + blocks) + states,
        max_model_len=LONGEST,
        max_batch_tokens=batch,
        max_sequences=sequences,
        seed=seed,
    )
    engine, manager = llm.engine, llm.memory.manager
    alive, every = [], []
    for _ in range(40):
        if rng.random() < 0.5 and len(alive) < 10:
            prompt = [rng.randrange(250) for _ in range(rng.choice([1, 5, 30, 90]))]
            params = SamplingParams(
                n=rng.choice([1, 1, 2, sequences]),
                temperature=rng.choice([0, 1.0]),
                max_tokens=rng.choice([0, 1, 8, 25, None]),
                prompt_logprobs=rng.choice([None, None, 0]),
                stop=rng.choice([None, "e"]),
            )
            alive.append(engine.add_request(prompt, params))
            every.append(alive[-1])
        if alive and rng.random() < 0.1:
            assert engine.abort(rng.choice(alive).request_id)
        engine.step()
        manager.check_integrity()
        assert manager.staged_tokens <= LONGEST
        assert (llm.stats().staging_bytes > 0) <= (manager.staged_tokens > 0)
        alive = [request for request in alive if request.request_id in engine.requests]
    for _ in range(3000):
        if engine.idle:
            break
        engine.step()
        manager.check_integrity()
    assert engine.idle
    assert not engine.requests
    assert manager.used_blocks == manager.staged_tokens == llm.stats().staging_bytes == 0
    for request in every:
        for output in engine.output(request).outputs:
            assert output.finish_reason in ("stop", "length", "abort")
            assert output.stop_reason is None or "finite" not in str(output.stop_reason)


@pytest.mark.parametrize("model", ["gqa", "sliding-sinks", "mla"])
def test_keeping_everything_writes_the_same_text(model: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = [list(range(20, 110)), list(range(7))]
    plain, kept = (
        [
            output.outputs[0].token_ids
            for output in tiny_llm(model, **options).generate(prompts, params)
        ]
        for options in ({}, {"policy": "prefixkv:keep=1"})
    )
    assert plain == kept


@pytest.mark.parametrize("kv", ["full", "int8", "oscar:residual=32"])
@pytest.mark.parametrize("policy", ["prefixkv:keep=0.3", "h2o:keep=0.3"])
def test_neighbours_and_chunks_change_nothing(policy: str, kv: str) -> None:
    """A prompt's text depends neither on what runs beside it nor on how it is cut."""
    rng = random.Random(1)
    prompts = [[rng.randrange(250) for _ in range(n)] for n in (90, 40, 100, 64)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    options = {"kv": kv, "policy": policy, "block_size": 32 if "oscar" in kv else 8}
    alone = [
        tiny_llm(max_batch_tokens=256, **options).generate(prompt, params)[0] for prompt in prompts
    ]
    together = tiny_llm(max_batch_tokens=24, **options).generate(prompts, params)
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_siblings_share_the_survivors_until_they_write() -> None:
    llm = tiny_llm(policy="prefixkv:keep=0.3,least=0")
    request = llm.engine.add_request(
        list(range(100)), SamplingParams(n=3, temperature=1.0, max_tokens=20, ignore_eos=True)
    )
    manager = llm.memory.manager
    while not request.sequences or request.sequences[0].num_output == 0:
        llm.engine.step()
    assert len(request.sequences) == 3
    kept = [manager.entries(request.sequences[0].cache, layer) for layer in range(2)]
    assert sum(kept) == 60
    assert manager.used_blocks == sum(-(-count // 8) for count in kept)
    for _ in range(12):
        llm.engine.step()
        manager.check_integrity()
    assert manager.used_blocks > sum(-(-count // 8) for count in kept)
    llm.engine.abort_all()
    assert manager.used_blocks == 0


def test_decoding_holds_the_share_and_frees_memory() -> None:
    used = {}
    for policy in (None, "prefixkv:keep=0.2,least=0"):
        llm = tiny_llm(policy=policy, max_batch_tokens=128)
        llm.engine.add_request(
            list(range(110)), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        )
        for _ in range(120):
            llm.engine.step()
        manager = llm.memory.manager
        (sequence,) = llm.engine.scheduler.running
        if policy is not None:
            total = sequence.cache.num_tokens
            entries = sum(manager.entries(sequence.cache, layer) for layer in range(2))
            assert abs(entries - 0.2 * 2 * total) <= 2
        block = llm.memory.block_bytes / (1 if policy is None else 2)  # of one layer under a policy
        used[policy] = manager.used_blocks * block
    assert used["prefixkv:keep=0.2,least=0"] < 0.3 * used[None]


def test_a_full_pool_preempts_and_every_request_finishes() -> None:
    block = tiny_llm().memory.block_bytes
    llm = tiny_llm(
        policy="uniform:keep=0.5,least=0", cache_bytes=block * 12, max_model_len=128, seed=3
    )
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    rng = random.Random(0)
    prompts = [[rng.randrange(250) for _ in range(60)] for _ in range(5)]
    outputs = llm.generate(prompts, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [50] * 5
    assert llm.stats().preemptions > 0
    assert llm.memory.manager.used_blocks == 0
