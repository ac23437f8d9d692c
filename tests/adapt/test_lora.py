"""Adapters of the packed decoder: phi, the schedule, merging, and what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from serval.adapt.annealing import Anneal, Annealing
from serval.adapt.lora import (
    LoraLinear,
    LoraOptions,
    adapters,
    adapters_disabled,
    add_adapters,
    annealed,
    merge,
    set_beta,
)
from serval.errors import ConfigError
from serval.models.layers import Linear
from tests.adapt.toy import KINDS, adapted, logits, toy_decoder
from tests.train.toy import toy_config, toy_trainer


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_gradient_of_phi(activation: str) -> None:
    z = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: annealed(v, activation, 0.37), (z,))


def test_phi_at_its_ends() -> None:
    z = torch.randn(64)
    assert torch.equal(annealed(z, "relu", 1.0), z.relu())
    assert torch.equal(annealed(z, "relu", 0.0), z)
    half = z.bfloat16()
    assert annealed(half, "silu", 0.9).dtype == torch.bfloat16


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_beta_starts_at_one_falls_and_stays_at_exactly_zero(curve: str) -> None:
    annealing = Annealing(1000, 0.1, 0.37, curve)
    betas = [annealing.beta(step) for step in range(1001)]
    assert set(betas[:101]) == {1.0}
    assert all(a > b > 0 for a, b in pairwise(betas[100:370]))
    assert set(betas[370:]) == {0.0}


@pytest.mark.parametrize(
    ("start", "end", "curve", "message"),
    [
        (0.5, 0.2, "linear", "anneal_start is 0.5 and anneal_end 0.2"),
        (0.0, 1.5, "linear", "anneal_end 1.5"),
        (0.0, 0.3, "wavy", "'wavy'; choose one of: linear, cosine"),
    ],
)
def test_bad_schedules(start: float, end: float, curve: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Annealing(10, start, end, curve)


def test_a_late_end_is_warned_of() -> None:
    assert "last 10%" in (Annealing(10, 0.0, 0.9).warning or "")
    assert Annealing(10).warning is None


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_fresh_adapter_changes_nothing_and_neither_does_a_disabled_one(beta: float) -> None:
    decoder = toy_decoder()
    before = logits(decoder)
    add_adapters(decoder, LoraOptions(activation="relu"))
    set_beta(decoder, beta)
    assert torch.equal(logits(decoder), before)
    decoder = adapted(activation="relu", beta=beta)
    assert not torch.equal(logits(decoder), before)
    with adapters_disabled(decoder):
        assert torch.equal(logits(decoder), before)
    assert not torch.equal(logits(decoder), before)


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_equals_unmerged(kind: str) -> None:
    decoder = adapted(kind, activation="gelu").double()
    before = logits(decoder)
    names = merge(decoder)
    assert len(names) > 8
    assert not adapters(decoder)
    assert all(type(decoder.get_submodule(name)) is Linear for name in names)
    torch.testing.assert_close(logits(decoder), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merged_model_is_within_1e_6_of_its_largest_logit_in_float32(kind: str) -> None:
    decoder = adapted(kind)
    before = logits(decoder)
    merge(decoder)
    assert 0 < (logits(decoder) - before).abs().max() <= 1e-6 * before.abs().max()


def test_a_merged_layer_is_within_1e_6_in_float32() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(64, 48), LoraOptions(rank=8, alpha=16))
    nn.init.normal_(layer.lora_B, std=0.05)
    x = torch.randn(40, 64)
    before = layer(x)
    after = layer.merged()(x)
    assert (after - before).abs().max() <= 1e-6 * before.abs().max()


def test_a_non_linear_adapter_is_not_merged_unless_forced() -> None:
    decoder = adapted(activation="relu", beta=0.5)
    before = logits(decoder)
    with pytest.raises(ConfigError, match=r"still non-linear \(beta = 0.5\)"):
        merge(decoder)
    assert torch.equal(logits(decoder), before)  # nothing was changed by the attempt
    linear = copy.deepcopy(decoder)
    set_beta(linear, 0.0)
    merge(decoder, force_linear=True)
    torch.testing.assert_close(logits(decoder), logits(linear), rtol=0, atol=2e-5)
    with pytest.raises(ConfigError, match="no adapter to merge"):
        merge(decoder)


def test_as_many_parameters_as_lora() -> None:
    plain, afa = adapted(), adapted(activation="silu")
    shapes = [
        {n: p.shape for n, p in d.named_parameters() if p.requires_grad} for d in (plain, afa)
    ]
    assert shapes[0] == shapes[1]
    assert all("lora_" in name for name in shapes[0])


def test_beta_leaves_plain_adapters_linear() -> None:
    decoder = adapted()
    set_beta(decoder, 1.0)
    assert {layer.beta for layer in adapters(decoder).values()} == {0.0}


def test_bad_options_and_targets() -> None:
    with pytest.raises(ConfigError, match="'tanh'; choose one of: relu, silu, gelu"):
        LoraOptions(activation="tanh")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        LoraOptions(rank=0)
    with pytest.raises(ConfigError, match=r"'qproj'.*choose from: q_proj, k_proj"):
        add_adapters(toy_decoder(), LoraOptions(targets=("qproj",)))
    with pytest.raises(ConfigError, match="absorbed by the cache"):
        add_adapters(toy_decoder("moe-mla"), LoraOptions(targets=("kv_b_proj",)))
    decoder = adapted(targets=("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name in adapters(decoder)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="already has an adapter"):
        add_adapters(decoder, LoraOptions())


def test_beta_follows_the_optimizer_step_and_survives_a_resume(tmp_path) -> None:
    """beta is read where it acts, in the forward passes of two real runs."""

    def betas(steps: int) -> tuple[list[float], int]:
        callbacks = [Anneal(Annealing(8, 0.0, 0.75))]
        made = toy_trainer(tmp_path, steps=steps, callbacks=callbacks, config=toy_config())
        # an adapter on a module of its own: the trainer's decoder keeps its plain layers
        layer = LoraLinear(nn.Linear(4, 4), LoraOptions(activation="relu"))
        made.decoder.extra = layer
        seen: list[float] = []
        made.decoder.register_forward_pre_hook(lambda *_: seen.append(layer.beta))
        made.fit()
        rows = made.settings.batch_rows // made.settings.micro_batch_rows
        return seen[::rows], len(seen) // rows

    first, before = betas(4)
    rest, after = betas(8)
    assert (before, after) == (4, 4)
    assert first + rest == pytest.approx([max(0.0, 1 - step / 6) for step in range(8)])
    assert rest[2:] == [0.0, 0.0]
