"""The mixture against its definition, one token and one expert at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from serval.models.config import ModelConfig, MoEConfig
from serval.models.moe import MixtureOfExperts


def build(**options) -> MixtureOfExperts:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=8, top_k=3, intermediate_size=12, **options)
    config = ModelConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, moe=moe,
    )  # fmt: skip
    layer = MixtureOfExperts(config, moe)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        if layer.gate.e_score_correction_bias is not None:
            layer.gate.e_score_correction_bias.normal_(0, 0.2)
    return layer


def expert(layer: MixtureOfExperts, index: int, x: torch.Tensor) -> torch.Tensor:
    if index >= layer.moe.num_experts:
        return x
    gate, up = (layer.experts.gate_up_proj[index] @ x).chunk(2)
    return layer.experts.down_proj[index] @ (F.silu(gate) * up)


VARIANTS = {
    "softmax": {},
    "normalised": {"norm_topk_prob": True},
    "sigmoid groups": {
        "scoring": "sigmoid", "n_group": 4, "topk_group": 2, "selection_bias": True,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "zero experts": {
        "num_zero_experts": 4, "selection_bias": True, "routed_scaling_factor": 6.0,
    },
    "softmax of top": {"scoring": "softmax_topk", "router_bias": True},
    "shared": {"shared_intermediate_size": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_output_is_the_weighted_sum_of_the_chosen_experts(name: str) -> None:
    layer = build(**VARIANTS[name])
    x = torch.randn(11, 16)
    weights, chosen = layer.gate(x)
    expected = torch.stack(
        [
            sum(w * expert(layer, int(i), row) for w, i in zip(ws, ids, strict=True))
            for row, ws, ids in zip(x, weights, chosen, strict=True)
        ]
    )
    if layer.shared_experts is not None:
        expected = expected + layer.shared_experts(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_selection_bias_selects_and_never_enters_the_weights() -> None:
    layer = build(selection_bias=True)
    x = torch.randn(6, 16)
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    bias.zero_()
    bias[5] = 10.0
    weights, chosen = layer.gate(x)
    assert (chosen == 5).any(dim=1).all()
    scores = F.linear(x, layer.gate.weight).softmax(-1)
    torch.testing.assert_close(weights, scores.gather(1, chosen))


def test_group_limit_keeps_choices_inside_the_best_groups() -> None:
    layer = build(scoring="sigmoid", n_group=4, topk_group=2)
    _, chosen = layer.gate(torch.randn(200, 16))
    assert all(len(set((row // 2).tolist())) <= 2 for row in chosen)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = build(num_zero_experts=4, shared_intermediate_size=8)
    x = torch.randn(9, 16)
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_permuting_experts_changes_nothing() -> None:
    layer = build(selection_bias=True)
    x = torch.randn(9, 16)
    before = layer(x)
    order = torch.randperm(8)
    with torch.no_grad():
        layer.gate.weight.copy_(layer.gate.weight[order])
        layer.gate.e_score_correction_bias.copy_(layer.gate.e_score_correction_bias[order])
        layer.experts.gate_up_proj.copy_(layer.experts.gate_up_proj[order])
        layer.experts.down_proj.copy_(layer.experts.down_proj[order])
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_identity_experts_alone_scale_the_input() -> None:
    layer = build(num_zero_experts=4, routed_scaling_factor=6.0, selection_bias=True)
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    bias.fill_(-10.0)
    bias[8:] = 10.0
    x = torch.randn(5, 16)
    weights, chosen = layer.gate(x)
    assert (chosen >= 8).all()
    torch.testing.assert_close(layer(x), x * weights.sum(-1, keepdim=True))
