"""`serval.hf.OScaRCache` in transformers' generate: what it returns is what the engine computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from serval import LLM, SamplingParams
from serval.errors import CacheError
from serval.evaluate.shipped import shipped_model
from serval.hf import ATTENTION, OScaRCache, OScaRCacheLayer, PrefixKVCache
from serval.kernels import jit

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "max_position_embeddings": 512, "initializer_range": 0.2, "eos_token_id": None,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
R = 32


def model_for(name: str, attention: str = "sdpa"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(attention)
    return model


def prompt(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 96, (rows, length), generator=generator)


def generate(model, ids: torch.Tensor, cache, count: int = 30, **options) -> torch.Tensor:
    """Tokens after the prompt."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, do_sample=False,
        **options,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


@torch.no_grad()
def logits(model, ids: torch.Tensor, cache, steps: list[int]) -> torch.Tensor:
    parts = [model(part, past_key_values=cache).logits for part in ids.split(steps, dim=1)]
    return torch.cat(parts, 1)


@pytest.fixture
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that do not round queries and weights to 8 bits."""
    monkeypatch.setenv("SERVAL_KERNELS", "reference")
    jit.reset()
    yield
    monkeypatch.undo()
    jit.reset()


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("qwen3", ATTENTION)])
def test_the_engine_writes_the_same(
    name: str, attention: str, tmp_path: Path, exact_kernels: None
) -> None:
    model, ids = model_for(name, attention), prompt(90)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), kv=f"oscar:residual={R}", block_size=32, max_batch_tokens=128)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)
    (want,) = llm.generate([ids[0].tolist()], params)
    cache = OScaRCache(model.config, residual=R)
    assert generate(model, ids, cache)[0].tolist() == want.outputs[0].token_ids
    assert cache.get_seq_length() == 119
    exact = generate(model, ids, DynamicCache(config=model.config))
    assert exact[0].tolist() != want.outputs[0].token_ids  # it is quantised


def test_the_engine_writes_the_same_with_compiled_kernels(tmp_path: Path) -> None:
    model, ids = model_for("llama", ATTENTION), prompt(90)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), kv=f"oscar:residual={R}", block_size=32, max_batch_tokens=128)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (want,) = llm.generate([ids[0].tolist()], params)
    cache = OScaRCache(model.config, residual=R)
    assert generate(model, ids, cache, count=12)[0].tolist() == want.outputs[0].token_ids


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_exact_while_the_window_holds_everything(attention: str) -> None:
    model, ids = model_for("llama", attention), prompt(60, rows=2)
    want = logits(model, ids, DynamicCache(config=model.config), [40, 1, 1, 18])
    got = logits(model, ids, OScaRCache(model.config), [40, 1, 1, 18])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kv", ["oscar:sinks=3,residual=32", "kivi:residual=32", "int4:residual=32"]
)
def test_both_ways_of_attention_agree(kv: str) -> None:
    ids, steps = prompt(150, rows=2), [70, 1, 1, 5, 30, *[1] * 43]
    ways = [model_for("qwen3", attention) for attention in ("sdpa", ATTENTION)]
    a, b = (logits(m, ids, OScaRCache(m.config, layout=kv), steps) for m in ways)
    exact = logits(ways[0], ids, DynamicCache(config=ways[0].config), steps)
    quantised = (a - exact).norm()  # what compiled kernels round is less than that
    assert (a - b).norm() < 0.2 * quantised


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_left_padding_changes_nothing(attention: str) -> None:
    model = model_for("llama", attention)
    ids = torch.cat([prompt(80), prompt(80, 1)])
    mask = torch.ones_like(ids)
    mask[1, :37], ids[1, :37] = 0, 0
    cache = OScaRCache(model.config, residual=R, attention_mask=mask)
    both = generate(model, ids, cache, attention_mask=mask)
    for row, start in ((0, 0), (1, 37)):  # neither what is stored nor what is attended to differs
        alone = OScaRCache(model.config, residual=R)
        assert torch.equal(generate(model, ids[row : row + 1, start:], alone)[0], both[row])
    layer = cache.layers[0]
    assert isinstance(layer, OScaRCacheLayer)
    assert [c.num_tokens for c in layer.sequences] == [109, 72]


def test_padding_that_the_cache_does_not_know_of_is_refused() -> None:
    model, ids = model_for("llama", ATTENTION), prompt(20, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with pytest.raises(CacheError, match=r"hides \[0, 7\]"):
        generate(model, ids, OScaRCache(model.config), attention_mask=mask)
    with pytest.raises(CacheError, match="left only"):
        OScaRCache(model.config, attention_mask=mask.flip(1))


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_beams_are_reordered(attention: str) -> None:
    """A window that holds everything: beams are those of an exact cache."""
    model, ids = model_for("llama", attention), prompt(50, rows=2)
    options = {"num_beams": 3, "count": 20}
    want = generate(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generate(model, ids, OScaRCache(model.config), **options), want)
    cache = OScaRCache(model.config, residual=R)
    generate(model, ids, cache, num_beams=3, count=60)
    layer = cache.layers[0]
    layer.memory.manager.check_integrity()
    assert {c.num_tokens for c in layer.sequences} == {109}
    assert layer.memory.manager.used_blocks < 6 * 3  # prompts' blocks are shared between beams


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_cropped_tokens_may_be_computed_again(attention: str) -> None:
    model, ids = model_for("llama", attention), prompt(120)
    cache = OScaRCache(model.config, bits=4, residual=R)
    want = logits(model, ids, cache, [90, 1, 1, 28])
    cache.crop(-25)
    assert cache.get_seq_length() == 95
    got = logits(model, ids[:, 95:], cache, [1, 24])
    # tokens 64 to 95 were quantised before they were dropped, and are exact no more
    assert (got - want[:, 95:]).norm() < 0.3 * want[:, 95:].norm()
    cache.crop(-60)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, ids, cache, [90, 1, 1, 28]), want)


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_reset_forgets_padding_and_batch(attention: str) -> None:
    """After prompts that were padded, others, in a batch of another size, are those of a new
    cache; the mask of padded ones may be given anew."""
    model, ids = model_for("llama", attention), prompt(60, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = OScaRCache(model.config, residual=R, attention_mask=mask)
    generate(model, ids, cache, count=5, attention_mask=mask)
    cache.reset()
    others = prompt(40, 3, rows=3)
    want = generate(model, others, OScaRCache(model.config, residual=R), count=15)
    assert torch.equal(generate(model, others, cache, count=15), want)
    layer = cache.layers[0]
    assert isinstance(layer, OScaRCacheLayer)
    assert [c.num_tokens for c in layer.sequences] == [54] * 3
    layer.memory.manager.check_integrity()
    cache.reset(attention_mask=mask)
    generate(model, ids, cache, count=5, attention_mask=mask)
    assert [c.num_tokens for c in layer.sequences] == [64, 44]


def test_padding_without_a_mask_is_refused() -> None:
    model, ids = model_for("llama", ATTENTION), prompt(60, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    cache = OScaRCache(model.config, residual=R, attention_mask=mask)
    with pytest.raises(CacheError, match=r"hides \[0\] tokens, the cache left out \[0, 20\]"):
        logits(model, ids, cache, [60])


def test_copies_of_a_batch_go_their_own_ways() -> None:
    model, ids = model_for("llama"), prompt(70)
    cache = OScaRCache(model.config, residual=R)
    logits(model, ids, cache, [70])
    cache.batch_repeat_interleave(3)
    more = prompt(40, 5, rows=3)
    got = logits(model, more, cache, [1] * 40)
    for row in range(3):
        alone = OScaRCache(model.config, residual=R)
        logits(model, ids, alone, [70])
        want = logits(model, more[row : row + 1], alone, [1] * 40)
        torch.testing.assert_close(got[row : row + 1], want, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_bfloat16_numbers() -> None:
    model, ids = model_for("qwen3", ATTENTION).bfloat16(), prompt(100)
    got = logits(model, ids, OScaRCache(model.config, bits=4, residual=R), [70, *[1] * 30])
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()


def test_sliding_layers_keep_their_window_and_others_are_refused() -> None:
    kinds = ["full_attention", "sliding_attention"]
    values = {**SHAPE, "layer_types": kinds, "sliding_window": 20, "use_sliding_window": True}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**values)).eval()
    ids = prompt(90)
    want = logits(model, ids, DynamicCache(config=model.config), [80, *[1] * 10])
    got = logits(model, ids, OScaRCache(model.config), [80, *[1] * 10])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    cache = OScaRCache(model.config)
    logits(model, prompt(70, 4), cache, [70])
    cache.reset()
    again = logits(model, ids, cache, [80, *[1] * 10])
    torch.testing.assert_close(again, want, atol=1e-4, rtol=1e-4)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(CacheError, match="chunked_attention"):
        OScaRCache(model.config)
    with pytest.raises(CacheError, match="got bits=3"):
        OScaRCache(Qwen3Config(**SHAPE), bits=3)
    with pytest.raises(CacheError, match="not 'full'"):
        OScaRCache(Qwen3Config(**SHAPE), layout="full")


def test_the_shipped_model_saves_memory() -> None:
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32).eval()
    cache = OScaRCache(model.config)
    ids = torch.randint(100, 5000, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    full = 6 * 1024 * 2 * 2 * 64 * 4
    assert cache.nbytes < 0.35 * full  # an eighth of the tokens' length is the exact window


@pytest.mark.parametrize("kind", [OScaRCache, PrefixKVCache])
def test_a_model_is_no_config(kind: type) -> None:
    with pytest.raises(CacheError, match=r"such as model\.config, got Linear"):
        kind(torch.nn.Linear(1, 1))
