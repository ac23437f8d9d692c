"""PrefixKVCache in `transformers`' generate, against the engine and against no policy."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from serval import LLM, SamplingParams
from serval.errors import CacheError
from serval.hf_prefixkv import ATTENTION, PrefixKVCache

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def model_of(kind: str, **options):
    torch.manual_seed(3)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **options}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **options}))
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def generate(model, prompts: torch.Tensor, cache, count: int = 40, **options) -> torch.Tensor:
    out = model.generate(
        prompts, past_key_values=cache, max_new_tokens=count, do_sample=False, **options
    )
    return out[:, prompts.shape[1] :]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", ["prefixkv:keep=0.3,least=4", "h2o:keep=0.4,least=4", "local"])
def test_text_equals_the_engines(kind, policy, tmp_path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    prompt = torch.randint(1, 128, (1, 70))
    cache = PrefixKVCache(model.config, policy=policy)
    got = generate(model, prompt, cache)[0].tolist()
    llm = LLM(tmp_path, policy=policy, block_size=8)
    want = llm.generate(prompt[0].tolist(), SamplingParams(temperature=0, max_tokens=40))
    assert got == want[0].outputs[0].token_ids
    plain = generate(model, prompt, DynamicCache(config=model.config))[0].tolist()
    assert got[0] == plain[0]
    assert got != plain


def test_layers_differ_in_length_and_hold_their_shares() -> None:
    model = model_of("llama")
    cache = PrefixKVCache(model.config, policy="prefixkv:keep=0.4,least=0")
    generate(model, torch.randint(1, 128, (2, 100)), cache, count=2)
    assert cache.get_seq_length() == 101
    assert sum(cache.kept) in (120, 121, 122, 123)
    assert len(set(cache.kept)) > 1
    full = 2 * 2 * 2 * 16 * 4  # bytes of a token: batch, keys and values, heads, width, float32
    assert cache.nbytes == full * sum(cache.kept)
    cache = PrefixKVCache(model.config, policy="prefixkv:keep=0.4,least=0")
    generate(model, torch.randint(1, 128, (1, 60)), cache, count=100)
    assert abs(sum(cache.kept) - 0.4 * 3 * 159) <= 3


def test_keeping_everything_changes_nothing_even_with_padding() -> None:
    model = model_of("qwen3")
    prompts = torch.randint(1, 128, (3, 50))
    mask = torch.ones_like(prompts)
    for row, padding in enumerate((0, 20, 7)):
        prompts[row, :padding], mask[row, :padding] = 0, 0
    whole = generate(model, prompts, PrefixKVCache(model.config, keep=1.0), attention_mask=mask)
    plain = generate(model, prompts, DynamicCache(config=model.config), attention_mask=mask)
    assert torch.equal(whole, plain)


def test_padding_is_worth_nothing() -> None:
    """A padded row chooses the tokens that it chooses alone when counts are the same."""
    model = model_of("llama")
    row = torch.randint(1, 128, (1, 60))
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.int64), row], dim=1)
    mask = (padded > 0).long()
    alone = PrefixKVCache(model.config, policy="uniform:keep=0.5,least=0")
    want = generate(model, row, alone, count=2)
    both = torch.cat([padded, torch.randint(1, 128, (1, 90))])
    beside = PrefixKVCache(model.config, policy="uniform:keep=0.3333333,least=0")
    seen = torch.cat([mask, torch.ones_like(mask)])
    text = generate(model, both, beside, count=2, attention_mask=seen)
    assert text[0].tolist() == want[0].tolist()
    for a, b in zip(alone.layers, beside.layers, strict=True):
        assert a.keys.shape[2] == 31  # 30 of the prompt and a new one
        torch.testing.assert_close(a.keys[0], b.keys[0], atol=1e-5, rtol=1e-4)
    # a row shorter than what layers keep carries masked padding
    short = torch.cat([torch.zeros(1, 85, dtype=torch.int64), row[:, :5]], dim=1)
    both[0] = short
    cache = PrefixKVCache(model.config, policy="prefixkv:keep=0.3,least=0")
    text = generate(model, both, cache, count=4, attention_mask=(both > 0).long())
    want = generate(model, row[:, :5], DynamicCache(config=model.config), count=4)
    assert text[0].tolist() == want[0].tolist()


def test_beam_search_and_chunks_of_a_prompt() -> None:
    model = model_of("llama")
    prompt = torch.randint(1, 128, (1, 64))
    whole = PrefixKVCache(model.config, policy="prefixkv:keep=0.4,least=0")
    parts = PrefixKVCache(model.config, policy="prefixkv:keep=0.4,least=0")
    with torch.no_grad():
        model(prompt, past_key_values=whole)
        for piece in prompt.split(24, dim=1):
            model(piece, past_key_values=parts)
        for cache in (whole, parts):
            cache.compress()
    for a, b in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys)
    cache = PrefixKVCache(model.config, policy="prefixkv:keep=0.4,least=0")
    beams = generate(model, prompt, cache, count=8, num_beams=3)
    assert beams.shape == (1, 8)
    with pytest.raises(CacheError, match="cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", ["llama", "sliding"])
@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(kind: str, length: int) -> None:
    """A prompt of one token is a prompt: layers are cut with the next one, all of them. A cache
    that was reset is a new one."""
    options = {}
    if kind == "sliding":
        layers = ["sliding_attention", "full_attention", "full_attention"]
        options = {"layer_types": layers, "sliding_window": 20, "use_sliding_window": True}
    model = model_of("qwen3" if kind == "sliding" else kind, **options)
    prompt = torch.randint(1, 128, (1, length))
    cache = PrefixKVCache(model.config, policy="uniform:keep=0.5,least=4")
    text = generate(model, prompt, cache)
    plain = generate(model, prompt, DynamicCache(config=model.config), count=3)
    assert torch.equal(text[:, :3], plain)
    assert cache.get_seq_length() == length + 39
    assert cache.kept == [(length + 40) // 2] * len(cache.kept)
    cache.reset()
    assert torch.equal(generate(model, prompt, cache), text)


def test_refusals() -> None:
    model = model_of("llama")
    with pytest.raises(CacheError, match="write keep into the policy"):
        PrefixKVCache(model.config, keep=0.3, policy="h2o")
    model.set_attn_implementation("sdpa")
    cache = PrefixKVCache(model.config, policy="prefixkv:keep=0.3,least=0")
    with pytest.raises(CacheError, match="set_attn_implementation"):
        generate(model, torch.randint(1, 128, (1, 64)), cache)
