"""RMSNorm, rotary and SwiGLU against their references, forward and backward, over drawn shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval import kernels
from serval.kernels.gated import reference as gated_reference
from serval.kernels.norm import reference as norm_reference
from serval.kernels.rope import reference as rope_reference

pytestmark = pytest.mark.usefixtures("arch")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
EXAMPLES = settings(max_examples=15, deadline=None)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to rounding: float32 sums differ by their order, bfloat16 by one unit in the last
    place."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    tolerance = 2e-2 if ours.dtype == torch.bfloat16 else 3e-5
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def compare(
    ours: Callable[..., tuple[Tensor, ...]],
    theirs: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
) -> None:
    """Check outputs and the gradients of every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    mine, reference = ours(*inputs), theirs(*inputs)
    with torch.no_grad():
        plain = ours(*inputs)
    for a, b, c in zip(mine, reference, plain, strict=True):
        close(a, b)
        assert torch.equal(a, c), "results with and without autograd differ"
    upstream = [torch.randn_like(x) for x in reference]
    for a, b in zip(
        torch.autograd.grad(mine, inputs, upstream),
        torch.autograd.grad(reference, inputs, upstream),
        strict=True,
    ):
        close(a, b)


@given(rows=st.integers(0, 40), dim=st.integers(1, 300), dtype=DTYPES, strided=st.booleans())
@EXAMPLES
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype, strided: bool) -> None:
    x = torch.randn(rows, 2 * dim, dtype=dtype)[:, ::2] if strided else torch.randn(rows, dim)
    weight = torch.rand(dim) + 0.5
    compare(
        lambda x, w: (kernels.rms_norm(x, w, 1e-5),),
        lambda x, w: (norm_reference.rms_norm(x, w, 1e-5),),
        [x.to(dtype), weight],
    )


@given(rows=st.integers(1, 40), dim=st.integers(1, 300), x_dtype=DTYPES, residual_dtype=DTYPES)
@EXAMPLES
def test_add_rms_norm(
    rows: int, dim: int, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x, residual = torch.randn(rows, dim).to(x_dtype), torch.randn(rows, dim).to(residual_dtype)
    compare(
        lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: norm_reference.add_rms_norm(x, r, w, 1e-6),
        [x, residual, torch.rand(dim) + 0.5],
    )


@given(
    tokens=st.integers(0, 30),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    rest=st.integers(0, 9),
    dtype=DTYPES,
    interleaved=st.booleans(),
)
@EXAMPLES
def test_rotary(
    tokens: int, heads: int, half: int, rest: int, dtype: torch.dtype, interleaved: bool
) -> None:
    dim = 2 * half + rest
    fused = torch.randn(tokens, (heads + 2) * dim).to(dtype)  # q and k are views of one product
    q, k = fused[:, : heads * dim].view(-1, heads, dim), fused[:, heads * dim :].view(-1, 2, dim)
    angles = torch.randn(64, half)
    positions = torch.randint(0, 64, (tokens,))
    rest_args = (angles.cos(), angles.sin(), positions, interleaved)
    compare(
        lambda q, k: kernels.rotary(q, k, *rest_args),
        lambda q, k: rope_reference.rotary(q, k, *rest_args),
        [q, k],
    )


@given(rows=st.integers(0, 9), dim=st.integers(1, 2100), dtype=DTYPES, fused=st.booleans())
@EXAMPLES
def test_swiglu(rows: int, dim: int, dtype: torch.dtype, fused: bool) -> None:
    both = (4 * torch.randn(rows, 2 * dim)).to(dtype)
    pair = list(both.chunk(2, -1)) if fused else [both[:, ::2], both[:, 1::2]]
    compare(
        lambda g, u: (kernels.swiglu(g, u),),
        lambda g, u: (gated_reference.swiglu(g, u),),
        pair,
    )


def test_references_pass_gradcheck() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: kernels.add_rms_norm(x, x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(kernels.swiglu, (x, (x * 2).detach().requires_grad_()))


def test_extreme_values_stay_finite() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    result = kernels.swiglu(gate, torch.ones(7))
    torch.testing.assert_close(
        result, gated_reference.swiglu(gate, torch.ones(7)), atol=1e-7, rtol=1e-5
    )
    assert kernels.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).abs().max() == 0


def test_wrong_arguments_are_named() -> None:
    q, k = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    table = torch.ones(4, 4)
    with pytest.raises(ValueError, match="positions from 0 to 4"):
        kernels.rotary(q, k, table, table, torch.tensor([0, 4]), False)
    with pytest.raises(ValueError, match="one position per row"):
        kernels.rotary(q, k, table, table, torch.tensor([0]), False)
    with pytest.raises(ValueError, match="tables for 20 dims"):
        kernels.rotary(q, k, torch.ones(4, 10), torch.ones(4, 10), torch.tensor([0, 1]), False)
    with pytest.raises(ValueError, match="swiglu got"):
        kernels.swiglu(torch.ones(2), torch.ones(3))
