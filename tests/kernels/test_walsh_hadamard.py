"""The Walsh-Hadamard transform: orthogonal, symmetric, its own inverse, equal to the dense one."""

from __future__ import annotations

import pytest
import torch

from serval import kernels
from serval.kernels.walsh_hadamard import reference

DIMS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("dim", DIMS)
def test_the_matrix_is_symmetric_orthogonal_and_its_own_inverse(dim: int) -> None:
    h = reference.sylvester(dim) * dim**-0.5
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h @ h, torch.eye(dim, dtype=torch.float64), atol=1e-12, rtol=0)
    x, y = torch.randn(3, dim, dtype=torch.float64), torch.randn(5, dim, dtype=torch.float64)
    rotated = kernels.hadamard(x) @ kernels.hadamard(y).T
    torch.testing.assert_close(rotated, x @ y.T, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(reference.hadamard(x, dim), x @ h, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("dim", [*DIMS, 80, 96, 192])
def test_the_fast_transform_is_the_dense_product(dim: int) -> None:
    block = dim & -dim
    h = reference.sylvester(block, torch.float32) * block**-0.5
    x, y = torch.randn(7, 3, dim), torch.randn(2, dim)
    wanted = [(z.unflatten(-1, (-1, block)) @ h).flatten(-2) for z in (x, y)]
    torch.testing.assert_close(kernels.hadamard(x), wanted[0], atol=1e-5, rtol=1e-5)
    for got, want in zip(kernels.hadamard_pair(x, y), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    view = x[:, 1:2]  # not contiguous
    torch.testing.assert_close(kernels.hadamard(view), wanted[0][:, 1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("rows", [1, 5, 2100])
def test_heads_inside_a_wider_matrix_need_no_copy(rows: int) -> None:
    wide = torch.randn(rows, 5 * 96)
    q, k = wide[:, : 3 * 96].unflatten(1, (3, 96)), wide[:, 3 * 96 :].unflatten(1, (2, 96))
    pair = kernels.hadamard_pair(q, k)
    for x, got in ((q, kernels.hadamard(q)), (q, pair[0]), (k, pair[1])):
        assert got.is_contiguous()
        assert torch.equal(got, kernels.hadamard(x.contiguous()))
    head = wide.unflatten(1, (5, 96))[:, ::2]  # heads apart: copied
    assert torch.equal(kernels.hadamard(head), kernels.hadamard(head.contiguous()))


def test_it_is_large_enough_for_two_threads_and_keeps_every_row() -> None:
    x, y = torch.randn(3000, 128), torch.randn(1200, 128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        got = kernels.hadamard_pair(x, y)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(got[0], reference.hadamard(x, 128), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], reference.hadamard(y, 128), atol=1e-5, rtol=1e-5)


def test_gradients_flow() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    kernels.hadamard(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_a_block_must_divide() -> None:
    with pytest.raises(ValueError, match="such as 16"):
        kernels.hadamard(torch.randn(2, 80), 32)
