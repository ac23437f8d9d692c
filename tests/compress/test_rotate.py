from __future__ import annotations

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from serval.compress.block import find_block
from serval.compress.hadamard import Orthogonal, hadamard_factors, paley_matrix
from serval.compress.rotate import HadamardRotation
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, MoEConfig
from tests.compress.toy import decoder, mla_decoder, moe_decoder

SHORTCUT = {
    "block": "shortcut",
    "mla": MLAConfig(
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=10, q_lora_rank=20
    ),
    "moe": MoEConfig(num_experts=4, top_k=3, intermediate_size=36, num_zero_experts=2),
    "num_key_value_heads": 4,
    "family": "longcat_flash",
}
GPT_OSS = {
    "moe": MoEConfig(
        num_experts=4,
        top_k=2,
        intermediate_size=36,
        scoring="softmax_topk",
        router_bias=True,
        expert_bias=True,
    ),
    "activation": "clamped_swiglu",
    "qkv_bias": True,
    "output_bias": True,
    "attention_sinks": True,
    "family": "gpt_oss",
}
MODELS = {
    "gqa": decoder,
    "tied": lambda: decoder(tie_word_embeddings=True, qk_norm=True, family="qwen3"),
    "biases": lambda: decoder(qkv_bias=True, output_bias=True, mlp_bias=True, hidden_size=48),
    "odd-width": lambda: decoder(hidden_size=50, head_dim=14),
    "moe": moe_decoder,
    "mla": mla_decoder,
    "gpt-oss": lambda: decoder(**GPT_OSS),
}


def logits(model):
    tokens, batch = torch.arange(24), PackedBatch.from_lengths([16, 8])
    with torch.no_grad():
        return model.logits(model(tokens, batch))


def shaken(model, keep=()):
    """`model` with norms and biases as a trained one has them."""
    for name, parameter in model.named_parameters():
        small = parameter.dim() <= 1 or name.endswith("_bias")
        if small and not any(part in name for part in keep):
            torch.nn.init.uniform_(parameter, -0.5, 2.0)
    return model


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 76, 180, 256, 768, 2880])
def test_hadamard_factors_multiply_to_a_hadamard_matrix(size):
    factors = hadamard_factors(size)
    assert factors is not None
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        assert torch.equal(factor.abs(), torch.ones_like(factor))
        product = torch.kron(product, factor)
    assert product.shape == (size, size)
    assert torch.equal(product @ product.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [896, 1536, 2048, 3584, 4096, 5120, 6144, 7168])
def test_widths_of_published_models_have_one(size):
    factors = hadamard_factors(size)
    assert factors is not None
    assert sum(len(factor) for factor in factors) < 300


@pytest.mark.parametrize("size", [64, 48, 50, 7])
def test_random_rotations_are_orthogonal_and_applied_as_a_matrix(size):
    q = Orthogonal.random(size, seed=3)
    matrix = q.right(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = torch.randn(5, 2, size, dtype=torch.float64)
    torch.testing.assert_close(q.right(x), x @ matrix)
    assert not torch.equal(matrix, Orthogonal.random(size, seed=4).right(torch.eye(size)))
    assert (hadamard_factors(size) is None) == (size in (50, 7))
    assert paley_matrix(size - size % 4 + 2) is None


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_the_same_in_double_precision(name):
    model = shaken(MODELS[name]().double())
    exact, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    HadamardRotation(seed=1).rotate(model)
    assert (logits(model) - exact).abs().max() < 1e-8 * exact.abs().max().clamp_min(1)
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(before[n], p)]
    assert not [n for n in still if "o_proj.weight" in n or "down_proj" in n or "v_proj.w" in n]
    gains = [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]
    assert sum(bool((gain == 1).all()) for gain in gains) >= 4
    assert model.lm_head is not None
    assert not model.config.tie_word_embeddings


def test_identity_experts_need_a_constant_gain():
    model = decoder(**SHORTCUT).double()
    shaken(model, keep=("post_attention_layernorm.0",))
    with torch.no_grad():
        for layer in model.layers:
            layer.post_attention_layernorm[0].weight.fill_(0.7)
    exact = logits(model)
    HadamardRotation().rotate(model)
    assert (logits(model) - exact).abs().max() < 1e-8 * exact.abs().max().clamp_min(1)
    with pytest.raises(ConfigError, match="identity experts"):
        HadamardRotation().rotate(shaken(decoder(**SHORTCUT)))


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(ConfigError, match="multi-token-prediction"):
        HadamardRotation().rotate(decoder(num_mtp_layers=1))
    with pytest.raises(ConfigError, match="must see the model's config first"):
        HadamardRotation().embedding(torch.nn.Embedding(4, 8))


@pytest.mark.parametrize("name", ["gqa", "moe", "mla", "gpt-oss"])
def test_part_by_part_is_the_same_as_at_once(name):
    torch.manual_seed(0)
    whole, parts = shaken(MODELS[name]()), MODELS[name]()
    parts.load_state_dict(whole.state_dict())
    HadamardRotation(seed=5).rotate(whole)
    rotation = HadamardRotation(seed=5)
    rotation.config(parts.config)
    rotation.embedding(parts.embed_tokens)
    for index, layer in enumerate(parts.layers):
        block = find_block(layer, index, lambda path: checkpoint.module_name(parts.config, path))
        rotation.block(block)
    rotation.head(parts.norm, parts.lm_head)
    torch.testing.assert_close(logits(parts), logits(whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_a_rotated_model_is_an_ordinary_checkpoint(name, tmp_path):
    model = shaken(MODELS[name]())
    exact = logits(model)
    HadamardRotation().rotate(model)
    checkpoint.save(model, tmp_path / "rotated")
    again = logits(checkpoint.load(tmp_path / "rotated"))
    torch.testing.assert_close(again, exact, rtol=1e-3, atol=1e-3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated").eval()
    with torch.no_grad():
        got = theirs(torch.arange(16)[None]).logits[0]
    torch.testing.assert_close(got, exact[:16], rtol=1e-3, atol=1e-3)


def test_outliers_of_the_residual_stream_are_spread():
    model = decoder()
    with torch.no_grad():
        model.embed_tokens.weight[:, 5] *= 30

    def peak():
        seen = []
        hook = model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda module, arguments: seen.append(arguments[0])
        )
        logits(model)
        hook.remove()
        return float((seen[0].abs().amax(1) / seen[0].square().mean(1).sqrt()).mean())

    before = peak()
    HadamardRotation().rotate(model)
    assert before > 5
    assert peak() < before / 2
