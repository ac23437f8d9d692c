"""Momentum, MONA's average and the update, against their references bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.kernels import jit, momentum
from serval.kernels.momentum import reference

pytestmark = pytest.mark.usefixtures("arch")


@given(
    n=st.one_of(st.integers(0, 70), st.just(60001)),
    mean=st.sampled_from([None, torch.float32, torch.bfloat16]),
    nesterov=st.booleans(),
    weight=st.sampled_from([-0.5, 0.3]),
    correction=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_reference(
    n: int,
    mean: torch.dtype | None,
    nesterov: bool,
    weight: float,
    correction: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    grad, buffer, out = torch.randn(3, n).unbind()
    before = grad.clone()
    average = None if mean is None else torch.randn(n).to(mean)
    expected_average = None if average is None else average.clone()
    expected_buffer, expected = buffer.clone(), torch.empty(n)
    direction = grad
    if expected_average is not None:
        direction = reference.accelerate(grad, expected_average, weight, correction, 0.975, seed)
    reference.momentum_update(direction, expected_buffer, expected, 0.95, nesterov)
    momentum.momentum_update(
        grad,
        buffer,
        out,
        mu=0.95,
        nesterov=nesterov,
        mean=average,
        beta=0.975,
        weight=weight,
        correction=correction,
        seed=seed,
    )
    assert torch.equal(grad, before)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(buffer, expected_buffer, rtol=1e-6, atol=1e-6)
    if average is not None:
        # without fused multiply-add the last bit may differ, and with it one rounding
        tolerance = 1e-6 if mean is torch.float32 else 1e-2
        torch.testing.assert_close(average, expected_average, rtol=tolerance, atol=tolerance)
        if mean is torch.bfloat16 and n > 1000:
            assert (average != expected_average).float().mean() < 1e-3
    parameter = torch.randn(n)
    wanted = parameter.clone()
    reference.descend(wanted, out, 0.99, 0.1)
    momentum.descend(parameter, out, decay=0.99, scale=0.1)
    torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-6)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact() -> None:
    x = torch.full((1 << 16,), 1.0 + 2.0**-10)  # an eighth of a bfloat16 step above 1
    rounded = momentum.round_stochastically(x, seed=3).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert (rounded.mean() - x[0]).abs() < 1e-4
    exact = torch.tensor([0.0, -1.5, float("inf"), float("-inf"), 3.0e38])
    kept = momentum.round_stochastically(exact.bfloat16().float(), seed=9)
    assert torch.equal(kept, exact.bfloat16())
    assert momentum.round_stochastically(torch.tensor([float("nan")]), 1).isnan().all()


def test_arithmetic_is_that_of_lerp() -> None:
    if jit.arch() not in ("native", "haswell", "alderlake"):
        pytest.skip("needs fused multiply-add")
    grad, buffer, out = torch.randn(3, 4096).unbind()
    wanted = buffer.clone().lerp_(grad, 1 - 0.95)
    ahead = grad.lerp(wanted, 0.95)
    momentum.momentum_update(grad, buffer, out, mu=0.95, nesterov=True)
    assert torch.equal(buffer, wanted)
    assert torch.equal(out, ahead)


def test_a_bfloat16_mean_takes_float64_gradients() -> None:
    grad = torch.randn(300, dtype=torch.float64)
    found, expected = (
        torch.randn(300, generator=torch.Generator().manual_seed(1)).bfloat16() for _ in "ab"
    )
    outs = []
    for mean, g in ((found, grad), (expected, grad.float())):
        buffer, out = torch.zeros_like(g), torch.empty_like(g)
        momentum.momentum_update(
            g, buffer, out, mu=0.95, nesterov=True, mean=mean, beta=0.9, weight=-0.5, seed=4
        )
        outs.append(out.float())
    assert (found != expected).float().mean() < 0.02  # a rounding may fall on the other side
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
