"""Batched products, whole and half, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval.errors import ConfigError
from serval.kernels import symmetric_product as products

pytestmark = pytest.mark.usefixtures("arch")

SIZE = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130, 200]))


def close(ours: Tensor, exact: Tensor, depth: int) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6 * depth)


@given(batch=st.integers(0, 3), m=SIZE, n=SIZE, strided=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_products_are_exact_and_symmetric(
    batch: int, m: int, n: int, strided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(batch, m + 3, n)[:, 1 : m + 1] if strided else torch.randn(batch, m, n)
    exact = x.double()
    gram = products.gram(x)
    assert torch.equal(gram, gram.mT)
    close(gram, exact @ exact.mT, n)
    close(products.product(gram / n, x), (gram / n).double() @ exact, m)
    assert torch.equal(products.transposed(x), x.mT)
    a = gram / n
    b = 0.5 * torch.eye(m) - a  # commutes with a
    out = torch.empty_like(a)
    ours = products.symmetric_product(a, b, 2.0, add=a, beta=-3.0, diagonal=0.25, out=out)
    assert ours is out
    assert torch.equal(ours, ours.mT)
    wide = 2 * a.double() @ b.double() - 3 * a.double() + 0.25 * torch.eye(m).double()
    torch.testing.assert_close(ours.double(), wide, rtol=1e-4, atol=1e-4)


def test_blocks_of_rows_and_threads_do_not_change_a_bit() -> None:
    x = torch.randn(1, 500, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = products.gram(x)
        torch.set_num_threads(3)
        assert torch.equal(products.gram(x), alone)
        assert torch.equal(products.gram(torch.cat([x] * 12))[7], alone[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_to_the_reference(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 7).to(dtype)
    assert torch.equal(products.gram(x), torch.bmm(x, x.mT))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"product: got shapes \[1, 2, 3\] and \[1, 2, 3\]"):
        products.product(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
    with pytest.raises(ConfigError, match="out has shape"):
        products.gram(torch.ones(1, 2, 3), out=torch.ones(1, 3, 3))
