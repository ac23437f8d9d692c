from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.compress.int8 import Int8
from serval.compress.int8_modules import (
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    TiedInt8Head,
    quantize_channels,
)
from serval.errors import CheckpointError
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder, moe_decoder


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_rounding_error_is_at_most_half_a_step(rows, columns, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).to(dtype)
    codes, scale = quantize_channels(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    assert scale.shape == (rows, 1)
    error = (codes.float() * scale.float() - weight.float()).abs()
    # 127.5 codes span the largest weight; a scale rounded down to bf16 clips it a little more.
    slack = 0.501 if dtype == torch.float32 else 1.1
    assert (error <= slack * scale.float() * (1 + 1e-5)).all()


def test_zero_channels_and_bad_weights():
    weight = torch.zeros(3, 5)
    weight[1] = 1
    codes, scale = quantize_channels(weight)
    assert (codes[0] == 0).all()
    assert (scale > 0).all()
    for bad in (float("nan"), float("inf")):
        weight[2, 2] = bad
        with pytest.raises(CheckpointError, match=r"'layer\.weight' holds NaN"):
            quantize_channels(weight, "layer.weight")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(64, 48), (33, 17), (5, 1)])
def test_linear_matches_the_product_of_its_codes(columns, rows, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, rows, bias=bias)
    made = Int8Linear.quantize(linear)
    tensors = made.checkpoint_tensors()
    exact = torch.nn.functional.linear
    x = torch.randn(7, columns)
    dequantised = tensors["weight"].float() * tensors["weight_scale"]
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / step).round() * step
    with torch.no_grad():
        torch.testing.assert_close(
            made(x), exact(rounded, dequantised, linear.bias), atol=1e-4, rtol=1e-4
        )
        assert (made(x) - linear(x)).norm() < 0.03 * linear(x).norm()
        assert made(x[0]).shape == (rows,)


def test_linear_keeps_float_scales_when_the_model_changes_dtype():
    made = Int8Linear.quantize(torch.nn.Linear(16, 16))
    scale = made.scale.clone()
    assert torch.equal(made.bfloat16().scale, scale)
    assert copy.deepcopy(made).data.data_ptr() != made.data.data_ptr()


def test_embedding_and_tied_head_share_one_table():
    torch.manual_seed(0)
    table = torch.nn.Embedding(203, 50)
    made = Int8Embedding.quantize(table)
    tokens = torch.tensor([[0, 17], [202, 5]])
    rows = made(tokens)
    assert rows.shape == (2, 2, 50)
    assert (rows - table(tokens)).abs().max() < made.scale.max()
    stored = made.checkpoint_tensors()
    torch.testing.assert_close(rows, (stored["weight"].float() * stored["weight_scale"])[tokens])
    hidden = torch.randn(3, 50)
    exact = hidden @ table.weight.T
    assert (TiedInt8Head(made)(hidden) - exact).norm() < 0.03 * exact.norm()


def test_experts_match_the_float_stack():
    experts = moe_decoder().layers[0].mlp.experts
    made = Int8Experts.quantize(experts)
    x, counts = torch.randn(9, 64), [4, 0, 3, 2]
    with torch.no_grad():
        exact = experts(x, counts)
        assert (made(x, counts) - exact).norm() < 0.05 * exact.norm()


def test_what_is_replaced_and_what_is_not():
    model = moe_decoder()
    report = Int8().compress(model)
    assert "model.layers.0.mlp.experts" in report.quantised
    assert report.kept["model.layers.0.mlp.gate"].startswith("router")
    assert set(report.kept) == {
        "model.embed_tokens",
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    }
    latent = Int8().compress(mla_decoder())
    assert "model.layers.0.self_attn.kv_b_proj" in latent.kept
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in latent.quantised


def test_ignore_and_head():
    model = decoder()
    report = Int8(head=True, ignore=("*.o_proj",)).compress(model)
    assert report.kept["model.layers.1.self_attn.o_proj"] == "asked for"
    assert isinstance(model.lm_head, Int8Linear)
    tied = decoder(tie_word_embeddings=True)
    Int8(head=True).compress(tied)
    assert isinstance(tied.lm_head, TiedInt8Head)
    assert isinstance(tied.embed_tokens, Int8Embedding)


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
@pytest.mark.parametrize("head", [False, True])
def test_a_compressed_decoder_predicts_nearly_the_same(make, head):
    model = make()
    tokens, batch = torch.arange(24), PackedBatch.from_lengths([16, 8])
    with torch.no_grad():
        exact = model.logits(model(tokens, batch))
        Int8(head=head).compress(model)
        got = model.logits(model(tokens, batch))
    assert (got - exact).norm() < 0.15 * exact.norm()


def test_progress_names_each_module():
    seen: list[tuple[int, int, str]] = []
    Int8().compress(decoder(), lambda done, total, name: seen.append((done, total, name)))
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1
    assert seen[0][2] == "model.embed_tokens"
