"""Quantised linear layers: exact integers on every instruction set, and FastGEMM's arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval import kernels
from serval.kernels import PackedWeight
from serval.kernels.w4a8 import reference

SCHEMES = [(4, "channel"), (4, "integer"), (4, "float"), (8, "channel"), (8, "integer")]


def packed_weight(n: int, k: int, bits: int, group: int | None, mode: str) -> PackedWeight:
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (n, k), dtype=torch.int8)
    scales = torch.rand(n, 1 if group is None else k // group) + 0.1
    if mode != "integer":
        return kernels.pack_weight(codes, scales, bits=bits, group_size=group)
    integer = torch.randint(-50, 60, scales.shape, dtype=torch.int16)
    factor = torch.rand(n) + 0.01
    return kernels.pack_weight(
        codes, scales, bits=bits, group_size=group, integer=integer, row_factor=factor
    )


def same(got: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert torch.equal(got, expected)
    else:
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.usefixtures("arch")
@given(
    rows=st.integers(0, 30),
    n=st.integers(1, 100),
    group=st.sampled_from([1, 8, 20, 32, 64, 96, 128]),
    groups=st.integers(1, 5),
    scheme=st.sampled_from(SCHEMES),
    activations=st.sampled_from(["token", "token", "static", "none"]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_equal_to_the_reference(
    rows: int,
    n: int,
    group: int,
    groups: int,
    scheme: tuple[int, str],
    activations: str,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    bits, mode = scheme
    packed = packed_weight(n, group * groups, bits, None if mode == "channel" else group, mode)
    x = torch.randn(rows, packed.inputs)
    if rows > 1:
        x[1] = 0
    b = torch.randn(n) if bias else None
    static = 0.02 if activations == "static" else None
    got = kernels.quantized_linear(x, packed, b, activations=activations, input_scale=static)
    expected = reference.quantized_linear(x, packed, b, activations, static)
    same(got, expected, mode != "float" and activations != "none" and not bias)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("mode", ["channel", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_exact_integers(bits: int, mode: str) -> None:
    """With scales of one the outputs are the int32 sums: a saturating instruction or a lost carry
    would show, for every number of rows that has a kernel of its own."""
    low, k = -(1 << (bits - 1)), 2048
    group = None if mode == "channel" else 32
    for code in (low, -low - 1):
        codes = torch.full((40, k), code, dtype=torch.int8)
        integer = None if group is None else torch.full((40, k // 32), 8, dtype=torch.int16)
        factor = None if group is None else torch.ones(40)
        packed = kernels.pack_weight(
            codes, torch.ones(40, k // (group or k)), bits=bits, group_size=group,
            integer=integer, row_factor=factor,
        )  # fmt: skip
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 20):
            x = torch.full((rows, k), 127.0)
            x[rows // 2 :] = -127.0
            total = float(127 * k * code * (1 if group is None else 8))
            expected = torch.full((rows, 40), total)
            expected[rows // 2 :] = -total
            got = kernels.quantized_linear(x, packed, activations="static", input_scale=1.0)
            assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["channel", "integer", "float"])
def test_threads_do_not_change_results(mode: str) -> None:
    packed = packed_weight(700, 1024, 4, None if mode == "channel" else 64, mode)
    threads = torch.get_num_threads()
    try:
        for rows in (1, 5, 40):
            x = torch.randn(rows, 1024)
            torch.set_num_threads(1)
            one = kernels.quantized_linear(x, packed)
            torch.set_num_threads(3)
            assert torch.equal(one, kernels.quantized_linear(x, packed))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("activations", ["token", "none"])
def test_experts_and_several_layers_equal_single_calls(activations: str) -> None:
    counts = [3, 0, 14, 1, 0, 9]
    experts = [packed_weight(40, 64, 4, 32, "integer") for _ in counts]
    x, biases = torch.randn(sum(counts), 64), torch.randn(len(counts), 40)
    parts = zip(x.split(counts), experts, biases, strict=True)
    single = [kernels.quantized_linear(p, w, b, activations=activations) for p, w, b in parts]
    for stack in (experts, kernels.stack_weights(experts)):
        got = kernels.quantized_grouped_linear(x, stack, counts, biases, activations=activations)
        same(got, torch.cat(single), activations == "token")
    layers = [packed_weight(n, 64, 4, 32, "integer") for n in (64, 7, 130)]
    for layer, got in zip(
        layers, kernels.quantized_linear_multi(x, layers, activations=activations), strict=True
    ):
        assert torch.equal(got, kernels.quantized_linear(x, layer, activations=activations))


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize(("bits", "mode"), SCHEMES)
def test_unpacking_and_table_rows(bits: int, mode: str) -> None:
    for n, k, group in ((33, 60, 20), (16, 64, 32), (5, 7, 7)):
        packed = packed_weight(n, k, bits, None if mode == "channel" else group, mode)
        codes, scales, integer, factor = kernels.unpack_weight(packed)
        again = kernels.pack_weight(
            codes, scales, bits=bits, group_size=packed.group_size, integer=integer,
            row_factor=factor,
        )  # fmt: skip
        assert torch.equal(again.data, packed.data)
        tokens = torch.randint(0, n, (2, 9))
        rows = kernels.quantized_embedding(tokens, packed)
        assert torch.equal(rows, reference.dequantize(packed)[tokens])


def test_a_row_of_nan_or_infinity_is_not_hidden() -> None:
    packed = packed_weight(20, 64, 4, 32, "integer")
    x = torch.randn(4, 64)
    x[1, 3], x[2, 60] = float("nan"), float("inf")
    got = kernels.quantized_linear(x, packed)
    assert got.isnan().all(1).tolist() == [False, True, True, False]


# -- FastGEMM (OdysseyLLM) ------------------------------------------------------------------------


def test_high_nibbles_are_sixteen_times_the_codes() -> None:
    """For every byte: mask and shift give what sign extension gives, times 16."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    low = torch.where((every & 15) > 7, (every & 15).int() - 16, (every & 15).int())
    high = torch.where((every >> 4) > 7, (every >> 4).int() - 16, (every >> 4).int())
    got = reference.high_nibbles(every).int()
    assert torch.equal(got[:, 0::2], 16 * low)
    assert torch.equal(got[:, 1::2], 16 * high)


@given(k=st.integers(1, 2000), rows=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_fast_gemm_is_bit_equal_to_sign_extended_weights(k: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-8, 8, (24, 2 * k), dtype=torch.int8)
    x = torch.randint(-127, 128, (rows, 2 * k), dtype=torch.int8)
    scale, x_scale = torch.rand(24), torch.rand(rows)
    nibbles = reference.pack_high_nibbles(codes)
    assert torch.equal(reference.high_nibbles(nibbles), codes * 16)
    got = reference.fast_gemm(x, nibbles, scale, x_scale)
    packed = kernels.pack_weight(codes, scale, bits=4)
    plain = reference.integer_sums(x, packed).float() * (x_scale[:, None] * scale)
    assert torch.equal(got, plain)
