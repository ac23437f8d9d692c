"""int8 linear layers: integers must be exact, so results match the reference to float rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import kernels
from serval.kernels.int8_linear import reference

pytestmark = pytest.mark.usefixtures("arch")


def weights(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n) + 0.01


@given(
    rows=st.integers(0, 30),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_int8_linear(rows: int, n: int, k: int, bias: bool, strided: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight, scale = weights(n, k)
    x = torch.randn(rows, k + 3)[:, :k] if strided else torch.randn(rows, k)
    if rows > 1:
        x[1] = 0
    b = torch.randn(n) if bias else None
    packed = kernels.pack_int8_weight(weight, scale)
    assert torch.equal(kernels.unpack_int8_weight(packed, k), weight)
    ours, theirs = kernels.int8_linear(x, packed, b), reference.int8_linear(x, weight, scale, b)
    torch.testing.assert_close(
        ours, theirs, rtol=1e-6, atol=1e-5 * float(theirs.abs().amax() if rows else 1)
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 11, 12, 13, 25, 64])
def test_every_block_size_with_extreme_codes(rows: int) -> None:
    """All products at their largest: a saturating instruction would show."""
    k, n = 2048, 200
    for value in (127, -128):
        weight = torch.full((n, k), value, dtype=torch.int8)
        packed = kernels.pack_int8_weight(weight, torch.ones(n))
        x = torch.ones(rows, k)
        assert torch.allclose(
            kernels.int8_linear(x, packed), torch.full((rows, n), float(value * k))
        )
        assert torch.allclose(
            kernels.int8_linear(-x, packed), torch.full((rows, n), float(-value * k))
        )


def test_several_layers_in_one_call_equal_single_calls() -> None:
    x = torch.randn(2, 3, 96)
    layers = [kernels.pack_int8_weight(*weights(n, 96)) for n in (64, 16, 130)]
    biases = [None, torch.randn(16), None]
    together = kernels.int8_linear_multi(x, layers, biases)
    for out, layer, bias in zip(together, layers, biases, strict=True):
        assert out.shape == (2, 3, layer.scale.shape[0])
        assert torch.equal(out, kernels.int8_linear(x, layer, bias))
    assert kernels.int8_linear_multi(x.bfloat16(), layers)[0].dtype == torch.bfloat16


def test_threads_do_not_change_results() -> None:
    x = torch.randn(5, 1024)
    packed = kernels.pack_int8_weight(*weights(1500, 1024))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kernels.int8_linear(x, packed)
        torch.set_num_threads(3)
        assert torch.equal(one, kernels.int8_linear(x, packed))
    finally:
        torch.set_num_threads(threads)


def test_wrong_shapes_are_named() -> None:
    packed = kernels.pack_int8_weight(*weights(20, 32))
    with pytest.raises(ValueError, match="inputs of 64 features"):
        kernels.int8_linear(torch.randn(1, 64), packed)
    with pytest.raises(ValueError, match=r"torch\.float32 weight"):
        kernels.pack_int8_weight(torch.randn(4, 4), torch.ones(4))
    with pytest.raises(ValueError, match="1 weights and 2 biases"):
        kernels.int8_linear_multi(torch.randn(1, 32), [packed], [None, None])
