"""Generation from the FP8 latent cache: forks, preemption, reuse of prefixes."""

from __future__ import annotations

from serval import SamplingParams

from .helpers import tiny_llm


def test_generation_with_forks_preemption_and_reuse_follows_the_full_cache() -> None:
    """Greedy text of the FP8 cache, and the same text whatever happens to it on the way."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [[7 * i % 250 for i in range(n)] for n in (40, 3, 66, 21, 40)]
    roomy = tiny_llm("mla", kv="snapmla").generate(prompts, params)
    unit = tiny_llm("mla", kv="snapmla").memory.block_bytes
    tight = tiny_llm("mla", kv="snapmla", cache_bytes=unit * 14, max_model_len=96)
    for _ in range(2):  # the second time from cached prefixes
        outputs = tight.generate(prompts, params)
        same = [
            a == b
            for x, y in zip(outputs, roomy, strict=True)
            for a, b in zip(x.outputs[0].token_ids, y.outputs[0].token_ids, strict=True)
        ]
        assert sum(same) / len(same) > 0.9
    assert tight.stats().preemptions > 0
    forked = tiny_llm("mla", kv="snapmla").generate(
        prompts[:1], SamplingParams(n=3, temperature=0, max_tokens=8, ignore_eos=True)
    )
    assert len({tuple(o.token_ids) for o in forked[0].outputs}) == 1
