"""Quantised linear layers at the edges of what they accept, with every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from serval import kernels
from serval.errors import ConfigError
from serval.kernels.w4a8 import reference

pytestmark = pytest.mark.usefixtures("arch")
MODES = ["channel", "integer", "float"]


def weight(
    n: int, k: int, bits: int, group: int | None, mode: str, extreme: bool = False
) -> kernels.PackedWeight:
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (n, k), dtype=torch.int8)
    if extreme:  # the largest sums of either sign
        codes = torch.where(torch.arange(n)[:, None] % 2 == 0, low, -low - 1).to(torch.int8)
        codes = codes.expand(n, k).contiguous()
    scales = torch.rand(n, 1 if group is None else k // group) * 0.1 + 0.01
    if mode != "integer":
        return kernels.pack_weight(codes, scales, bits=bits, group_size=group)
    integer = torch.randint(-30, 30, scales.shape, dtype=torch.int16)
    factor = torch.rand(n) * 1e-3
    return kernels.pack_weight(
        codes, scales, bits=bits, group_size=group, integer=integer, row_factor=factor
    )


def agree(got: Tensor, expected: Tensor, exact: bool) -> None:
    assert got.dtype == expected.dtype
    if exact or not expected.numel():
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        scale = float(expected.float().nan_to_num().abs().max()) or 1.0
        step = 1e-5 if got.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got, expected, rtol=step, atol=step * scale, equal_nan=True)


def group_of(k: int, mode: str) -> int | None:
    """A divisor of k that is small and, where k allows, odd."""
    if mode == "channel":
        return None
    return next((g for g in (3, 5, 7, 2) if k % g == 0), k)


@pytest.mark.parametrize("activations", ["token", "static", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_shapes(bits: int, mode: str, activations: str) -> None:
    static = 0.02 if activations == "static" else None
    for n, k in [(1, 1), (17, 3), (33, 77), (7, 130), (65, 35)]:
        packed = weight(n, k, bits, group_of(k, mode), mode)
        bias = torch.randn(n)
        for rows in (0, 1, 2, 5, 7, 8, 9, 13, 25):
            x = torch.randn(rows, k)
            got = kernels.quantized_linear(
                x, packed, bias, activations=activations, input_scale=static
            )
            expected = reference.quantized_linear(x, packed, bias, activations, static)
            agree(got, expected, activations != "none" and mode != "float")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_largest_sums(bits: int, mode: str) -> None:
    k = 4096
    packed = weight(18, k, bits, None if mode == "channel" else 32, mode, extreme=True)
    x = torch.ones(3, k)
    x[1] = -1
    x[2, ::2] = -1
    expected = reference.quantized_linear(x, packed)
    agree(kernels.quantized_linear(x, packed), expected, mode != "float")


@pytest.mark.parametrize(("bits", "largest"), [(4, 8), (8, 128)])
def test_sums_at_the_last_integer_that_fits(bits: int, largest: int) -> None:
    """I * sum |q| = 516 * 32767 proves 127 times that to fit; one more code would not."""
    codes = [-largest] * (516 // largest) + [516 % largest]
    row = torch.tensor([codes, codes], dtype=torch.int8)
    integer = torch.tensor([[32767], [-32767]], dtype=torch.int16)
    settings = {"bits": bits, "group_size": row.shape[1], "row_factor": torch.ones(2)}
    packed = kernels.pack_weight(row, torch.ones(2), integer=integer, **settings)
    x = torch.sign(row[:1].float()) * 127
    x = torch.cat([x, -x])
    got = kernels.quantized_linear(x, packed)
    exact = 127.0 * 516 * 32767
    assert torch.equal(got, torch.tensor([[exact, -exact], [-exact, exact]]))
    row[1, -1] += 1
    with pytest.raises(ConfigError, match="channel 1 could overflow 32 bits"):
        kernels.pack_weight(row, torch.ones(2), integer=integer, **settings)


def layouts(rows: int, k: int) -> Iterator[tuple[str, Tensor]]:
    """The same numbers of rows in tensors that are not plain."""
    yield "transposed", torch.randn(k, rows).T
    yield "sliced", torch.randn(rows, k + 9)[:, 4:-5]
    yield "strided", torch.randn(rows, 2 * k)[:, ::2]
    yield "expanded", torch.randn(1, k).expand(rows, k)
    yield "three-dims", torch.randn(rows, 2, k).transpose(0, 1)
    yield "one-dim", torch.randn(k)
    yield "bfloat16", torch.randn(rows, k).bfloat16()
    yield "float16", torch.randn(rows, k).half()
    yield "float64", torch.randn(rows, k).double()
    yield "empty-batch", torch.randn(2, 0, k)


@pytest.mark.parametrize("activations", ["token", "none"])
def test_inputs_that_are_not_plain(activations: str) -> None:
    packed = [weight(19, 70, 4, 14, "integer"), weight(8, 70, 4, 14, "integer")]
    for name, x in layouts(6, 70):
        expected = [reference.quantized_linear(x, p, None, activations) for p in packed]
        got = kernels.quantized_linear_multi(x, packed, activations=activations)
        for one, wanted in zip(got, expected, strict=True):
            assert one.shape == wanted.shape, name
            agree(one, wanted, activations == "token")
        agree(kernels.quantized_linear(x, packed[0], activations=activations), got[0], True)


def test_multi_mixes_schemes() -> None:
    kinds = [(4, None, "channel"), (8, 10, "float"), (4, 10, "integer"), (4, 5, "integer")]
    packed = [weight(5 + i, 40, *kind) for i, kind in enumerate(kinds)]
    x, bias = torch.randn(3, 40), torch.randn(6)
    biases = [None, bias, None, None]
    for got, p, b in zip(kernels.quantized_linear_multi(x, packed, biases), packed, biases):
        agree(got, reference.quantized_linear(x, p, b), p.mode != "float")


@pytest.mark.parametrize("activations", ["token", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_rows(activations: str, dtype: torch.dtype) -> None:
    packed = [weight(21, 48, 4, 16, "integer") for _ in range(4)]
    stack, biases = kernels.stack_weights(packed), torch.randn(4, 21)
    for counts in ([0, 0, 0, 0], [0, 9, 0, 0], [1, 0, 0, 30], [0, 0, 0, 1], [2, 3, 7, 1]):
        x = torch.randn(sum(counts), 48).to(dtype)
        runs = zip(x.split(counts), packed, biases)
        expected = torch.cat(
            [reference.quantized_linear(part, p, b, activations) for part, p, b in runs]
        )
        for weights in (stack, packed):
            got = kernels.quantized_grouped_linear(
                x, weights, counts, biases, activations=activations
            )
            agree(got, expected, activations == "token")


def test_rows_do_not_disturb_each_other() -> None:
    packed = weight(40, 64, 4, 32, "integer")
    x = torch.randn(20, 64)
    clean = kernels.quantized_linear(x, packed)
    x[3, 5], x[11, 0], x[19] = float("nan"), float("-inf"), 0.0
    got = kernels.quantized_linear(x, packed)
    assert got[[3, 11]].isnan().all()
    assert torch.equal(got[19], torch.zeros(40))
    rest = [row for row in range(19) if row not in (3, 11)]
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e30, 3e38])
def test_extreme_magnitudes(magnitude: float) -> None:
    packed = weight(9, 33, 4, 11, "integer")
    x = torch.randn(4, 33).clamp(-1, 1) * magnitude
    got, expected = kernels.quantized_linear(x, packed), reference.quantized_linear(x, packed)
    if magnitude < 1e-37:  # 1 / scale may be infinite: any result this small will do
        assert not got.isnan().any()
        assert got.abs().max() <= 127 * 127 * 30 * 33 * 8 * magnitude
    else:
        agree(got, expected, True)


@pytest.mark.parametrize("activations", ["token", "none"])
def test_threads_change_nothing(activations: str) -> None:
    before = torch.get_num_threads()
    packed = [weight(n, 520, 4, 40, "integer") for n in (3, 33, 300)]
    x = torch.randn(37, 520)
    try:
        results = []
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            results.append(kernels.quantized_linear_multi(x, packed, activations=activations))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_table_rows() -> None:
    for bits in (4, 8):
        for mode in MODES:
            packed = weight(37, 45, bits, group_of(45, mode), mode)
            tokens = torch.tensor([[36, 0, 16], [15, 17, 36]], dtype=torch.int32)
            for chosen in (tokens, tokens.T, tokens[:0], tokens[0, 0]):
                got = kernels.quantized_embedding(chosen, packed)
                agree(got, reference.dequantize(packed)[chosen.long()], False)
            for bad in (-1, 37):
                with pytest.raises(IndexError):
                    kernels.quantized_embedding(torch.tensor([bad]), packed)


def test_codes_need_not_be_contiguous() -> None:
    codes = torch.randint(-8, 8, (24, 10), dtype=torch.int8).T
    packed = kernels.pack_weight(codes, torch.ones(10), bits=4, group_size=None)
    assert torch.equal(kernels.unpack_weight(packed)[0], codes)
    grouped = kernels.pack_weight(codes, torch.ones(3, 10).T, bits=4, group_size=8)
    assert torch.equal(kernels.unpack_weight(grouped)[0], codes)
    one = kernels.pack_weight(codes, torch.arange(10.0), bits=4, group_size=24)
    assert torch.equal(kernels.unpack_weight(one)[1], torch.arange(10.0)[:, None])


def test_wrong_shapes_are_refused() -> None:
    packed = weight(20, 32, 4, None, "channel")
    x = torch.randn(2, 32)
    with pytest.raises(ValueError, match="31"):
        kernels.quantized_linear(torch.randn(2, 31), packed)
    for bias in (torch.randn(19), torch.randn(1), torch.randn(2, 20)):
        with pytest.raises(ValueError, match="bias"):
            kernels.quantized_linear(x, packed, bias)
        with pytest.raises(ValueError, match="bias"):
            kernels.quantized_linear_multi(x, [packed, packed], [None, bias])
    stack = kernels.stack_weights([packed, packed])
    for biases in (torch.randn(20), torch.randn(1, 20), torch.randn(2, 19)):
        with pytest.raises(ValueError, match="bias"):
            kernels.quantized_grouped_linear(x, stack, [1, 1], biases)
    for counts in ([3], [1, 0], [3, -1], [1, 1, 0]):
        with pytest.raises(ValueError, match="counts"):
            kernels.quantized_grouped_linear(x, stack, counts)
    for experts in (packed, []):
        with pytest.raises(ValueError, match="0 experts"):
            kernels.quantized_grouped_linear(x, experts, [1, 1])
    with pytest.raises(ValueError, match="stack"):
        kernels.quantized_linear(x, stack)
    with pytest.raises(ValueError, match="alike"):
        kernels.stack_weights([packed, weight(20, 32, 8, None, "channel")])
