from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from serval.compress import Method, compress_decoder
from serval.compress.block import Block, find_block
from serval.compress.fptq import FPTQ, equalization_scale, plan_table, range_histogram
from serval.compress.outliers import inject_outliers
from serval.compress.scheme import WeightScheme
from serval.errors import ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder, moe_decoder

RANGE = frozenset({"range"})
INFINITE = {"v0": float("-inf"), "v1": float("inf")}
TOKENS = torch.arange(48) * 7 % 203


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS, PackedBatch.from_lengths([32, 16])))


def observed(model, layer: int = 0) -> Block:
    """A block of `model` with the statistics of its inputs, every matrix to become W4A8."""
    block = find_block(
        model.layers[layer], layer, lambda path: checkpoint.module_name(model.config, path)
    )
    with block.observe(RANGE):
        logits(model)
    for matrix in block.matrices:
        matrix.scheme = WeightScheme(4, 4)
    return block


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equalization_leaves_the_function_unchanged(make, dtype, tolerance):
    model = make().to(dtype)
    inject_outliers(model)
    exact = logits(model)
    for layer in range(2):
        plan = FPTQ(**INFINITE, lae_down=True).prepare_block(observed(model, layer))
        assert sum(entry["equalized"] for entry in plan.values()) >= 3
    gap = (logits(model) - exact).abs().max() / exact.abs().max()
    assert gap < tolerance


def test_equalized_channels_peak_at_the_logarithm():
    model = decoder()
    inject_outliers(model)
    block = observed(model)
    site = block.sites[0]
    before = site.abs_max.clone()
    assert before.max() > 50
    plan = FPTQ(**INFINITE).prepare_block(block)
    torch.testing.assert_close(site.abs_max, torch.log2(2 + before))
    entry = plan["model.layers.0.input_layernorm"]
    assert entry["range"] == pytest.approx(float(before.max()), rel=1e-4)
    assert entry["after"] == pytest.approx(float(torch.log2(2 + before.max())), rel=1e-3)
    again = observed(model).sites[0].abs_max  # what the model really computes now
    torch.testing.assert_close(again, torch.log2(2 + before), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("v", "policy", "activations"),
    [
        (0.5, "static", "static"),
        (15.0, "static", "static"),
        (15.0001, "lae", "static"),
        (149.9, "lae", "static"),
        (150.0, "token", "token"),
        (3000.0, "token", "token"),
        (0.0, "token", "token"),
    ],
)
def test_the_bounds_of_the_policy(v, policy, activations):
    decision = FPTQ().decide(v, 7.0, foldable=True)
    assert (decision.policy, decision.activations) == (policy, activations)
    assert decision.equalized == (policy == "lae")
    stuck = FPTQ().decide(v, 7.0, foldable=False)
    assert (stuck.policy, stuck.activations) == (policy, activations)
    assert not stuck.equalized


def test_the_extended_policy_and_the_other_options():
    extended = FPTQ(policy="extended")
    assert extended.decide(700.0, 9.5, True).activations == "static"
    assert extended.decide(700.0, 9.5, True).equalized
    assert extended.decide(16.0, 4.2, False).activations == "token"
    assert extended.decide(1e6, 19.9, True).activations == "token"
    assert extended.decide(14.0, 4.0, True).policy == "static"
    assert FPTQ(mid_mode="token").decide(50.0, 6.0, True).activations == "token"
    with pytest.raises(ConfigError, match="v0 <= v1"):
        FPTQ(v0=20.0, v1=10.0)


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
def test_matrices_of_one_input_share_a_decision(make):
    model = make()
    inject_outliers(model, up_gain=4096.0)
    block = observed(model, 1)
    plan = FPTQ().prepare_block(block)
    assert {entry["policy"] for entry in plan.values()} == {"static", "lae", "token"}
    for site in block.sites:
        assert {m.scheme.activations for m in site.matrices} == {plan[site.name]["activations"]}
    read = {matrix.path for site in block.sites for matrix in site.matrices}
    assert "self_attn.o_proj" in read
    named = [matrix.path for matrix in block.sites[0].matrices]
    assert len(named) >= 2  # q, k, v; with latent attention q and the latent


def test_weights_alone_keep_float_activations():
    block = observed(decoder())
    for matrix in block.matrices:
        matrix.scheme = replace(matrix.scheme, activations="none")
    block.matrices[0].scheme = None
    FPTQ().prepare_block(block)
    assert block.matrices[0].scheme is None
    assert {m.scheme.activations for m in block.matrices[1:]} == {"none"}


def test_scale_follows_the_input_only_through_the_logarithm():
    m = torch.tensor([0.3, 2.0, 15.0, 150.0], dtype=torch.float64)
    for c in (0.1, 7.0):
        ratio = equalization_scale(c * m) / equalization_scale(m)
        torch.testing.assert_close(ratio, c * torch.log2(2 + m) / torch.log2(2 + c * m))
    assert equalization_scale(torch.tensor([2.0])).item() == 1.0


