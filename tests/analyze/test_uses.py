"""Redistribution, ZeroTuning, the no-op test, bias view, circuits, preserving selectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from serval.analyze import interpret, preserve, redistribute
from serval.analyze.attention import Attention, HookedMemory, attend
from serval.analyze.redistribute import MaskKeys, Redistribute, Where, ZeroTuning, ZeroValue
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from tests.analyze.models import decoder_of, tokens_of
from tests.analyze.test_metrics import attention

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def output(a: Attention, weights: Tensor, values: Tensor | None = None) -> Tensor:
    """weights [H, T, T] over the layer's values."""
    v = a.for_queries(a.v if values is None else values).double()
    return torch.einsum("hqk,khd->qhd", weights, v).float()


def rows_of(hook: object, a: Attention) -> Tensor:
    """The row sums that a hook's weights have: its output over values of one."""
    ones = torch.ones_like(a.v)
    seen = Attention(a.layer, 0, a.q, a.k, ones, a.scale, 0, a.window, a.sinks,
                     attend(a.q, a.k, ones, a.scale, 0, a.window, a.sinks))  # fmt: skip
    return hook(seen)[..., 0]  # type: ignore[operator]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("targets", [None, [3, 4, 9, 20]])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.3, 0.7), (0.5, 0.0)])
def test_redistribution_is_equation_19(
    window: int | None, targets: list[int] | None, alpha: float, beta: float
) -> None:
    """Against the matrix; alpha + beta = 1 keeps the row sums."""
    a, weights = attention(window=window)
    length, sinks = weights.shape[-1], [0, 2]
    hook = Redistribute(alpha, beta, sinks, targets)
    seen = torch.ones(length, length).tril().bool()
    if window is not None:
        seen &= ~torch.ones(length, length).tril(-window).bool()
    is_target = torch.zeros(length).bool()
    is_target[targets if targets is not None else list(range(length))] = True
    is_target[sinks] = False
    allowed = seen & is_target
    count = allowed.sum(-1)
    want = weights.clone()
    moved = weights[..., sinks].sum(-1)  # [H, T]
    want[..., sinks] *= alpha
    want += beta * moved[..., None] * allowed.double() / count.clamp(min=1)[:, None]
    if beta:
        want[:, count == 0] = weights[:, count == 0]
    torch.testing.assert_close(hook(a), output(a, want), **CLOSE)
    sums = rows_of(hook, a)
    torch.testing.assert_close(sums.double(), want.sum(-1).T, **CLOSE)
    if alpha + beta == 1:
        torch.testing.assert_close(sums, torch.ones_like(sums), **CLOSE)


def test_presets() -> None:
    assert (redistribute.var().alpha, redistribute.var().beta) == (0, 1)
    assert (redistribute.vasparse(0.4).alpha, redistribute.vasparse().beta) == (0.4, 0)
    with pytest.raises(ConfigError, match="alpha"):
        Redistribute(alpha=1.5)


