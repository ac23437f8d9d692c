from __future__ import annotations

import pytest
import torch

from serval.compress.block import BlockData, find_block
from serval.compress.gptq import Factor, gptq
from serval.compress.odyssey import (
    Metric,
    Odyssey,
    _row_losses,
    clipped_scale,
    fake_quantize,
    learn_block,
    learn_clipping,
)
from serval.compress.scheme import QuantizedWeight, WeightScheme, quantize
from serval.compress.statistics import InputStatistics
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder, moe_decoder

CHANNEL = WeightScheme(4)


def heavy_tailed(rows=48, columns=128, seed=0):
    """A matrix whose rows have a few entries six times larger, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    loud = torch.rand(rows, columns, generator=generator) < 0.005
    loud[:, 0] = True
    return torch.where(loud, 6 * weight, weight)


def inputs(columns=128, tokens=400, seed=1):
    """Correlated inputs, as those of a trained model are."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return base + 2 * base @ mix


def seen(x) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], frozenset({"hessian", "rows"}))
    statistics.update(x)
    return statistics


def error(x, weight, made: QuantizedWeight) -> float:
    """Relative error of the layer's output."""
    return float((x @ (made.dequantize() - weight).T).norm() / (x @ weight.T).norm())


def test_no_clipping_is_plain_symmetric_rounding():
    weight = heavy_tailed()
    top, bottom = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
    scales = clipped_scale(top, bottom, *(torch.full_like(top, 40.0) for _ in range(2)), 7)
    torch.testing.assert_close(scales, weight.abs().amax(1, keepdim=True) / 7)
    codes = quantize(weight, CHANNEL, scales=scales).codes
    assert torch.equal(codes, (weight / scales).round().clamp(-7, 7).to(torch.int8))
    torch.testing.assert_close(
        fake_quantize(weight, scales, CHANNEL),
        quantize(weight, CHANNEL, scales=scales).dequantize(),
    )


@pytest.mark.parametrize("group", [None, 32])
def test_clipping_lowers_the_error_it_minimises_in_every_row(group):
    weight, x = heavy_tailed(), inputs()
    scheme = WeightScheme(4, group)
    full = weight.view(48, scheme.groups(128), -1).abs().amax(-1) / 7
    learnt = learn_clipping(weight, Metric.of(seen(x)), scheme, steps=60)

    def row_errors(scales):
        made = quantize(weight, scheme, scales=scales).dequantize()
        return (x @ (made - weight).T).square().sum(0)

    before, after = row_errors(full), row_errors(learnt)
    assert (after <= before * (1 + 1e-4)).all()
    if group is None:
        assert after.sum() < 0.8 * before.sum()
        assert (learnt < 0.95 * full).float().mean() > 0.5


def test_the_gradient_is_that_of_the_straight_through_estimator():
    weight, x = heavy_tailed(8), inputs()
    hessian = x.T @ x
    scales = (weight.abs().amax(1, keepdim=True) / 7 * 0.6).requires_grad_()
    difference = fake_quantize(weight, scales, CHANNEL) - weight
    ((difference @ hessian) * difference).sum().backward()
    losses, product, slope = _row_losses(
        weight[:, None], scales.detach(), Metric(hessian=hessian), CHANNEL
    )
    torch.testing.assert_close((product * slope).sum(-1), scales.grad, rtol=1e-3, atol=1e-2)
    exact = ((difference @ hessian) * difference).sum(1).detach()
    torch.testing.assert_close(losses, exact, rtol=1e-4, atol=1e-3)


def test_kept_rows_stand_for_a_wide_hessian():
    x = inputs(96, 40)
    statistics = seen(x)
    wide = Metric.of(statistics)
    assert wide.root is not None
    torch.testing.assert_close(wide.times(torch.eye(96)), statistics.hessian, rtol=1e-3, atol=1e-2)
    assert Metric.of(seen(inputs(96, 400))).root is None


def test_gptq_keeps_the_learnt_scales_and_adds_to_them():
    weight, x = heavy_tailed(seed=5), inputs(seed=6)
    statistics = seen(x)
    plain = error(x, weight, quantize(weight, CHANNEL))
    factor = Factor.of(statistics.hessian)
    learnt = learn_clipping(weight, Metric.of(statistics), CHANNEL)
    clipped = quantize(weight, CHANNEL, scales=learnt)
    both = gptq(weight, factor, CHANNEL, scales=learnt)
    assert torch.equal(both.scales, learnt)
    assert error(x, weight, clipped) < 0.95 * plain
    assert error(x, weight, gptq(weight, factor, CHANNEL)) < 0.8 * plain
    assert error(x, weight, both) < 0.8 * error(x, weight, clipped)
    assert error(x, weight, both) < error(x, weight, gptq(weight, factor, CHANNEL))


def observed(model, recipe: Odyssey, layer=0):
    block = find_block(
        model.layers[layer], layer, lambda path: checkpoint.module_name(model.config, path)
    )
    x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def run(x, weights=None):
        batch = PackedBatch.from_lengths([32, 32])
        parameters = {f"{path}.weight": value for path, value in (weights or {}).items()}
        branch, residual = torch.func.functional_call(
            block.module, parameters, (x, None, batch, model.rotary(x.device))
        )
        return branch + residual

    with torch.no_grad(), block.observe(recipe.statistics):
        target = run(x)
    for matrix in block.matrices:
        matrix.scheme = WeightScheme(4)
    block.data = BlockData([x, x.flip(0)], [target, run(x.flip(0)).detach()], run)
    return block


@pytest.mark.parametrize("clip", ["hessian", "grid", "block", "none"])
@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
def test_every_way_of_clipping_quantises_every_matrix(clip, make):
    recipe = Odyssey(clip=clip, steps=10, epochs=2)
    assert recipe.wants_data == (clip == "block")
    block = observed(make(), recipe, 1)
    plan = recipe.prepare_block(block)
    assert bool(plan) == (clip == "block")
    for matrix in block.matrices:
        made = recipe.quantize(matrix)
        assert made.codes.shape == matrix.weight.shape
        assert made.scales.shape == (matrix.weight.shape[0], 1)
        relative = (made.dequantize() - matrix.weight).norm() / matrix.weight.norm()
        assert relative < 0.35


def test_training_on_a_block_lowers_its_output_error():
    recipe = Odyssey(clip="block", epochs=8, block_rate=0.2)
    model = decoder()
    with torch.no_grad():
        for name, parameter in model.layers[0].named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(heavy_tailed(*parameter.shape) * 0.1)
    plan = recipe.prepare_block(observed(model, recipe))
    entry = plan["model.layers.0"]
    assert entry["after"] < 0.95 * entry["error before clipping"]


def test_a_block_whose_error_does_not_fall_keeps_its_first_scales():
    weight = {"w": torch.randn(4, 8)}
    best = clipped_scale(
        weight["w"].amax(1, keepdim=True),
        weight["w"].amin(1, keepdim=True),
        *(torch.full((4, 1), 4.0) for _ in range(2)),
        7,
    )
    target = fake_quantize(weight["w"], best, CHANNEL)
    scales, before, after = learn_block(
        weight,
        {"w": CHANNEL},
        lambda made, sample: (made["w"] - target).square().sum(),
        samples=1,
        epochs=3,
        rate=1.0,
    )
    assert before == after == 0.0
    assert torch.equal(scales["w"], best)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="steps=0"):
        Odyssey(steps=0)
