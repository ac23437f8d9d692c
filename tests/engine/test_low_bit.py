"""Caches of few bits in the engine: what decides the text, and what does not."""

from __future__ import annotations

import random

import pytest
import torch

from serval import LLM, SamplingParams
from serval.cache.memory import cache_state_bytes
from serval.errors import CacheError

from .helpers import greedy, tiny_decoder, tiny_llm

COUNT = 36
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
NAMES = ["oscar", "oscar:sinks=4", "kivi", "int4", "q4_0"]


def short(kv: str) -> str:
    return f"{kv}{',' if ':' in kv else ':'}residual=32"


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(280) for _ in range(n)] for n in lengths]


def texts(llm, batch: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate(batch, params)
    llm.memory.manager.check_integrity()
    assert llm.memory.manager.used_blocks == 0
    for group in llm.memory.manager.groups:
        assert group.states is None or group.states.num_used == 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("kv", "name"), [("oscar", "gqa"), ("oscar", "qk-norm"), ("int4", "gqa")])
def test_exact_while_the_window_holds_everything(kv: str, name: str) -> None:
    batch = prompts([1, 80])
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    want = [greedy(tiny_decoder(name), prompt, 10) for prompt in batch]
    options = {"kv": kv, "block_size": 32, "max_batch_tokens": 256}
    assert texts(tiny_llm(name, **options), batch, params) == want
    options["max_batch_tokens"] = 16  # several chunks, none of which finds a quantised token
    assert texts(tiny_llm(name, **options), batch, params) == want


@pytest.mark.parametrize("kv", NAMES)
def test_the_text_does_not_depend_on_what_else_runs(kv: str) -> None:
    batch = prompts([70, 33, 130, 5])
    options = {"kv": short(kv), "block_size": 32, "max_batch_tokens": 512}
    together = texts(tiny_llm(**options), batch)
    assert together == [texts(tiny_llm(**options), [prompt])[0] for prompt in batch]
    exact = texts(tiny_llm(block_size=32, max_batch_tokens=512), batch)
    assert together != exact  # it is quantised


def test_a_reused_prefix_counts_as_a_chunk() -> None:
    (prompt,) = prompts([100])
    options = {"kv": short("oscar"), "block_size": 32}
    llm = tiny_llm(**options, max_batch_tokens=256)
    first = texts(llm, [prompt])
    again = texts(llm, [prompt])
    assert llm.stats().prefix_hit_tokens == 96
    cut = tiny_llm(**options, max_batch_tokens=96, prefix_caching=False)
    assert texts(cut, [prompt]) == again
    assert texts(tiny_llm(**options, max_batch_tokens=256), [prompt]) == first


def test_kept_first_tokens_share_no_prefix() -> None:
    (prompt,) = prompts([100])
    llm = tiny_llm(kv="oscar:residual=32,sinks=4", block_size=32, max_batch_tokens=256)
    assert texts(llm, [prompt]) == texts(llm, [prompt])
    assert llm.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("kv", ["oscar", "oscar:sinks=4", "kivi"])
def test_samples_fork_their_window_and_share_their_blocks(kv: str) -> None:
    (prompt,) = prompts([80])
    options = {"kv": short(kv), "block_size": 32, "max_batch_tokens": 256}
    alone = texts(tiny_llm(**options), [prompt])[0]
    llm = tiny_llm(**options)
    params = SamplingParams(n=3, temperature=0, max_tokens=COUNT, ignore_eos=True)
    request = llm.engine.add_request(prompt, params)
    llm.engine.step()
    llm.engine.step()
    assert llm.memory.manager.used_blocks == 2
    while not llm.engine.idle:
        llm.engine.step()
        llm.memory.manager.check_integrity()
    assert [o.token_ids for o in llm.engine.output(request).outputs] == [alone] * 3


def test_preempted_requests_are_computed_again_and_end() -> None:
    batch = prompts([95, 95, 95])
    roomy = tiny_llm(kv=short("oscar"), block_size=32, max_sequences=4, max_batch_tokens=256)
    states = roomy.memory.nbytes - roomy.memory.manager.total_blocks * roomy.memory.block_bytes
    tight = tiny_llm(
        kv=short("oscar"), block_size=32, max_sequences=4, max_batch_tokens=256,
        max_model_len=192, cache_bytes=states + 6 * roomy.memory.block_bytes,
    )  # fmt: skip
    found = texts(tight, batch)
    assert tight.stats().preemptions > 0
    assert found[:1] == texts(roomy, batch[:1])  # the first is never preempted
    assert [len(tokens) for tokens in found] == [COUNT] * 3


@pytest.mark.parametrize("kv", ["oscar:residual=100000000", "streaming:recent=100000000000"])
def test_states_beyond_memory_are_refused(kv: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CacheError, match=f"holds no token: .*Lower the options in kv='{kv}'"):
        tiny_llm(kv=kv, block_size=32)
    assert not caplog.records  # the refusal says it all


def test_a_cancelled_request_gives_back_blocks_and_window() -> None:
    llm = tiny_llm(kv=short("oscar"), block_size=32)
    request = llm.engine.add_request(prompts([70])[0], GREEDY)
    for _ in range(5):
        llm.engine.step()
    (group,) = llm.memory.manager.groups
    assert group.states.num_used == 1
    llm.engine.abort(request.request_id)
    assert llm.memory.manager.used_blocks == group.states.num_used == 0


def test_states_leave_three_quarters_of_the_cache_to_tokens() -> None:
    """Unless more sequences are asked for; without states, 64 run at once."""
    decoder = tiny_decoder()
    specs, dtype = decoder.trunk_attention_layers, torch.float32
    state = cache_state_bytes(specs, "oscar", dtype)
    size = 40 * state

    def at_once(**options: object) -> int:
        settings = {"kv": "oscar", "cache_bytes": size, "max_model_len": 256, **options}
        return LLM(decoder, **settings).engine.scheduler.max_sequences  # type: ignore[arg-type]

    assert at_once() == 10
    assert at_once(max_batch_tokens=4) == 4
    assert at_once(max_sequences=20) == 20
    assert at_once(kv="full") == 64
    assert at_once(kv="streaming:sinks=2,recent=62", cache_bytes=10**8) == 64