@pytest.mark.parametrize("b", [-3.0, 0.0, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_zero_tuning_is_a_logit_shift(b: float, sinks: bool) -> None:
    """The closed form against attention whose first logit is b higher; float64 exact."""
    a, weights = attention(sinks=sinks)
    shift = torch.zeros(a.k.shape[0])
    shift[0] = b
    torch.testing.assert_close(ZeroTuning(b)(a), a.attend(a.k, a.v, shift), **CLOSE)
    first = weights[..., :1]
    denominator = 1 + first * math.expm1(b)
    want = weights / denominator
    want[..., :1] *= math.exp(b)
    lse = torch.randn(weights.shape[1], 4).double()
    exact, moved = redistribute.zero_tuned(
        torch.einsum("hqk,khd->qhd", weights, a.for_queries(a.v).double()),
        lse, weights[..., 0].T, a.for_queries(a.v[:1])[0].double(), b,
    )  # fmt: skip
    torch.testing.assert_close(
        exact, torch.einsum("hqk,khd->qhd", want, a.for_queries(a.v).double()),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    torch.testing.assert_close(moved, lse + denominator[..., 0].log().T, rtol=1e-12, atol=1e-12)
    per_head = ZeroTuning(torch.tensor([b, 0.0, 0.0, 0.0]))(a)
    torch.testing.assert_close(per_head[:, 0], ZeroTuning(b)(a)[:, 0], **CLOSE)
    torch.testing.assert_close(per_head[:, 1:], a.o[:, 1:], **CLOSE)
    with pytest.raises(ConfigError, match="finite"):
        ZeroTuning(float("-inf"))(a)


def test_values_taken_away_and_keys_masked() -> None:
    a, weights = attention()
    values = a.v.clone()
    values[[0, 3]] = 0
    torch.testing.assert_close(ZeroValue((0, 3))(a), output(a, weights, values), **CLOSE)
    masked = weights.clone()
    masked[..., [0, 3]] = 0
    masked /= masked.sum(-1, keepdim=True).clamp(min=1e-12)
    masked[:, 0, 0] = 1.0  # sees nothing else
    torch.testing.assert_close(MaskKeys((0, 3))(a), output(a, masked), **CLOSE)


def test_masking_a_key_that_holds_everything() -> None:
    """A sink with all but 1e-12 of the rows: what is left must not be noise."""
    a, _ = attention()
    a.q[..., 0], a.k[:, :, 0] = 1.0, 0.0
    a.k[0, :, 0] = 70.0
    a.o = attend(a.q, a.k, a.v, 0.4, 0)
    want = torch.cat([a.o[:1], attend(a.q[1:], a.k[1:], a.v[1:], 0.4, 0)])
    torch.testing.assert_close(MaskKeys((0,))(a), want, **CLOSE)


def test_only_the_chosen_heads_and_layers_change() -> None:
    a, _ = attention()
    changed = ZeroValue(where=Where(heads=[1, 2]))(a)
    assert changed is not None
    assert torch.equal(changed[:, [0, 3]], a.o[:, [0, 3]])
    assert not torch.equal(changed[:, 1], a.o[:, 1])
    assert ZeroValue(where=Where(layers=[4]))(a) is None


@pytest.mark.parametrize("hook", [ZeroTuning(-2.0), redistribute.var(), MaskKeys((0,))])
def test_in_a_decoder_and_token_by_token(hook: object) -> None:
    """The context manager changes plain passes, and undoes it; cached steps give the same."""
    decoder, tokens = decoder_of("gqa"), tokens_of(16)
    plain = decoder(tokens, PackedBatch.from_lengths([16]))
    with redistribute.applied(decoder, [hook]):  # type: ignore[list-item]
        changed = decoder(tokens, PackedBatch.from_lengths([16]))
        with pytest.raises(ConfigError, match="HookedMemory"):
            decoder(tokens, HookedMemory().batch([16]))
    assert (changed - plain).abs().max() > 0.01
    torch.testing.assert_close(decoder(tokens, PackedBatch.from_lengths([16])), plain)
    memory = HookedMemory([hook])  # type: ignore[list-item]
    steps = [decoder(tokens[:9], memory.batch([9]))]
    steps += [decoder(tokens[i : i + 1], memory.batch([1])) for i in range(9, 16)]
    torch.testing.assert_close(torch.cat(steps), changed, rtol=1e-3, atol=1e-3)
    found = redistribute.greedy(decoder, tokens[:9].tolist(), 5, [hook])  # type: ignore[list-item]
    known = tokens[:9].tolist()
    for token in found:
        with redistribute.applied(decoder, [hook]):  # type: ignore[list-item]
            hidden = decoder(torch.tensor(known), PackedBatch.from_lengths([len(known)]))
        assert token == int(decoder.logits(hidden[-1:]).argmax())
        known.append(token)


def test_bias_view() -> None:
    a, weights = attention()
    view = interpret.bias_view(a)
    added = weights[:, 1:, :1].permute(1, 0, 2) * a.for_queries(a.v[:1])[0].double()  # [n, H, Dv]
    mean = added.mean(0)
    torch.testing.assert_close(view.norm.double(), mean.norm(dim=-1), **CLOSE)
    spread = (added - mean).square().sum(-1).mean(0).sqrt() / mean.norm(dim=-1)
    torch.testing.assert_close(view.spread.double(), spread, **CLOSE)
    size = a.o[1:].norm(dim=-1)
    pair = torch.stack([weights[0, 1:, 0].float(), size[:, 0]])
    assert view.correlation[0].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-4)


def test_divergence() -> None:
    decoder = decoder_of("gqa")
    before = interpret.hidden_states(decoder, tokens_of(60).tolist())
    after = before + 0.5 * torch.randn_like(before)
    found = interpret.divergence(decoder, before, after)
    p, q = (decoder.logits(x).double().log_softmax(-1) for x in (before, after))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.same_top == pytest.approx(same)
    total = interpret.Divergence()
    total.add(found)
    total.add(interpret.divergence(decoder, before, before))
    assert total.kl == pytest.approx(found.kl / 2)
    assert total.rows == 2 * found.rows


def test_super_weight_is_found() -> None:
    """One weight planted in a down projection makes the spike: its share is near 1."""
    decoder = decoder_of("gqa")
    projection = decoder.layers[1].mlp.down_proj
    assert isinstance(projection, nn.Linear)
    with interpret.watch_circuits(decoder) as before:
        decoder(tokens_of(20), PackedBatch.from_lengths([20]))
    channel = before.spikes[1].input_channel
    projection.weight[5, channel] = 1e4
    with interpret.watch_circuits(decoder) as found:
        decoder(tokens_of(20), PackedBatch.from_lengths([20]))
    spike = found.spikes[1]
    assert (spike.output_channel, spike.input_channel) == (5, channel)
    assert spike.weight == 1e4
    assert spike.share == pytest.approx(1, abs=0.01)


def test_super_experts_are_found() -> None:
    decoder = decoder_of("moe")
    decoder.layers[2].mlp.experts.down_proj[3] *= 1e3
    with interpret.watch_circuits(decoder) as found:
        decoder(tokens_of(60), PackedBatch.from_lengths([60]))
    assert sorted(found.experts) == [0, 1, 2]
    assert [(layer, expert) for layer, expert, _ in found.super_experts()] == [(2, 3)]


def test_selectors() -> None:
    assert preserve.first_tokens(4, 2) == [0, 1]
    peaks = torch.ones(6, 20)
    peaks[2:, 7], peaks[3:, 11] = 90.0, 100.0  # emerge after blocks 2 and 3
    assert preserve.outlier_channels(peaks, 2) == (2, [7, 11])
    hidden = torch.randn(50, 20)
    hidden[[3, 30], 7] = -80.0
    assert preserve.outlier_tokens(hidden, [7, 11], 2) == [3, 30]
    alpha = torch.full((4, 2, 64), 0.01)
    alpha[2, 0, 0] = alpha[3, 1, 0] = 0.5  # some head of every deep layer
    alpha[2, 0, 9] = 0.9  # one layer only
    alpha[:, :, 60] = 0.9  # seen by four queries
    alpha[0, :, 20] = 0.9  # layer 0 is local
    assert preserve.attended_tokens(alpha) == [0]
    alpha[2:, 0, 5:25] = 0.4
    assert len(preserve.attended_tokens(alpha)) == 8


def test_sink_preserving_quantisation() -> None:
    """Kept tokens are exact and leave the others' groups alone; more bits, less error."""
    torch.manual_seed(0)
    k, v = torch.randn(70, 2, 40), torch.randn(70, 2, 40)
    k[3] *= 100  # an outlier token spoils its channel groups
    for quantiser in preserve.QUANTISERS:
        kept = preserve.SinkPreserving(2, [3, 64], quantiser)
        bare = preserve.SinkPreserving(2, (), quantiser)
        got, plain = kept(0, 0, 0, k, v), bare(0, 0, 0, k, v)
        for x, y in zip(got, (k, v), strict=True):
            assert torch.equal(x[[3, 64]], y[[3, 64]])
            assert not torch.equal(x[10], y[10])
        others = [t for t in range(70) if t != 3]
        errors = [float((x[others] - k[others]).norm()) for x in (got[0], plain[0])]
        if quantiser == "kivi":
            assert errors[0] < 0.4 * errors[1]
        fine = preserve.SinkPreserving(8, (), quantiser)(0, 0, 0, k, v)[1]
        assert (fine - v).abs().max() < 0.02
    later = preserve.SinkPreserving(2, {1: [12]})(0, 1, 10, k[10:20], v[10:20])
    assert torch.equal(later[0][2], k[12])
    with pytest.raises(ConfigError, match="kivi, per-token"):
        preserve.SinkPreserving(2, (), "other")


def test_a_store_quantises_what_layers_attend_to() -> None:
    decoder, tokens = decoder_of("gqa"), tokens_of(40).tolist()
    exact = interpret.hidden_states(decoder, tokens)
    everything = preserve.SinkPreserving(2, range(40))
    torch.testing.assert_close(interpret.hidden_states(decoder, tokens, store=everything), exact)
    rough = interpret.hidden_states(decoder, tokens, store=preserve.SinkPreserving(2))
    fine = interpret.hidden_states(decoder, tokens, store=preserve.SinkPreserving(8))
    assert (fine - exact).norm() < 0.2 * (rough - exact).norm()
