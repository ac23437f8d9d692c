from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.compress.int8 import SCHEME, Int8
from serval.compress.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from serval.compress.scheme import quantize, require_finite
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
    made = quantize(weight, SCHEME, dtype)
    assert made.codes.dtype == torch.int8
    assert made.scales.shape == (rows, 1)
    assert torch.equal(made.scales.to(dtype).float(), made.scales)
    error = (made.dequantize() - weight.float()).abs()
    # 127.5 codes span the largest weight; a scale rounded down to bf16 clips it a little more.
    slack = 0.501 if dtype == torch.float32 else 1.1
    assert (error <= slack * made.scales * (1 + 1e-5)).all()


def test_zero_channels_and_bad_weights():
    weight = torch.zeros(3, 5)
    weight[1] = 1
    made = quantize(weight, SCHEME)
    assert (made.codes[0] == 0).all()
    assert (made.scales > 0).all()
    for bad in (float("nan"), float("inf")):
        weight[2, 2] = bad
        with pytest.raises(CheckpointError, match=r"'layer\.weight' holds NaN"):
            require_finite(weight, "layer.weight")


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
    assert isinstance(model.lm_head, QuantizedLinear)
    tied = decoder(tie_word_embeddings=True)
    Int8(head=True).compress(tied)
    assert isinstance(tied.lm_head, TiedHead)
    assert isinstance(tied.embed_tokens, QuantizedEmbedding)


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
