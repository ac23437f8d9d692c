"""Greedy text from `LLM.generate` equals `transformers.generate`: batched, and when preempted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch

from serval import LLM, SamplingParams
from serval.cache.memory import cache_bytes_per_token
from serval.models import checkpoint

NEW_TOKENS = 24
LENGTHS = [5, 40, 1, 23, 60, 12]
BLOCK = 8
MODEL_LEN = 96


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(3, tiny_models.VOCAB, (n,), generator=generator) for n in LENGTHS]
    return [row.tolist() for row in rows]


@torch.no_grad()
def reference(model: torch.nn.Module) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_greedy_text_equals_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_models.make(name)
    model.save_pretrained(tmp_path)
    expected = reference(model)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    decoder = checkpoint.load(tmp_path)
    per_token = cache_bytes_per_token(decoder.attention_layers, "full", torch.float32)
    roomy, tight = 1024, MODEL_LEN  # tokens of cache; the second holds one longest sequence
    for tokens in (roomy, tight):
        llm = LLM(
            decoder,
            max_model_len=MODEL_LEN,
            cache_bytes=per_token * tokens,
            block_size=BLOCK,
            max_batch_tokens=32,
            max_sequences=4,
        )
        outputs = llm.generate(prompts(), params)
        assert [list(o.outputs[0].token_ids) for o in outputs] == expected
        assert {o.outputs[0].finish_reason for o in outputs} == {"length"}
        assert (llm.engine.stats().preemptions > 0) == (tokens == tight)
        llm.engine.manager.check_integrity()


def test_stops_where_transformers_stops(tmp_path: Path) -> None:
    """With an end-of-text token: the same text up to it."""
    model = tiny_models.make("llama")
    eos = reference(model)[0][7]  # a token that greedy decoding is known to reach
    model.config.eos_token_id = eos
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    llm = LLM(checkpoint.load(tmp_path), max_model_len=MODEL_LEN, cache_bytes=1 << 22)
    (output,) = llm.generate([prompts()[0]], SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prompts()[0]]), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0, LENGTHS[0] :].tolist()
    mine = list(output.outputs[0].token_ids)
    assert theirs[-1] == eos
    assert mine in (theirs, theirs[:-1])
    assert output.outputs[0].finish_reason == "stop"
