"""MaskPrune's parts: masks, slicing, costs, the minimax's steps, the distillation loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serval.adapt.lora import LoraOptions, adapters
from serval.compress.maskprune.distill import DistillationLoss, distilled_cross_entropy
from serval.compress.maskprune.masks import MaskedDecoder
from serval.compress.maskprune.minimax import (
    MaskOptimizer,
    Minimax,
    Phases,
    dropped,
    least_energy,
    mask_importance,
    measured_weights,
    prox,
)
from serval.compress.maskprune.slicing import slice_decoder
from serval.compress.maskprune.units import (
    MEASURES,
    Costs,
    Levels,
    check_budget,
    even_widths,
    find_sites,
    settle,
)
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.optim import MixedOptimizer
from serval.train.stream import Targets, next_token_targets
from serval.train.throughput import ModelFlops
from tests.compress import toy

TOKENS = torch.arange(40) * 7 % 203
LORA = LoraOptions(rank=2)


def logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(TOKENS, PackedBatch.from_lengths([25, 15])))


@torch.no_grad()
def disturb(masked: MaskedDecoder) -> None:
    """Masks of either sign and updates that change something."""
    for module in masked.masks.values():
        module.mask.copy_(1 + 0.5 * torch.randn(module.mask.shape))
        module.mask[0] *= -1
    for module in adapters(masked.decoder).values():
        module.lora_B.normal_(0, 0.05)


MODELS: dict[str, Callable[[], Decoder]] = {
    "grouped": lambda: toy.decoder(qk_norm=True, qkv_bias=True, output_bias=True, mlp_bias=True),
    "sinks": lambda: toy.decoder(attention_sinks=True, num_key_value_heads=4),
    "experts": toy.moe_decoder,
    "latent": toy.mla_decoder,
}


@pytest.mark.parametrize("name", MODELS)
def test_masked_model_equals_sliced_model_and_every_layer_has_the_same_width(name: str) -> None:
    decoder = MODELS[name]()
    before = logits(decoder)
    masked = MaskedDecoder(decoder, find_sites(decoder), LORA)
    assert torch.equal(logits(decoder), before)  # masks at one, updates at zero
    disturb(masked)
    assert not torch.allclose(logits(decoder), before, atol=1e-3)
    with masked.original():
        assert torch.equal(logits(decoder), before)
    widths = {"heads": 1 if name == "grouped" else 3, "channels": 37}
    generator = torch.Generator().manual_seed(1)
    masked.cut(
        {
            s.name: torch.randperm(s.units, generator=generator)[: widths[s.kind]]
            for s in masked.sites
            if s.units >= widths[s.kind]
        }
        | {s.name: torch.arange(s.units) for s in masked.sites if s.units < widths[s.kind]}
    )
    expected, kinds = logits(decoder), masked.kinds()
    sliced = masked.finish()
    torch.testing.assert_close(logits(sliced), expected, atol=1e-5, rtol=1e-5)
    units = {(site.kind, site.units) for site in find_sites(sliced)}
    assert len(units) == len(kinds)
    assert sliced.config.head_dim == decoder.config.head_dim
    assert not any("lora" in key or "mask" in key for key in sliced.state_dict())


def test_layers_of_different_widths_are_refused() -> None:
    decoder = toy.decoder()
    sites = find_sites(decoder)
    kept = {site.name: torch.arange(site.units) for site in sites}
    kept[sites[-1].name] = torch.arange(5)
    with pytest.raises(ConfigError, match="every layer must keep the same number"):
        slice_decoder(decoder, sites, kept)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_cost_model_says_what_slicing_leaves(measure: str) -> None:
    decoder = toy.decoder(qkv_bias=True, mlp_bias=False)
    sites = find_sites(decoder)
    costs = Costs.of(decoder, sites, measure, 64)  # type: ignore[arg-type]
    kept = {s.name: torch.arange(1 if s.kind == "heads" else 40) for s in sites}
    sliced = slice_decoder(decoder, sites, kept)

    def cost(model: Decoder) -> float:
        flops = ModelFlops.of(model)
        if measure == "flops":
            return flops.per_token + flops.per_pair * 65 / 2
        parameters = sum(p.numel() for p in model.parameters())
        return parameters - (costs_fixed if measure == "blocks" else 0)

    costs_fixed = Costs.of(decoder, sites, "parameters", 64).fixed
    expected = cost(sliced) / cost(decoder)
    assert costs.fraction({"heads": 1, "channels": 40}) == pytest.approx(expected, rel=1e-12)
    assert costs.fraction(costs.units) == pytest.approx(1)


@settings(max_examples=40)
@given(keep=st.floats(0.2, 1.0), multiple=st.sampled_from([1, 8, 64]), units=st.integers(65, 300))
def test_settled_widths_meet_the_budget_and_leave_no_step_unused(
    keep: float, multiple: int, units: int
) -> None:
    costs = Costs(100.0, {"heads": 300.0, "channels": 7.0}, {"heads": 4, "channels": units})
    levels = Levels.of(costs, multiple)
    if costs.fraction(levels.least()) > keep:
        with pytest.raises(ConfigError, match="cannot be met"):
            check_budget(costs, levels, keep)
        return
    start = {"heads": 2, "channels": levels.at_most("channels", units / 3)}
    for widths in (
        even_widths(costs, levels, keep),
        settle(costs, levels, start, keep, lambda kind, low, high: float(high - low)),  # type: ignore[arg-type]
    ):
        assert costs.fraction(widths) <= keep + 1e-9
        for kind, width in widths.items():
            assert width in levels.allowed[kind]
            above = levels.neighbour(kind, width, 1)
            if above is not None:
                assert costs.fraction({**widths, kind: above}) > keep + 1e-9
        assert widths["channels"] % multiple == 0 or widths["channels"] == units


# -- the minimax's steps ------------------------------------------------------------------------


def test_the_gradient_of_the_least_energy_is_the_next_smallest_value() -> None:
    energy = torch.rand(3, 9, dtype=torch.float64)
    for count in range(9):
        indices, following = least_energy(energy, count)
        more, _ = least_energy(energy, count + 1)
        slope = energy.gather(1, more).sum(1) - energy.gather(1, indices).sum(1)
        torch.testing.assert_close(slope, following)
    assert torch.isinf(least_energy(energy, 9)[1]).all()


def test_the_prox_step_is_the_minimiser_over_the_chosen_entries() -> None:
    values = torch.randn(2, 5, dtype=torch.float64)
    indices, strength = torch.tensor([[0, 3], [4, 1]]), torch.tensor([0.3, 2.0]).double()
    x = prox(values, indices, strength).requires_grad_()
    chosen = torch.zeros_like(values).scatter(1, indices, 1.0)
    objective = ((x - values) ** 2).sum() / 2 + (strength[:, None] * chosen * x**2).sum()
    (slope,) = torch.autograd.grad(objective, x)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    assert torch.equal(x[chosen == 0], values[chosen == 0])


def test_ceil_is_deaf_to_rounding_and_never_drops_a_whole_layer() -> None:
    assert [dropped(rho, 192) for rho in (0.0, 0.5 + 1e-10, 0.5 + 1e-3, 1.0)] == [0, 96, 97, 191]
    assert dropped(1.0, 1) == 0


def test_masks_move_by_one_normalisation_per_kind() -> None:
    masks = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    masks[0].grad, masks[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([1.0, -1.0])
    optimizer = MaskOptimizer([{"params": masks, "lr": 0.5}], momentum=0.9)
    optimizer.step()
    rms = (11 / 4) ** 0.5
    torch.testing.assert_close(masks[0].detach(), torch.tensor([1 - 0.05 * 3 / rms, 1.0]))
    torch.testing.assert_close(masks[1].detach(), torch.tensor([1 - 0.05 / rms, 1 + 0.05 / rms]))


def minimax(decoder: Decoder, keep: float, multiple: int = 1) -> Minimax:
    sites = find_sites(decoder)
    costs = Costs.of(decoder, sites, "blocks", 64)
    masked = MaskedDecoder(decoder, sites)
    rows = [next_token_targets((TOKENS, [25, 15], None))]
    importance = mask_importance(masked, rows)
    phases = Phases.of(100, 0.1, 0.4, 0.25)
    return Minimax(masked, costs, Levels.of(costs, multiple), keep, importance, phases)


def run_out(learner: Minimax) -> None:
    """All steps with masks that only the minimax moves."""
    for step in range(1, 101):
        learner.on_step_end(step, learner.masked.decoder, MixedOptimizer([]), {})
        assert learner.z >= 0
        assert all(bool((y >= 0).all()) for y in learner.y.values())
        if learner.residual is None and step <= learner.phases.warmup:
            assert learner.count("channels") == learner.count("heads") == 0


@pytest.mark.parametrize(("keep", "multiple"), [(0.8, 1), (0.6, 8), (0.35, 1)])
def test_the_budget_is_met_with_one_width_for_all_layers(keep: float, multiple: int) -> None:
    learner = minimax(toy.decoder(num_key_value_heads=4), keep, multiple)
    run_out(learner)
    kept = learner.masked.kept()
    for kind in ("heads", "channels"):
        counts = {len(kept[s.name]) for s in learner.masked.sites if s.kind == kind}
        assert counts == {learner.widths[kind]}
    assert learner.costs.fraction(learner.widths) <= keep + 1e-9
    assert learner.costs.fraction(learner.widths) > keep - 0.1
    assert learner.widths["channels"] % multiple == 0
    assert learner.residual < 0.02  # nothing was left of what was cut


def test_units_that_do_nothing_go_first() -> None:
    """Half the channels of every layer, other ones in each, have no way out of the layer."""
    decoder = toy.decoder(intermediate_size=32, num_key_value_heads=1)
    useless = {}
    for site in find_sites(decoder):
        if site.kind == "channels":
            useless[site.name] = sorted(torch.randperm(32)[:16].tolist())
            weight = decoder.get_submodule(site.name).down_proj.weight  # type: ignore[union-attr]
            weight.data[:, useless[site.name]] = 0
    before = logits(decoder)
    learner = minimax(decoder, 1.0)
    learner.keep = learner.costs.fraction({"heads": 1, "channels": 16})
    run_out(learner)
    for name, gone in useless.items():
        assert sorted(set(range(32)) - set(learner.masked.kept()[name])) == gone
    torch.testing.assert_close(logits(learner.masked.finish()), before, atol=1e-5, rtol=1e-5)


def weigh(decoder: Decoder, keep: float) -> tuple[Minimax, dict[str, float]]:
    """Text that the decoder itself finds most likely, so that whatever it loses costs."""
    learner = minimax(decoder, keep, 8)
    likely = logits(decoder).argmax(-1)
    rows = [Targets(TOKENS, [25, 15], likely, torch.ones(len(TOKENS)))]
    found = measured_weights(
        learner.masked, rows, learner.costs, learner.levels, keep, learner.importance
    )
    return learner, found  # type: ignore[return-value]


@pytest.mark.parametrize("idle", ["heads", "channels"])
def test_the_kind_that_costs_the_loss_nothing_goes_first(idle: str) -> None:
    """All units of a kind but weakly tied to the model: first-order importance, whose mean is 1 in
    every layer, cannot tell; the measured weight can."""
    decoder = toy.decoder(num_key_value_heads=4, num_attention_heads=4)
    leaf = {"heads": "o_proj", "channels": "down_proj"}[idle]
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3 if leaf in name else 3.0)
    learner, found = weigh(decoder, 0.7)
    masks = {kind: learner.masked.stacked(kind) for kind in learner.masked.kinds()}
    other = "channels" if idle == "heads" else "heads"
    assert found[idle] < 0.1 * found[other]
    shares = {kind: learner.costs.share(kind) for kind in found}  # type: ignore[arg-type]
    mean = sum(shares[kind] * found[kind] for kind in found) / sum(shares.values())
    assert mean == pytest.approx(1)
    for kind, before in masks.items():
        assert torch.equal(learner.masked.stacked(kind), before)  # measuring leaves no trace
    learner.weights = found  # type: ignore[assignment]
    run_out(learner)
    units = learner.costs.units
    kept = {kind: learner.widths[kind] / units[kind] for kind in units}
    assert kept[idle] < kept[other]


def test_a_kind_of_which_nothing_may_go_weighs_as_the_others() -> None:
    _, found = weigh(toy.decoder(num_key_value_heads=1), 0.8)
    assert found == {"heads": pytest.approx(1), "channels": pytest.approx(1)}


def test_a_resumed_minimax_goes_on_where_it_was() -> None:
    whole, half = minimax(toy.decoder(), 0.6), minimax(toy.decoder(), 0.6)
    run_out(whole)
    for step in range(1, 41):
        half.on_step_end(step, half.masked.decoder, MixedOptimizer([]), {})
    again = minimax(toy.decoder(), 0.6)
    again.masked.decoder.load_state_dict(half.masked.decoder.state_dict())
    again.load_state_dict(half.state_dict())
    for step in range(41, 101):
        again.on_step_end(step, again.masked.decoder, MixedOptimizer([]), {})
    assert again.masked.kept() == whole.masked.kept()
    assert again.state_dict() == whole.state_dict()


# -- distillation -------------------------------------------------------------------------------


def test_distilled_loss_and_its_gradient_are_those_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 70, 6, generator=generator)
    weight = torch.randn(11, 6, generator=generator)
    targets = torch.randint(11, (70,), generator=generator)
    weights = torch.rand(70, generator=generator) * (torch.arange(70) % 3 > 0)
    hidden.requires_grad_()
    loss, nll = distilled_cross_entropy(hidden, teacher, weight, targets, weights, 0.7)
    (3 * loss).backward()
    plain = hidden.detach().requires_grad_()
    log_q = (plain @ weight.t()).log_softmax(-1)
    log_p = (teacher @ weight.t()).log_softmax(-1)
    expected_nll = -(weights * log_q.gather(1, targets[:, None]).squeeze(1)).sum()
    divergence = (weights * (log_p.exp() * (log_p - log_q)).sum(1)).sum()
    (3 * (expected_nll + 0.7 * divergence)).backward()
    torch.testing.assert_close(nll, expected_nll)
    torch.testing.assert_close(loss, expected_nll + 0.7 * divergence)
    torch.testing.assert_close(hidden.grad, plain.grad, atol=1e-5, rtol=1e-4)


def test_the_teacher_is_the_original_and_only_masks_and_updates_learn() -> None:
    decoder = toy.decoder()
    masked = MaskedDecoder(decoder, find_sites(decoder), LORA)
    row = next_token_targets((TOKENS, [25, 15], None))
    distilled, plain = DistillationLoss(masked, 1.0), DistillationLoss(masked, 0.0)
    same, nll = distilled(row)
    torch.testing.assert_close(same, nll)  # the student still is its teacher
    disturb(masked)
    loss, nll = distilled(row)
    assert float((loss - nll).detach()) > 1e-3
    torch.testing.assert_close(plain(row)[0], nll)
    loss.backward()
    trained = {n for n, p in decoder.named_parameters() if p.grad is not None}
    assert trained == {
        n for n, p in decoder.named_parameters() if n.endswith(("mask", "lora_A", "lora_B"))
    }
    assert trained == {n for n, p in decoder.named_parameters() if p.requires_grad}


# -- what cannot be pruned ----------------------------------------------------------------------


def test_models_that_cannot_be_pruned_are_refused() -> None:
    quantised = toy.decoder()
    quantised.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(ConfigError, match="already quantised"):
        find_sites(quantised)
    mtp = Decoder(replace(toy.decoder().config, num_mtp_layers=1))
    with pytest.raises(ConfigError, match="multi-token-prediction"):
        find_sites(mtp)
