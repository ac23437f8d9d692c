from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval.compress.gptq import Factor, find_scales, gptq
from serval.compress.scheme import WeightScheme, quantize


def textbook(weight, hessian, scheme, damping, order=None, scales=None):
    """Algorithm 1 one column at a time in float64, the inverse Hessian recomputed by definition.
    scales None: of the updated weights, when a group's first column is reached."""
    rows, columns = weight.shape
    size = columns // scheme.groups(columns)
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    steps = list(range(columns)) if order is None else order.tolist()
    made = torch.zeros(rows, columns, dtype=torch.float64)
    for i, column in enumerate(steps):
        rest = steps[i:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        if scales is not None:
            scale = scales[:, column // size].double()
        elif i % size == 0:
            scale = w[:, steps[i : i + size]].abs().amax(1) / (scheme.highest + 0.5)
        made[:, column] = (w[:, column] / scale).round().clamp(
            scheme.lowest, scheme.highest
        ) * scale
        error = (w[:, column] - made[:, column]) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0][None, :]
    return made.float()


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # correlated, but far from singular: float32 and float64 then choose the same codes
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x, x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_textbook_column_loop(bits, group_size, act_order):
    weight, hessian, _ = problem(20, 32)
    scheme = WeightScheme(bits, group_size)
    factor = Factor.of(hessian, 0.01, act_order=act_order)
    # The largest weight of a group lies exactly between two codes of the usual scale; not of this.
    scales = quantize(weight, scheme).scales * 1.01
    expected = textbook(weight, hessian, scheme, 0.01, factor.order, scales)
    made = gptq(weight, factor, scheme, scales=scales)
    torch.testing.assert_close(made.dequantize(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_scales_of_updated_weights_equal_the_textbook(act_order):
    weight, hessian, _ = problem(40, 32)
    scheme = WeightScheme(4, 8)
    factor = Factor.of(hessian, 0.01, act_order=act_order)
    expected = textbook(weight, hessian, scheme, 0.01, factor.order)
    made = gptq(weight, factor, scheme, static_groups=False)
    assert (made.order is not None) == act_order
    differs = ((made.dequantize() - expected).abs() > 1e-3).any(1)
    assert differs.float().mean() < 0.1  # rows are independent; one with a tie may go another way


@given(
    columns=st.sampled_from([8, 24, 40]),
    block=st.sampled_from([1, 3, 16]),
    grouped=st.booleans(),
    static=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(max_examples=25)
def test_the_block_size_changes_nothing(columns, block, grouped, static, act_order, seed):
    weight, hessian, _ = problem(9, columns, seed)
    scheme = WeightScheme(4, 8 if grouped else None)
    factor = Factor.of(hessian, 0.01, act_order=act_order)
    one, many = (
        gptq(weight, factor, scheme, static_groups=static, block=b).dequantize()
        for b in (block, 128)
    )
    # a value that lies exactly between two codes may go either way
    assert ((one - many).abs() > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_independent_inputs_give_round_to_nearest(group_size, act_order):
    weight, scheme = torch.randn(12, 48), WeightScheme(4, group_size)
    made = gptq(weight, Factor.of(torch.eye(48), act_order=act_order), scheme, torch.bfloat16)
    nearest = quantize(weight, scheme, torch.bfloat16)
    assert torch.equal(made.codes, nearest.codes)
    assert torch.equal(made.scales, nearest.scales)


def test_keeps_outputs_better_than_rounding_and_act_order_permutes_with_its_inputs():
    weight, hessian, x = problem(40, 64)
    scheme = WeightScheme(4, 32)
    exact = x @ weight.T
    factor = Factor.of(hessian, act_order=True)
    made = gptq(weight, factor, scheme, static_groups=False)
    plain = quantize(weight, scheme)
    errors = [(x @ q.dequantize().T - exact).norm() for q in (made, plain)]
    assert errors[0] < 0.8 * errors[1]
    order = torch.randperm(64)
    permuted = gptq(
        weight[:, order],
        Factor.of(hessian[order][:, order], act_order=True),
        scheme,
        static_groups=False,
    )
    assert (permuted.dequantize() - made.dequantize()[:, order]).abs().max() < 1e-3


def test_fixed_scales_are_kept():
    weight, hessian, _ = problem(10, 32)
    scheme = WeightScheme(4, None)
    scales = quantize(weight, scheme).scales * 0.7
    made = gptq(weight, Factor.of(hessian), scheme, torch.bfloat16, scales=scales)
    assert torch.equal(made.scales, scales.bfloat16().float())


def test_singular_and_indefinite_hessians_get_more_damping():
    x = torch.randn(3, 32)
    factor = Factor.of(x.T @ x, 0.0)
    assert torch.isfinite(factor.upper).all()
    negative = torch.eye(32) - 2.0 * torch.ones(32, 32)
    assert Factor.of(negative + torch.diag(torch.full((32,), 1.5))).damping > 0.01
    silent = x.T @ x
    silent[:, 5] = silent[5] = 0
    made = gptq(torch.randn(4, 32), Factor.of(silent), WeightScheme(4, None))
    assert torch.isfinite(made.dequantize()).all()
    assert made.codes[:, 5].any()


def test_mse_search_lowers_the_error_of_heavy_tails():
    weight = torch.distributions.StudentT(3.0).sample((16, 128))
    scheme = WeightScheme(4, None)
    errors = []
    for search in ("max", "mse"):
        made = quantize(weight, scheme, scales=find_scales(weight, scheme, torch.float32, search))
        errors.append(float((made.dequantize() - weight).abs().pow(2.4).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_the_inverse_factor_is_what_it_says():
    _, hessian, _ = problem(1, 24)
    for act_order in (False, True):
        factor = Factor.of(hessian, 0.01, act_order=act_order)
        h = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(24)
        if factor.order is not None:
            h = h[factor.order][:, factor.order]
        upper = factor.upper.double()
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(
            upper.T @ upper @ h, torch.eye(24, dtype=torch.float64), rtol=0, atol=2e-2
        )
