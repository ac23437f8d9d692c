"""Products of training on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.models.layers import Linear
from serval.train import cpu


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
def test_every_linear_of_a_decoder_is_swapped_and_put_back(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    decoder = Decoder(config)
    before = {name: type(module) for name, module in decoder.named_modules()}
    linears = [name for name, kind in before.items() if kind in (nn.Linear, Linear)]
    assert len(linears) >= 14
    x = torch.randn(5, 32, requires_grad=True)
    layer = decoder.layers[0].mlp.gate_proj
    expected = layer(x)
    (grad,) = torch.autograd.grad(expected.sum(), layer.weight)
    with cpu.fast_linears(decoder):
        assert {type(decoder.get_submodule(name)) for name in linears} == {cpu.OneDnnLinear}
        found = layer(x)
        (fast,) = torch.autograd.grad(found.sum(), layer.weight)
    assert {name: type(module) for name, module in decoder.named_modules()} == before
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fast, grad)
