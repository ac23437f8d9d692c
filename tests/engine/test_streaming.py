"""StreamingLLM's cache in the engine: random traffic, and what decides the text."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import SamplingParams
from serval.models.batch import PackedBatch
from tests.cache.test_streaming import Dense

from .helpers import greedy, tiny_decoder, tiny_llm
from .test_workload import random_traffic

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
KV = "streaming:sinks=3,recent=13,slack=2"


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spare=st.integers(0, 12),
    block=st.sampled_from([1, 4, 7]),
    batch=st.integers(6, 40),
    sequences=st.integers(2, 6),
    prefix_caching=st.booleans(),
    kv=st.sampled_from([KV, [KV, "full"], ["int8", "streaming:sinks=0,recent=5"]]),
)
def test_random_traffic(seed, spare, block, batch, sequences, prefix_caching, kv) -> None:
    random_traffic("gqa", seed, spare, block, batch, sequences, prefix_caching, kv)


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(280) for _ in range(n)] for n in lengths]


def texts(llm, batch: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(batch, GREEDY)
    llm.memory.manager.check_integrity()
    assert all(group.states.num_used == 0 for group in llm.memory.manager.groups)
    return [output.outputs[0].token_ids for output in outputs]


def test_the_text_is_that_of_dense_attention_over_the_subset() -> None:
    """Whatever else runs, and however prompts are cut."""
    batch = prompts([5, 40, 21])
    decoder = tiny_decoder()
    want = []
    for prompt in batch:
        tokens = list(prompt)
        for _ in range(GREEDY.max_tokens or 0):
            step = PackedBatch.from_lengths([len(tokens)])
            step.memory = Dense(decoder, 3, 13)
            with torch.inference_mode():
                logits = decoder.logits(decoder(torch.tensor(tokens), step)[-1:])
            tokens.append(int(logits.argmax()))
        want.append(tokens[len(prompt) :])
    assert texts(tiny_llm(kv=KV, max_batch_tokens=256), batch) == want
    assert texts(tiny_llm(kv=KV, max_batch_tokens=9, max_sequences=4), batch) == want
    assert want != [greedy(decoder, prompt, 16) for prompt in batch]  # tokens were forgotten