def test_dead_channels_and_unseen_inputs():
    model = decoder()
    with torch.no_grad():
        model.layers[0].input_layernorm.weight[5] = 0
    block = observed(model)
    exact = logits(model)
    FPTQ(**INFINITE).prepare_block(block)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    torch.testing.assert_close(logits(model), exact, rtol=1e-5, atol=1e-5)
    unseen = observed(model)
    for part in unseen.inputs:
        part.statistics = None
    plan = FPTQ().prepare_block(unseen)
    assert {entry["activations"] for entry in plan.values()} == {"token"}


def test_range_statistics_equalize_as_llm_compressor_does():
    """SmoothQuantModifier(algorithm="log_equalization"): scales of max - min of the norm's output,
    at least 1e-5; the norm is divided and its consumers multiplied."""
    model, other = decoder(), decoder()
    inject_outliers(model)
    inject_outliers(other)
    seen = []
    hook = other.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    logits(other)
    hook.remove()
    x = torch.cat(seen)
    spread = x.amax(0) - x.amin(0)
    scales = (spread / torch.log2(2 + spread)).clamp(min=1e-5)
    FPTQ(**INFINITE, stat="range").prepare_block(observed(model))
    mine, theirs = model.layers[0], other.layers[0]
    torch.testing.assert_close(
        mine.input_layernorm.weight, theirs.input_layernorm.weight / scales, rtol=1e-6, atol=1e-6
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        got = getattr(mine.self_attn, name).weight
        expected = getattr(theirs.self_attn, name).weight * scales
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_the_plan_is_json_and_prints_as_a_table():
    model = decoder()
    inject_outliers(model, up_gain=4096.0)
    plan = {}
    for layer in range(2):
        plan |= FPTQ().prepare_block(observed(model, layer))
    assert json.loads(json.dumps(plan)) == plan
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan_table(plan))
    text = capture.get()
    assert "model.layers.1.mlp.down_proj" in text
    assert "lae" in text
    assert sum(int(part.split(": ")[1]) for part in range_histogram(plan).split(", ")) == len(plan)


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
def test_injected_outliers_change_ranges_and_nothing_else(make):
    model = make()
    exact, before = logits(model), float(observed(model).sites[0].abs_max.max())
    model = make()
    chosen = inject_outliers(model, norm_gain=64.0)
    assert torch.equal(logits(model), exact)
    site = observed(model).sites[0]
    assert float(site.abs_max.max()) > 8 * before
    loud = (site.abs_max > 8 * site.abs_max.median()).nonzero().flatten().tolist()
    assert set(loud) <= set(chosen["layers.0.input_layernorm"])
    assert len(loud) >= 1


def test_equalization_keeps_what_one_static_scale_loses():
    """Rounding each input as decided, on a model with outliers (weights stay in float)."""

    def error(recipe: FPTQ) -> float:
        model = decoder(seed=3)
        inject_outliers(model, norm_gain=32.0, up_gain=1.0)
        exact = logits(model)
        blocks = [observed(model, layer) for layer in range(2)]
        for block in blocks:
            recipe.prepare_block(block)
        hooks = [
            matrix.linear.register_forward_pre_hook(rounding(matrix))
            for block in blocks
            for site in block.sites
            for matrix in site.matrices
        ]
        got = logits(model)
        for hook in hooks:
            hook.remove()
        return float((got - exact).norm() / exact.norm())

    def rounding(matrix):
        limit = matrix.statistics.abs_max.max()

        def hook(module, arguments):
            (x,) = arguments
            dynamic = matrix.scheme.activations == "token"
            scale = (x.abs().amax(-1, keepdim=True) if dynamic else limit) / 127
            return ((x / scale).round().clamp(-127, 127) * scale,)

        return hook

    static = error(FPTQ(v0=float("inf"), v1=float("inf")))
    paper = error(FPTQ())
    assert paper < static / 5
    assert error(FPTQ(policy="extended", v1=20.0)) < static / 5  # past v1, where the paper's stops
    assert error(FPTQ(v1=20.0)) > 2 * paper


def test_a_compressed_model_has_the_planned_activations(tmp_path):
    model = decoder()
    inject_outliers(model, up_gain=4096.0)
    report = compress_decoder(model, Method(weights="fptq", bits=8, group_size=4), [TOKENS[:32]])
    assert json.loads(json.dumps(report.plan)) == report.plan
    kinds = set()
    for index, layer in enumerate(model.layers):
        readers = {
            "input_layernorm": layer.self_attn.q_proj,
            "self_attn.o_proj": layer.self_attn.o_proj,
            "post_attention_layernorm": layer.mlp.up_proj,
            "mlp.down_proj": layer.mlp.down_proj,
        }
        for site, linear in readers.items():
            entry = report.plan[f"model.layers.{index}.{site}"]
            assert linear.activations == entry["activations"]
            kinds.add((entry["policy"], entry["activations"]))
            if entry["activations"] == "static":
                assert linear.input_scale == pytest.approx(entry["after"] / 127, rel=1e-3)
            else:
                assert linear.input_scale is None
    assert kinds == {("static", "static"), ("lae", "static"), ("token", "token")}
    checkpoint.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(checkpoint.load(tmp_path / "out")), logits(model))
