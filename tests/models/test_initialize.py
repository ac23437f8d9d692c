"""Initialisers: registered, seeded, and with the structure they promise."""

from __future__ import annotations

import pytest
import torch

from serval.models.config import MLAConfig, ModelConfig
from serval.models.decoder import Decoder
from serval.models.initialize import INITIALIZERS, mimetic


def make(**options) -> Decoder:
    return Decoder(
        ModelConfig(
            vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, intermediate_size=48, **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", INITIALIZERS)
def test_same_seed_same_weights(name: str) -> None:
    states = []
    for _ in range(2):
        decoder = make()
        torch.manual_seed(5)
        INITIALIZERS[name].load()(decoder)
        states.append(decoder.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_mimetic_products_lean_to_the_identity() -> None:
    torch.manual_seed(0)
    decoder = make()
    before = decoder.layers[0].mlp.up_proj.weight.std()
    mimetic(decoder)
    attention = decoder.layers[0].self_attn
    q = attention.q_proj.weight.view(2, 2, 32, 64)
    k = attention.k_proj.weight.view(2, 32, 64)
    assert torch.equal(q[:, 0], k)
    assert not torch.equal(q[:, 1], k)
    v = attention.v_proj.weight.view(2, 32, 64)
    out = attention.o_proj.weight.view(64, 2, 2, 32)
    copied = sum(out[:, g, h] @ v[g] for g in range(2) for h in range(2))
    off_diagonal = copied - torch.diag(copied.diagonal())
    assert copied.diagonal().mean() > 4 * off_diagonal.abs().mean()
    torch.testing.assert_close(decoder.layers[0].mlp.up_proj.weight.std(), before, rtol=0.2, atol=0)


def test_mimetic_leaves_latent_attention_to_the_normal_draw() -> None:
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    decoder = make(mla=mla)
    torch.manual_seed(1)
    mimetic(decoder)
    mixed = {k: v.clone() for k, v in decoder.state_dict().items()}
    torch.manual_seed(1)
    decoder.reset_parameters()
    assert all(torch.equal(mixed[key], value) for key, value in decoder.state_dict().items())
