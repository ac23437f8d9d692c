from __future__ import annotations

import pytest
import torch

from serval.compress.sites import input_sites
from serval.models.batch import PackedBatch
from serval.models.config import MLAConfig, MoEConfig
from tests.compress.toy import decoder, mla_decoder, moe_decoder

MODELS = {
    "gqa": decoder,
    "mha-biases": lambda: decoder(num_key_value_heads=4, qkv_bias=True, mlp_bias=True),
    "moe": moe_decoder,
    "mla": mla_decoder,
    "shortcut": lambda: decoder(
        block="shortcut",
        mla=MLAConfig(
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20
        ),
        moe=MoEConfig(num_experts=4, top_k=3, intermediate_size=36, num_zero_experts=2),
        num_key_value_heads=4,
    ),
}


def logits(model):
    tokens, batch = torch.arange(24), PackedBatch.from_lengths([16, 8])
    with torch.no_grad():
        return model.logits(model(tokens, batch))


@pytest.mark.parametrize("name", MODELS)
def test_folding_any_site_leaves_the_function_unchanged(name):
    model = MODELS[name]().double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    exact = logits(model)
    folded = 0
    for layer in model.layers:
        for site in input_sites(layer):
            assert all(reader.weight.shape[-1] == site.width for reader in site.readers)
            assert site.foldable != bool(site.stuck)
            if site.foldable:
                site.fold(torch.empty(site.width).uniform_(0.01, 100.0))
                folded += 1
    assert folded >= 6
    torch.testing.assert_close(logits(model), exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_block_reads_exactly_one_site(name):
    for layer in MODELS[name]().layers:
        sites = list(input_sites(layer))
        seen = [reader.name for site in sites for reader in site.readers]
        expected = {
            path.removesuffix(".weight")
            for path, parameter in layer.named_parameters()
            if parameter.dim() >= 2 and "kv_b_proj" not in path
        }
        assert sorted(seen) == sorted(expected)
        assert len({site.name for site in sites}) == len(sites)


def test_what_cannot_absorb_a_scale_says_why():
    stuck = {site.name: site.stuck for site in input_sites(decoder().layers[0])}
    assert "share value heads" in stuck["self_attn.o_proj"]
    stuck = {site.name: site.stuck for site in input_sites(MODELS["shortcut"]().layers[0])}
    assert "identity experts" in stuck["post_attention_layernorm.0"]
    assert stuck["post_attention_layernorm.1"] == ""
