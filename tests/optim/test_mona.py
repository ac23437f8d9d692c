"""MONA: the two forms, its response to frequencies, Lite, traps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serval.errors import ConfigError
from serval.models.decoder import Decoder
from serval.optim import Mona, OptimizerOptions, build
from serval.optim.schedules import Constant
from serval.train.loop import Settings, Trainer
from serval.train.stream import next_token_targets
from tests.optim.test_muon import descend, furthest, parameters
from tests.train.toy import ToyStream, toy_config


def directions(grads: list[Tensor], **options: Any) -> list[Tensor]:
    """G~ of each step: with momentum 0 and no nesterov it is what would be orthogonalised."""
    weight = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = Mona([weight], momentum=0.0, nesterov=False, **options)
    found = []
    for grad in grads:
        weight.grad = grad.clone()
        out = torch.empty_like(grad)
        (group,) = optimizer.param_groups
        optimizer._advance(weight.grad, optimizer._state(weight, group), group, out)
        assert torch.equal(weight.grad, grad)
        found.append(out)
    return found


@pytest.mark.parametrize(("alpha", "beta"), [(None, 0.9), (None, 0.99), (0.5, 0.9), (-7.0, 0.95)])
def test_one_buffer_is_two_buffers(alpha: float | None, beta: float) -> None:
    torch.manual_seed(0)
    grads = list(torch.randn(200, 5, 7, dtype=torch.float64))
    options = {"alpha": alpha, "beta": beta}
    one = directions(grads, **options)
    two = directions(grads, form="two_buffers", **options)
    assert furthest(one, two) <= 1e-12


def test_two_buffers_are_the_papers_recursion() -> None:
    torch.manual_seed(0)
    grads = list(torch.randn(20, 3, 4, dtype=torch.float64))
    alpha, beta = -4.0, 0.9
    acceleration = previous = torch.zeros(3, 4, dtype=torch.float64)
    for grad, ours in zip(
        grads, directions(grads, alpha=alpha, beta=beta, form="two_buffers"), strict=True
    ):
        acceleration = beta * acceleration + (1 - beta) * (grad - previous)
        previous = grad
        torch.testing.assert_close(ours, grad + alpha * acceleration, rtol=0, atol=1e-13)


def test_default_alpha_averages_gradient_and_mean() -> None:
    grads = list(torch.randn(10, 4, 6))
    mean = torch.zeros(4, 6)
    for grad, ours in zip(grads, directions(grads, beta=0.975), strict=True):
        torch.testing.assert_close(ours, (grad + mean) / 2)
        mean = mean + 0.025 * (grad - mean)


@pytest.mark.parametrize("beta", [0.9, 0.975])
@pytest.mark.parametrize("form", ["one_buffer", "two_buffers"])
def test_gains_at_rest_and_at_the_highest_frequency(beta: float, form: str) -> None:
    grad = torch.randn(3, 5, dtype=torch.float64)
    steps = 1500
    constant = directions([grad] * steps, beta=beta, form=form)[-1]
    torch.testing.assert_close(constant, grad)
    alternating = directions([grad * (-1) ** t for t in range(steps)], beta=beta, form=form)[-1]
    torch.testing.assert_close(alternating, -grad * beta / (1 + beta))
    edge = -1 / (1 - beta) * (1 - 1e-9)
    nearly = directions([grad * (-1) ** t for t in range(steps)], alpha=edge, beta=beta, form=form)[
        -1
    ]
    torch.testing.assert_close(nearly, grad * (1 - beta) / (1 + beta))


def test_first_step_is_muons() -> None:
    ours, theirs = parameters(), parameters()
    left = descend(Mona(ours, ns_dtype=torch.bfloat16), ours, 1)
    right = descend(torch.optim.Muon(theirs), theirs, 1)
    assert furthest(left, right) <= 1e-5


def test_lite_tracks_full_over_500_steps() -> None:
    weight = nn.Parameter(torch.zeros(32, 48))
    lite, full = Mona([weight], beta=0.99, lite=True), Mona([weight], beta=0.99)
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(32, 48, generator=generator)
    out = torch.empty_like(weight)
    for _ in range(500):
        weight.grad = drift + 0.5 * torch.randn(32, 48, generator=generator)
        for optimizer in (lite, full):
            (group,) = optimizer.param_groups
            optimizer._advance(weight.grad, optimizer._state(weight, group), group, out)
    small = lite.state[weight]["gradient_average"]
    large = full.state[weight]["gradient_average"]
    assert small.dtype == torch.bfloat16
    assert (small.float() - large).norm() / large.norm() < 0.02
    nearest = torch.zeros(32, 48, dtype=torch.bfloat16)
    for _ in range(500):  # what rounding to nearest would have kept of a constant gradient
        nearest.copy_(nearest.float().lerp(drift, 0.01))
    assert (nearest.float() - drift).norm() / drift.norm() > 0.1


FORMS = [{}, {"lite": True}, {"form": "two_buffers"}, {"bias_correction": True}]


@pytest.mark.parametrize("more", FORMS)
def test_bfloat16_weights_keep_float32_state(more: dict[str, Any]) -> None:
    """As float32 weights do with the same gradients, Lite's average alone being bfloat16."""
    narrow, wide = (
        nn.Parameter(torch.zeros(24, 40, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    left, right = (Mona([weight], beta=0.99, **more) for weight in (narrow, wide))
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(24, 40, generator=generator)
    for _ in range(60):
        noise = torch.randn(24, 40, generator=generator)
        narrow.grad = (drift + 0.5 * noise).bfloat16()
        wide.grad = narrow.grad.float()
        left.step()
        right.step()
    state, twin = left.state[narrow], right.state[wide]
    assert state.keys() == twin.keys()
    for key, value in state.items():
        lite = more.get("lite") and key == "gradient_average"
        assert value.dtype == (torch.bfloat16 if lite else torch.float32), key
        assert torch.equal(value, twin[key]), key


def test_bias_correction_starts_at_the_gradient() -> None:
    grad = torch.randn(4, 6)
    found = directions([grad] * 30, bias_correction=True)
    assert furthest(found, [grad] * 30) <= 1e-5


def test_sign_of_alpha_decides_between_damping_and_looking_ahead() -> None:
    """On an oscillating gradient the paper's negative alpha damps, a positive one amplifies."""
    grads = [torch.ones(1, 2, dtype=torch.float64) * (-1) ** t for t in range(400)]
    size = {
        alpha: directions(grads, alpha=alpha, beta=0.9)[-1].abs().max() for alpha in (-5.0, 5.0)
    }
    assert size[-5.0] < 0.5 < 1 < size[5.0]


def trained(alpha: float, seed: int, steps: int = 40) -> float:
    """Final loss of a small decoder after `steps` of one row of 32 tokens, constant rate."""
    torch.manual_seed(seed)
    decoder = Decoder(toy_config())
    options = OptimizerOptions(lr=1e-2, weight_decay=0.0, mona_alpha=alpha, mona_beta=0.9)
    trainer = Trainer(
        decoder,
        lambda model: build("mona", model, options),
        Constant(steps),
        ToyStream(32, seed=seed, masked=False),
        Settings(steps=steps, batch_rows=1, directory=None),
        note=lambda line: None,
    )
    trainer.fit()
    held_out = ToyStream(64, seed=99, masked=False)
    with torch.no_grad():
        losses = [trainer.loss(next_token_targets(held_out.next()))[1] for _ in range(16)]
    return float(sum(losses)) / (16 * 63)


def test_short_runs_with_small_batches_prefer_a_positive_alpha() -> None:
    """What ALTO says and what small character models show: looking ahead (alpha > 0) is faster,
    the paper's negative alpha slower, Muon (alpha = 0) between them."""
    losses = {
        alpha: torch.tensor([trained(alpha, seed) for seed in range(3)])
        for alpha in (2.0, 0.0, -5.0)
    }
    assert losses[0.0].max() < 1.5  # from 4.2
    assert (losses[2.0] < losses[-5.0]).all()
    assert losses[2.0].mean() < losses[0.0].mean() < losses[-5.0].mean() - 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, "mona beta is 1.0"),
        ({"alpha": -40.0}, r"expected \|alpha\| < .* = 40, .* paper's value is -20"),
        ({"form": "three"}, "mona form is 'three'"),
        ({"form": "two_buffers", "lite": True}, "belong to the form 'one_buffer'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mona(parameters([(8, 8)]), **options)
