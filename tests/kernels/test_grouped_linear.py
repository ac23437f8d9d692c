"""Grouped linear against a product per row, values and gradients."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.kernels import grouped_linear


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    width=st.integers(1, 9),
    outputs=st.integers(1, 7),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_a_product_per_row_with_gradients(counts, width, outputs, with_bias, seed) -> None:
    torch.manual_seed(seed)
    experts, rows = len(counts), sum(counts)
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(experts, outputs, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(experts, outputs, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight, bias] if with_bias else [x, weight]
    owner = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))

    expected = torch.einsum("rk,rnk->rn", x, weight[owner])
    if with_bias:
        expected = expected + bias[owner]
    actual = grouped_linear(x, weight, counts, bias if with_bias else None)
    torch.testing.assert_close(actual, expected)

    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(actual, inputs, upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, upstream, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        again = grouped_linear(x, weight, counts, bias if with_bias else None)
    torch.testing.assert_close(again, actual)


def test_gradients_reach_only_what_needs_them() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(2, 5, 4)
    grouped_linear(x, weight, [1, 2]).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, [3, 1])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    exact = torch.cat([x[:3] @ weight[0].T, x[3:] @ weight[1].T])
    torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.05)
