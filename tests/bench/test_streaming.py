"""Text beyond the context: losses through caches, and the benchmark's cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from serval import LLM, SamplingParams
from serval.bench import streaming as bench
from serval.bench.harness import Setup
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from tests.evaluate.toy import tokens, toy_decoder


def test_losses_through_a_cache() -> None:
    decoder, text = toy_decoder(), tokens(100)
    with torch.inference_mode():
        logits = decoder.logits(decoder(torch.tensor(text), PackedBatch.from_lengths([100])))
    want = F.cross_entropy(logits[:-1], torch.tensor(text[1:]), reduction="none")
    for kv in ("full", "streaming:sinks=4,recent=96"):
        got = torch.tensor(list(bench.losses(decoder, text, kv, chunk=32)))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_generation_beyond_the_context() -> None:
    """The same text as from a model whose tables were long from the start; other layouts refuse."""
    kv = "streaming:sinks=4,recent=60"
    short = toy_decoder(max_position_embeddings=128)
    long = toy_decoder(max_position_embeddings=512)
    prompt, greedy = tokens(200), SamplingParams(max_tokens=120, temperature=0.0)
    found = []
    for decoder in (short, long):
        llm = LLM(decoder, kv=kv, max_model_len=400, max_sequences=2)
        found.append(llm.generate([prompt], greedy)[0].outputs[0].token_ids)
    assert found[0] == found[1]
    assert len(found[0]) == 120
    with pytest.raises(ConfigError, match="or kv='streaming'"):
        LLM(toy_decoder(max_position_embeddings=128), max_model_len=400)


def test_quick_benchmark() -> None:
    cases = bench.collect(Setup(quick=True, note=lambda line: None))
    assert [case.case for case in cases] == list(bench.caches(64))
    for case in cases:
        values = [value for key, value in case.metrics.items() if key.startswith("perplexity")]
        assert len(values) == 4
        assert all(1 < value < 6144 for value in values)
