from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.compress import Method, compress_decoder
from serval.compress.modules import QuantizedEmbedding, QuantizedLinear, TiedHead
from serval.compress.scheme import WeightScheme, quantize, require_finite
from serval.errors import CheckpointError
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder, moe_decoder

SCHEME = WeightScheme(bits=8)


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
    report = compress_decoder(model, Method())
    assert report.quantised["model.layers.0.mlp.experts.3.up_proj"] == "W8A8 channel"
    assert report.kept["model.layers.0.mlp.gate"].startswith("router")
    assert set(report.kept) == {
        "model.embed_tokens",
        "lm_head",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    }
    latent = compress_decoder(mla_decoder(), Method())
    assert "model.layers.0.self_attn.kv_b_proj" in latent.kept
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in latent.quantised


def test_ignore_and_head():
    model = decoder()
    report = compress_decoder(model, Method(head=8, ignore=["*.o_proj"]))
    assert report.kept["model.layers.1.self_attn.o_proj"] == "asked for"
    assert isinstance(model.lm_head, QuantizedLinear)
    tied = decoder(tie_word_embeddings=True)
    compress_decoder(tied, Method(head=8))
    assert isinstance(tied.lm_head, TiedHead)
    assert isinstance(tied.embed_tokens, QuantizedEmbedding)


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
@pytest.mark.parametrize("head", [None, 8])
def test_a_compressed_decoder_predicts_nearly_the_same(make, head):
    model = make()
    tokens, batch = torch.arange(24), PackedBatch.from_lengths([16, 8])
    with torch.no_grad():
        exact = model.logits(model(tokens, batch))
        compress_decoder(model, Method(head=head))
        got = model.logits(model(tokens, batch))
    assert (got - exact).norm() < 0.15 * exact.norm()


def test_progress_names_each_part():
    seen: list[tuple[int, int, str]] = []
    compress_decoder(
        decoder(), Method(), progress=lambda done, total, name: seen.append((done, total, name))
    )
    assert [name for *_, name in seen] == ["embed_tokens", "layers.0", "layers.1", "head", ""]
    assert seen[-1][0] == seen[-1][1] == 4
