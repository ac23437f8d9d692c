from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import kernels
from serval.compress import Method, compress_decoder
from serval.compress.calibrate import random_tokens
from serval.compress.integer_scale import IntegerScale
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.errors import ConfigError
from serval.kernels.w4a8.overflow import (
    INT32_MAX,
    accumulator_bound,
    fits_int32,
)
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder

MODES = ("row_normalized", "pow2_fixed", "pow2_heuristic")


def group_quantized(rows=24, columns=256, group=32, seed=0, spread=1.0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= (
        torch.rand(rows, columns // group, 1, generator=generator)
        .mul(spread)
        .exp()
        .expand(-1, -1, group)
        .reshape(rows, columns)
    )
    return quantize(weight, WeightScheme(4, group))


def partial_sums(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """int64 [T, N, G]: what the kernel has before it multiplies by group scales."""
    n, k = weight.codes.shape
    groups = weight.scales.shape[1]
    codes = weight.codes.long().view(n, groups, k // groups)
    return torch.einsum("tgk,ngk->tng", x.long().view(len(x), groups, -1), codes)


def activations(tokens: int, columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (tokens, columns), generator=generator)


@pytest.mark.parametrize("mode", MODES)
def test_codes_stay_and_scales_are_exact_products(mode):
    source = group_quantized()
    made, report = IntegerScale(mode).apply(source)
    assert torch.equal(made.codes, source.codes)
    assert made.scheme == replace(source.scheme, scales="integer")
    assert made.integer.dtype == torch.int16
    assert made.row_factor.shape == (24,)
    exact = made.integer.double() * made.row_factor.double()[:, None]
    assert torch.equal(made.scales.double(), exact)  # float32 holds the product exactly
    assert report.smallest == int(made.integer.abs().min()) >= 1
    assert report.bound == int(accumulator_bound(made.codes, made.integer).max()) <= INT32_MAX
    assert (report.lifted, report.halved, report.kept_float) == (0, 0, "")


@given(
    mode=st.sampled_from(MODES),
    group=st.sampled_from([8, 32, 64]),
    seed=st.integers(0, 999),
    exponent=st.integers(-12, 4),
)
@settings(max_examples=40, deadline=None)
def test_a_scale_moves_by_at_most_half_a_step(mode, group, seed, exponent):
    source = group_quantized(6, 128, group, seed, spread=3.0)
    source = replace(source, scales=source.scales * 2.0**exponent)
    made, report = IntegerScale(mode).apply(source)
    step = made.row_factor[:, None].double()
    moved = (made.scales.double() - source.scales.double()).abs() / step
    lifted = source.scales.double() / step < 0.5
    assert (moved[~lifted] <= 0.5).all()
    assert (made.integer[lifted] == 1).all()
    assert report.lifted == int(lifted.sum())
    if mode != "pow2_fixed":
        assert fits_int32(made.codes, made.integer)


@pytest.mark.parametrize("alpha", [256, 1024])
def test_output_error_is_bounded_by_half_a_step_of_each_group(alpha):
    source = group_quantized(spread=2.0)
    made, report = IntegerScale("pow2_fixed", alpha=alpha).apply(source)
    assert report.lifted == 0
    sums = partial_sums(activations(9, 256), source).double()
    float_path = (sums * source.scales.double()).sum(-1)
    int_path = (sums * made.integer.double()).sum(-1) * made.row_factor.double()
    bound = sums.abs().sum(-1) * 0.5 / alpha
    assert ((int_path - float_path).abs() <= bound * (1 + 1e-12)).all()


def test_mean_squared_error_falls_fourfold_per_doubling():
    source = group_quantized(256, 512, 32)
    reference = source.dequantize().double()
    errors = []
    for alpha in (512, 1024, 2048, 4096):
        made, _ = IntegerScale("pow2_fixed", alpha=alpha).apply(source)
        errors.append(float((made.dequantize().double() - reference).square().mean()))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)
    # uniform rounding error of a scale: E[q^2] / (12 alpha^2)
    law = float(source.codes.double().square().mean()) / (12 * 1024**2)
    assert errors[1] == pytest.approx(law, rel=0.1)


@pytest.mark.parametrize("mode", ["pow2_fixed", "row_normalized"])
def test_scales_that_are_already_integers_give_the_same_product(mode):
    source = group_quantized()
    integers = torch.randint(1, 1024, source.scales.shape).float()
    integers[:, 0] = 1023
    source = replace(source, scales=integers / 1024)
    made, _ = IntegerScale(mode).apply(source)
    assert torch.equal(made.integer.float(), integers)
    assert torch.equal(made.dequantize(), source.dequantize())


def test_order_of_groups_does_not_change_the_sum():
    source = group_quantized(spread=2.0)
    made, _ = IntegerScale().apply(source)
    sums = partial_sums(activations(5, 256), made).to(torch.int32)
    order = torch.randperm(sums.shape[-1])
    integer = made.integer.to(torch.int32)
    straight = (sums * integer).sum(-1, dtype=torch.int32)
    shuffled = (sums[..., order] * integer[:, order]).sum(-1, dtype=torch.int32)
    assert torch.equal(straight, shuffled)


@given(
    columns=st.sampled_from([64, 512, 4096]),
    group=st.sampled_from([32, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_adversarial_activations_attain_the_bound_exactly(columns, group, seed):
    source = group_quantized(4, columns, group, seed, spread=2.0)
    made, report = IntegerScale().apply(source)
    bound = accumulator_bound(made.codes, made.integer)
    scaled = made.codes.long() * made.integer.long().repeat_interleave(group, dim=1)
    worst = 127 * scaled.sign()  # row n is the worst activation of output n
    attained = (partial_sums(worst, made) * made.integer.long()).sum(-1).diagonal()
    assert torch.equal(attained, bound)
    assert int(bound.max()) == report.bound <= INT32_MAX


def large_codes(rows: int, columns: int, group: int = 128) -> QuantizedWeight:
    """Every code at its largest: the worst matrix the scheme can hold."""
    codes = torch.full((rows, columns), 7, dtype=torch.int8)
    codes[:, ::2] = -8
    scales = torch.full((rows, columns // group), 0.5)
    return QuantizedWeight(codes, scales, WeightScheme(4, group))


def test_amplifiers_are_halved_until_certified_and_no_further():
    source = large_codes(3, 4096)
    source.codes[0] = 1  # this row needs no halving
    made, report = IntegerScale().apply(source)
    assert report.halved == 2
    assert 1015 < int(made.integer[0, 0]) <= 1023
    assert fits_int32(made.codes, made.integer)
    twice = made.integer.long() * 2
    assert (accumulator_bound(made.codes, twice)[1:] > INT32_MAX).all()


def test_a_violated_certificate_is_a_real_wrap():
    source = large_codes(2, 8192)
    integer = torch.full((2, 64), 1023, dtype=torch.int16)
    assert not fits_int32(source.codes, integer)
    worst = 127 * source.codes[:1].long().sign()
    exact = (partial_sums(worst, source) * integer.long()).sum(-1)
    wrapped = (partial_sums(worst, source).to(torch.int32) * integer.to(torch.int32)).sum(
        -1, dtype=torch.int32
    )
    assert (wrapped.long() != exact).all()
    assert int(exact.max()) == int(accumulator_bound(source.codes, integer).max())


def test_a_row_at_exactly_the_limit_passes():
    # 2^31 - 1 is prime; the closest product of 127 below it leaves less than one more code
    codes = torch.full((1, 2048), 7, dtype=torch.int8)
    integer = torch.full((1, 64), (INT32_MAX // 127) // (7 * 2048), dtype=torch.int64)
    integer[0, 0] += (INT32_MAX - int(accumulator_bound(codes, integer))) // (127 * 7 * 32)
    assert fits_int32(codes, integer)
    integer[0, 0] += 1
    assert not fits_int32(codes, integer)


def test_a_matrix_that_cannot_be_certified_keeps_float_scales():
    source = large_codes(2, 28672)
    made, report = IntegerScale().apply(replace(source, scheme=replace(source.scheme)))
    assert made.scheme.scales == "float"
    assert made.integer is None
    assert torch.equal(made.scales, source.scales)
    assert "int32 could overflow (2 of 2 rows)" in report.kept_float


def test_int16_holds_every_integer():
    source = group_quantized()
    source = replace(source, scales=source.scales * 1e4)
    made, report = IntegerScale("pow2_fixed").apply(source)
    assert report.halved == 24
    assert int(made.integer.max()) <= 32767
    torch.testing.assert_close(made.scales, source.scales, rtol=0.01, atol=0)


def test_negative_scales_keep_their_sign():
    source = group_quantized()
    source.scales[:, ::2] *= -1
    source.scales[3] *= -1
    for mode in MODES:
        made, _ = IntegerScale(mode).apply(source)
        assert torch.equal(made.integer.sign().float(), source.scales.sign())
        assert (made.row_factor > 0).all()


def test_heuristic_is_the_smallest_power_of_two_that_lifts_the_minimum():
    source = group_quantized(spread=3.0)
    made, report = IntegerScale("pow2_heuristic").apply(source)
    alpha = 1 / float(made.row_factor[0])
    least = float(source.scales.min())
    assert math.log2(alpha).is_integer()
    assert alpha * least >= 1 > alpha / 2 * least
    assert report.smallest >= 1
    large = replace(source, scales=source.scales + 1.5)
    assert float(IntegerScale("pow2_heuristic").apply(large)[0].row_factor[0]) == 1.0


def test_heuristic_is_coarse_on_homogeneous_scales_and_fine_with_one_tiny_group():
    def error(source, mode):
        made, _ = IntegerScale(mode).apply(source)
        gap = made.dequantize() - source.dequantize()
        return float(gap.norm() / source.dequantize().norm())

    even = group_quantized(64, 512, 32)
    assert error(even, "pow2_heuristic") > 8 * error(even, "pow2_fixed")
    tiny = replace(even, scales=even.scales.clone())
    tiny.scales[5, 3] /= 64
    assert error(tiny, "pow2_heuristic") < 0.01


def test_dead_groups_neither_set_the_amplifier_nor_divide_by_zero():
    weight = torch.randn(8, 128)
    weight[:, :32] = 0
    weight[3] = 0
    source = quantize(weight, WeightScheme(4, 32))
    for mode in MODES:
        made, report = IntegerScale(mode).apply(source)
        assert torch.isfinite(made.dequantize()).all()
        assert (made.dequantize()[weight == 0] == 0).all()
        assert report.smallest >= 1
    heuristic, _ = IntegerScale("pow2_heuristic").apply(source)
    assert float(heuristic.row_factor[0]) > 2.0**-12


def test_refit_rounds_again_with_the_new_scales():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator)
    source = quantize(weight, WeightScheme(4, 32))
    coarse = IntegerScale("pow2_fixed", alpha=32)
    kept, _ = coarse.apply(source)
    refit, report = replace(coarse, refit=True).apply(
        source, lambda scales: quantize(weight, source.scheme, scales=scales).codes
    )
    assert (refit.dequantize() - weight).norm() < (kept.dequantize() - weight).norm()
    assert fits_int32(refit.codes, refit.integer)
    assert report.bound == int(accumulator_bound(refit.codes, refit.integer).max())
    with pytest.raises(ConfigError, match="refit needs the original weights"):
        replace(coarse, refit=True).apply(source)


def test_eight_bit_codes_and_single_scales():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4096, generator=generator)
    made, report = IntegerScale().apply(quantize(weight[:, :1024], WeightScheme(8, 128)))
    assert (report.halved, made.scheme.scales) == (4, "integer")
    assert fits_int32(made.codes, made.integer)
    wide = torch.randn(4, 8192, generator=generator)
    made, report = IntegerScale().apply(quantize(wide, WeightScheme(8, 128)))
    assert made.scheme.scales == "float"
    assert "overflow" in report.kept_float
    single, report = IntegerScale().apply(quantize(weight, WeightScheme(4)))
    assert single.scheme.scales == "float"
    assert report.kept_float == "one scale per output channel"


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"alpha": 1000}, "power of two"), ({"largest": 100}, "127 to"), ({"mode": "x"}, "pow2")],
)
def test_settings_that_cannot_work_are_refused(settings_, message):
    with pytest.raises(ConfigError, match=message):
        IntegerScale(**settings_)


@pytest.mark.parametrize("group", [32, 128])
def test_the_kernel_computes_the_certified_integers(group):
    made, _ = IntegerScale().apply(group_quantized(40, 512, group, spread=2.0))
    packed = kernels.pack_weight(
        made.codes,
        made.scales,
        bits=4,
        group_size=group,
        integer=made.integer,
        row_factor=made.row_factor,
    )
    x = activations(5, 512).float()
    x[:, 0] = 127  # so that a row's scale is 1 and its codes are its values
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(kernels.quantized_linear(x, packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    sums = (partial_sums(x.long(), made) * made.integer.long()).sum(-1)
    assert torch.equal(results[0], sums.float() * made.row_factor)


@pytest.mark.parametrize("weights", ["rtn", "gptq", "fptq", "odyssey"])
def test_refit_rounds_as_the_method_does(weights):
    """Coarse integers, so that rounding again must help; with GPTQ by GPTQ again."""
    tokens = random_tokens(decoder().config, 6, 48)
    batch = PackedBatch.from_lengths([48] * 6)

    def error(refit: bool) -> float:
        model, exact = decoder(num_hidden_layers=1), decoder(num_hidden_layers=1)
        extra = {"scales.mode": "pow2_heuristic", "scales.refit": refit}
        method = Method(
            weights=weights,
            group_size=4,
            activations="none",
            scales="integer",
            settings=extra | ({"steps": 5} if weights == "odyssey" else {}),
        )
        report = compress_decoder(model, method, tokens)
        assert "W4A16 g4 integer" in report.quantised.values()
        with torch.no_grad():
            x = torch.cat(tokens)
            return float((model(x, batch) - exact(x, batch)).norm())

    assert error(refit=True) < error(refit=False)
