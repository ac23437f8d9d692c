"""Few-row linear layers against torch.nn.functional.linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import kernels

pytestmark = pytest.mark.usefixtures("arch")


@given(
    rows=st.integers(0, 35),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    bias=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_linear(
    rows: int, n: int, k: int, bias: bool, strided: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, 2 * k)[:, ::2] if strided else torch.randn(rows, k)
    x, weight = x.to(dtype), torch.randn(n, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    expected = torch.nn.functional.linear(
        x.float(), weight.float(), None if b is None else b.float()
    )
    ours = kernels.linear(x, weight, b)
    assert ours.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance * k**0.5)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_float32_rows_meet_a_bfloat16_weight(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serval.kernels.dense_linear.reference._WIDENED_ROWS", 16)
    x, weight = torch.randn(rows, 33), torch.randn(50, 33).bfloat16()
    b = torch.randn(50) if bias else None
    expected = torch.nn.functional.linear(x, weight.float(), b)
    torch.testing.assert_close(kernels.linear(x, weight, b), expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight = torch.randn(13, 333), torch.randn(50, 333)
    together = kernels.linear(x, weight)
    for row in range(13):
        assert torch.equal(kernels.linear(x[row], weight), together[row])


def test_gradients_and_autocast_go_to_torch() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8, requires_grad=True)
    kernels.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(x, weight.detach()).dtype == torch.bfloat16
