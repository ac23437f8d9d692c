"""Identities of the attention variants in float64, their gradients and their edges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serval.kernels.attention_variants import reference as variants

H, N, D = 3, 9, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def logits(seed: int = 0, scale: float = 2.0) -> Tensor:
    """Causal logits [H, N, N] in float64."""
    torch.manual_seed(seed)
    z = scale * torch.randn(H, N, N, dtype=torch.float64)
    return z.masked_fill(torch.ones(N, N).triu(1).bool(), float("-inf"))


def values() -> Tensor:
    return torch.randn(H, N, D, dtype=torch.float64)


B = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64)[:, None, None]
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": variants.softmax,
    "softmax1": variants.softmax1,
    "sink logit": lambda z: variants.sink_logit(z, B),
    "k bias": lambda z: variants.k_bias(z, B),
    "clipped": lambda z: variants.clipped_softmax(z, -0.03),
    "softpick": variants.softpick,
    "sigmoid": lambda z: variants.sigmoid(z, -2.0),
    "elu": variants.elu_kernel,
    "elastic": lambda z: variants.elastic_softmax(z, -0.5 * torch.ones_like(B)),
}


def test_softmax1_is_a_sink_logit_of_zero_and_a_kv_bias_of_zero() -> None:
    z, v = logits(), values()
    one = variants.softmax1(z)
    torch.testing.assert_close(one, variants.sink_logit(z, torch.zeros_like(B)), **EXACT)
    zero = torch.zeros(H, 1, D, dtype=torch.float64)
    bias = variants.kv_bias(z, v, torch.zeros_like(B), zero)
    torch.testing.assert_close(one @ v, bias, **EXACT)


@pytest.mark.parametrize("gradient", [False, True])
def test_sinks_from_the_lse(gradient: bool) -> None:
    """A sink logit gates the output by sigmoid(lse - b), a KV bias mixes in its value; outputs and
    gradients."""
    found = []
    value = torch.randn(H, 1, D, dtype=torch.float64)
    v0 = values()
    for direct in (True, False):
        z, v = logits().requires_grad_(), v0.clone().requires_grad_()
        b = B.clone().requires_grad_()
        o, lse = variants.softmax(z) @ v, z.logsumexp(-1)
        if direct:
            first, second = variants.sink_logit(z, b) @ v, variants.kv_bias(z, v, b, value)
            total = torch.cat([z, b.expand(H, N, 1)], -1).logsumexp(-1)
        else:
            first, total = variants.sink_logit_from_lse(o, lse, b[..., 0])
            second, other = variants.kv_bias_from_lse(o, lse, b[..., 0], value)
            torch.testing.assert_close(other, total, **EXACT)
        results: tuple[Tensor, ...] = (first, second, total)
        if gradient:
            weight = torch.linspace(-1, 1, D, dtype=torch.float64)
            loss = (first * weight).sum() + (second * weight).square().sum()
            z_grad, *rest = torch.autograd.grad(loss, (z, v, b))
            results = (z_grad.masked_fill(z == float("-inf"), 0), *rest)
        found.append(results)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_neutral_settings_are_softmax() -> None:
    z, v = logits(), values()
    want = z.softmax(-1)
    nothing = torch.full_like(B, float("-inf"))
    neutral = {
        "softmax": variants.softmax(z),
        "sink logit": variants.sink_logit(z, nothing),
        "k bias": variants.k_bias(z, nothing),
        "clipped": variants.clipped_softmax(z, 0.0),
        "elastic": variants.elastic_softmax(z, torch.zeros_like(B)),
    }
    for name, weights in neutral.items():
        torch.testing.assert_close(weights, want, msg=name, **EXACT)
    torch.testing.assert_close(variants.kv_bias(z, v, nothing, v[:, :1]), want @ v, **EXACT)
    torch.testing.assert_close(variants.v_bias(want @ v, torch.zeros(D).double()), want @ v)


def test_row_sums() -> None:
    z = logits()
    sums = {name: weights(z).sum(-1) for name, weights in WEIGHTS.items()}
    torch.testing.assert_close(sums["softmax"], torch.ones(H, N).double(), **EXACT)
    for name in ("softmax1", "sink logit", "k bias", "elastic"):
        assert (sums[name] < 1).all(), name
    assert (sums["softpick"] <= 1).all()
    assert (sums["elu"] > 1).any()
    assert variants.sigmoid(z, 3.0).sum(-1).max() > 2  # not normalised


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_without_keys_extremes_and_gradients(name: str) -> None:
    """A row with everything masked is 0; huge logits stay finite; masked weights are 0; the
    gradient is that of finite differences."""
    weights = WEIGHTS[name]
    z = logits()
    z[:, 4] = float("-inf")
    assert (weights(z)[:, 4] == 0).all()
    assert (weights(z)[:, 0, 1:] == 0).all()
    for scale in (300.0, -1e4):
        extreme = weights(logits(scale=scale) + (0 if scale > 0 else scale)).isfinite()
        assert extreme.all()
    hidden = torch.ones(N, N).triu(1).bool()

    def function(free: Tensor) -> Tensor:
        return weights(free.masked_fill(hidden, float("-inf")))

    free = torch.randn(H, N, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (free,))


def test_softpick_and_clipped_softmax_from_their_definitions() -> None:
    z = logits()
    e = (z.exp() - 1) * (z > float("-inf"))
    torch.testing.assert_close(
        variants.softpick(z, 0.0), e.relu() / e.abs().sum(-1, keepdim=True), **EXACT
    )
    clipped = variants.clipped_softmax(z, -0.1, 1.05)
    torch.testing.assert_close(
        clipped, (1.15 * z.softmax(-1) - 0.1).clamp(0, 1).masked_fill(z == float("-inf"), 0)
    )
    assert (clipped == 0).sum() > (z == float("-inf")).sum()  # zeros from finite logits


def test_causality() -> None:
    """What a later key is does not change earlier rows."""
    z = logits()
    other = z.clone()
    other[:, -1] += torch.randn(N, dtype=torch.float64)
    for name, weights in WEIGHTS.items():
        assert torch.equal(weights(z)[:, :-1], weights(other)[:, :-1]), name


def test_gates() -> None:
    """Headwise and elementwise gates, the conditional gate's start, the value gate."""
    torch.manual_seed(3)
    x, o = torch.randn(N, 8).double(), torch.randn(N, H, D).double()
    headwise = torch.randn(H, 8).double()
    want = o * torch.sigmoid(x @ headwise.T)[..., None]
    torch.testing.assert_close(variants.output_gate(o, x, headwise), want, **EXACT)
    spread = headwise.repeat_interleave(D, 0)
    torch.testing.assert_close(variants.output_gate(o, x, spread), want, **EXACT)
    zero, start = torch.zeros(H, D).double(), variants.gate_bias(0.25)
    gated = variants.conditional_gate(o, o, zero, torch.full((H,), start, dtype=torch.float64))
    torch.testing.assert_close(gated, 0.25 * o, **EXACT)
    v = values()
    torch.testing.assert_close(variants.value_gate(v, torch.zeros(D, D).double()), v / 2, **EXACT)
