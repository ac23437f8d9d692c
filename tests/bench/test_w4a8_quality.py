"""`serval bench w4a8-quality` on few tokens, and what it does to a model before measuring it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serval import bench
from serval.bench.harness import Setup
from serval.bench.table import read_report
from serval.bench.w4a8_quality import (
    GRANULARITIES,
    QUICK,
    RECIPES,
    Variant,
    collect,
    compressed,
    plans,
    with_integer_scales,
    with_outliers,
)
from serval.compress.modules import QuantizedLinear
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder

TOKENS = torch.arange(100, 160)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder.logits(decoder(TOKENS, PackedBatch.from_lengths([len(TOKENS)])))


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    target = tmp_path / "quality.json"
    bench.run("w4a8-quality", target, quick=True, only="rtn", note=lambda _: None)
    report = read_report(target)
    assert report.quick
    by_name = {case.case: case.metrics for case in report.cases}
    assert set(by_name) == {
        "serval-tiny-float32",
        "serval-tiny-rtn-w8a8-channel",
        "serval-tiny-rtn-w4a8-channel",
        "serval-tiny-rtn-w4a8-g32",
        "serval-tiny-rtn-w4a8-g32-integer",
    }
    assert by_name["serval-tiny-float32"]["kl"] == pytest.approx(0, abs=1e-6)
    eight, four = (by_name[f"serval-tiny-rtn-{w}-channel"]["kl"] for w in ("w8a8", "w4a8"))
    assert 0 < eight < 0.1 * four
    assert abs(by_name["serval-tiny-rtn-w4a8-g32-integer"]["integer_change"]) < 0.01


def test_every_recipe_and_granularity_is_measured_for_every_model() -> None:
    names = {v.name(plan.name) for plan in plans(quick=False) for v in plan.variants}
    for model in ("serval-tiny", "serval-tiny-moe", "serval-tiny-mla"):
        for recipe in RECIPES:
            for granularity in GRANULARITIES:
                assert f"{model}-{recipe}-w4a8-{granularity}" in names
    assert "serval-tiny-outliers-fptq-w4a8-g128" in names


def test_seeds_change_calibrated_recipes_only(monkeypatch) -> None:
    budget = replace(QUICK, seeds=(0, 1))
    monkeypatch.setattr("serval.bench.w4a8_quality.QUICK", budget)
    setup = Setup(quick=True, only="fptq-w4a8-channel", note=lambda _: None)
    fptq = collect(setup)[-1].metrics
    assert fptq["seeds"] == 2
    assert fptq["kl_spread"][0] <= fptq["kl"] <= fptq["kl_spread"][1]
    assert not Variant("rtn", "channel").calibrated


def test_integer_scales_are_compared_seed_by_seed(monkeypatch) -> None:
    budget = replace(QUICK, seeds=(0, 1, 2))
    monkeypatch.setattr("serval.bench.w4a8_quality.QUICK", budget)
    found = collect(Setup(quick=True, only="fptq-w4a8-g32", note=lambda _: None))
    same, integer = (case.metrics for case in found[-2:])
    assert same["seeds"] == integer["seeds"] == 2  # three are for scales per channel
    low, high = integer["integer_change_spread"]
    assert low < integer["integer_change"] < high
    ratios = [a / b - 1 for a, b in zip(*(m["perplexity_spread"] for m in (integer, same)))]
    assert sum(ratios) / 2 == pytest.approx(integer["integer_change"], abs=0.01)


def test_integer_scales_keep_the_codes_and_nearly_the_outputs() -> None:
    decoder = compressed(shipped_model(), Variant("rtn", "g32"), [TOKENS])
    linear = next(m for m in decoder.modules() if isinstance(m, QuantizedLinear))
    before, codes = logits(decoder), linear.quantized().codes
    with_integer_scales(decoder)
    after = linear.quantized()
    assert after.integer is not None
    assert torch.equal(after.codes, codes)
    change = (logits(decoder) - before).norm() / before.norm()
    assert 0 < change < 0.02


def test_the_model_with_outliers_computes_the_same(tmp_path: Path) -> None:
    source = with_outliers(shipped_model(), tmp_path, 32.0, 128.0)
    plain, large = (checkpoint.load(p, dtype=torch.float32) for p in (shipped_model(), source))
    norms = [d.layers[0].input_layernorm.weight.abs().max() for d in (plain, large)]
    assert norms[1] > 8 * norms[0]
    assert torch.allclose(logits(plain), logits(large), atol=1e-3)
    assert (source / "recipe.yaml").is_file()


def test_groups_that_do_not_divide_a_width_are_halved() -> None:
    config = checkpoint.read_config(shipped_model())
    assert config.intermediate_size % 128 == 64
    method = Variant("gptq", "g128").method(config)
    assert method.group_size == 128
    assert method.overrides == ["*.down_proj:group_size=64"]
    assert Variant("gptq", "g32").method(config).overrides == []
    assert Variant("gptq", "channel").method(config).group_size == "channel"
