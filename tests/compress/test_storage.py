"""Stored matrices: bit for bit what compressed-tensors stores, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.compress.compressed_tensors import describe
from serval.compress.scheme import WeightScheme
from serval.compress.storage import FORMATS, Storage, check_format, pack_int32, unpack_int32
from serval.errors import CheckpointError, ConfigError
from tests.compress.test_modules import NAMES, SCHEMES, rounded


@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packing_equals_the_package(bits: int, rows: int, columns: int, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    shape = (rows, columns)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)
    packed = pack_int32(codes, bits)
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
    assert torch.equal(pack_int32(codes.T, bits).T, helpers.pack_to_int32(codes, bits, 0))
    assert torch.equal(unpack_int32(packed, bits, columns), codes)


def test_low_nibble_first() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7, 5]], dtype=torch.int8)
    words = pack_int32(codes, 4)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0xFCBA9810, 0x0000000D]


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("format_", FORMATS)
def test_encode_and_decode_are_inverse(scheme: WeightScheme, format_: str) -> None:
    weight = rounded(torch.randn(41, 64), scheme)
    storage = Storage.of(weight, format_)
    tensors = storage.encode(weight)
    spec = storage.spec(41, 64)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec
    back = storage.decode(tensors)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.input_scale == (
        None if weight.input_scale is None else pytest.approx(weight.input_scale)
    )
    if weight.integer is not None:
        assert torch.equal(back.integer, weight.integer)
        assert torch.equal(back.row_factor, weight.row_factor)


@given(seed=st.integers(0, 200), largest=st.sampled_from([1, 7, 127, 1023, 32767]))
@settings(max_examples=40, deadline=None)
def test_integer_scales_are_recovered_from_their_products(seed: int, largest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integer = torch.randint(1, largest + 1, (6, 4), generator=generator)
    factor = torch.rand(6, generator=generator) * 2.0 ** -float(seed % 30) + 1e-12
    scheme = WeightScheme(4, 8, scales="integer")
    codes = torch.zeros(6, 32, dtype=torch.int8)
    storage = Storage(scheme, "pack-quantized")
    tensors = {
        "weight_packed": pack_int32(codes, 4),
        "weight_shape": torch.tensor([6, 32]),
        "weight_scale": integer.float() * factor[:, None],
        "weight_row_factor": factor,
    }
    assert torch.equal(storage.decode(tensors).integer, integer.to(torch.int16))


@pytest.mark.parametrize("format_", FORMATS)
def test_zero_points_and_group_index(format_: str) -> None:
    torch.manual_seed(0)
    weight = rounded(torch.randn(41, 64), WeightScheme(4, 16, "none"))
    weight.zero_points = torch.randint(-8, 8, (41, 4), dtype=torch.int8)
    weight.order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    storage = Storage.of(weight, format_)
    tensors = storage.encode(weight)
    assert tensors["weight_g_idx"][:4].tolist() == [0, 2, 0, 2]
    back = storage.decode(tensors)
    assert torch.equal(back.zero_points, weight.zero_points)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_an_index_without_effect_is_dropped() -> None:
    weight = rounded(torch.randn(4, 64), WeightScheme(4, 16, "none"))
    storage = replace(Storage.of(weight), group_index=True)
    for index in (torch.arange(64) // 16, torch.full((64,), -1)):
        tensors = {**storage.encode(weight), "weight_g_idx": index.to(torch.int32)}
        assert storage.decode(tensors).order is None
    wrong = {**storage.encode(weight), "weight_g_idx": torch.zeros(64, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="weight_g_idx does not put 16 inputs"):
        storage.decode(wrong)


def test_stored_contradictions_are_named() -> None:
    weight = rounded(torch.randn(4, 64), WeightScheme(4))
    storage = Storage.of(weight)
    tensors = storage.encode(weight)
    with pytest.raises(CheckpointError, match=r"up\.weight_shape is \(4, 65\)"):
        storage.decode({**tensors, "weight_shape": torch.tensor([4, 65])}, "up")
    bad = tensors["weight_scale"].clone()
    bad[1] = float("nan")
    with pytest.raises(CheckpointError, match=r"up\.weight_scale holds NaN"):
        storage.decode({**tensors, "weight_scale": bad}, "up")
    plain = Storage.of(weight, "int-quantized")
    codes = weight.codes.clone()
    codes[0, 0] = -9
    with pytest.raises(CheckpointError, match=r"codes from -9 to"):
        plain.decode({**plain.encode(weight), "weight": codes}, "up")
    asymmetric = replace(plain, zero_points=True)
    zeros = torch.ones(4, 1, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="weight_zero_point is not 0"):
        asymmetric.decode({**plain.encode(weight), "weight_zero_point": zeros}, "up")


def test_values_that_cannot_be_meant_are_named() -> None:
    weight = rounded(torch.randn(4, 64), WeightScheme(4, 16, "static", "integer"))
    storage = Storage.of(weight)
    tensors = storage.encode(weight)
    assert torch.equal(storage.decode(tensors, "up", (4, 64)).integer, weight.integer)
    shorter = {**tensors, "weight_shape": torch.tensor([4, 60])}  # the same number of words
    with pytest.raises(CheckpointError, match=r"up\.weight_shape is \(4, 60\).*\(4, 64\)"):
        storage.decode(shorter, "up", (4, 64))
    for factor in (1e30, 1.2345, float("nan")):
        scaled = {**tensors, "weight_scale": tensors["weight_scale"] * factor}
        with pytest.raises(CheckpointError, match=r"up\.weight_scale"):
            storage.decode(scaled, "up")
    without = {**tensors, "weight_row_factor": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"up\.weight_scale is not a 16-bit integer"):
        storage.decode(without, "up")
    for scale in (0.0, -0.1, float("inf"), float("nan")):
        with pytest.raises(CheckpointError, match=r"up\.input_scale is"):
            storage.decode({**tensors, "input_scale": torch.tensor([scale])}, "up")


def test_formats_are_checked() -> None:
    assert check_format(None) is None
    assert check_format("int-quantized") == "int-quantized"
    with pytest.raises(ConfigError, match="format is 'gguf'; expected one of: int-quantized"):
        check_format("gguf")


def test_mixed_groups_are_named_by_pattern() -> None:
    four = Storage(WeightScheme(4, 32), "pack-quantized")
    eight = Storage(WeightScheme(8), "int-quantized")
    table = Storage(WeightScheme(8, None, "none"), "int-quantized")
    names = {f"model.layers.{i}.mlp.{leaf}_proj": four for i in range(3) for leaf in ("up", "down")}
    names["model.layers.1.mlp.up_proj"] = eight
    config = describe(names, ["lm_head"], {"model.embed_tokens": table})
    named, pattern = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"], "down_proj$"
    first = [*named, rf"re:model\.layers\.\d+\.mlp\.{pattern}"]
    found = [sorted(group["targets"]) for group in config["config_groups"].values()]
    assert found == [first, ["model.layers.1.mlp.up_proj"], ["model.embed_tokens"]]
    assert config["format"] == "mixed-precision"
    assert describe({"a": four, "b": four}, [])["config_groups"]["group_0"]["targets"] == ["Linear"]
