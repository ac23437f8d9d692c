"""Every metric, computed without the attention matrix, against its formula on the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serval.analyze import hidden, metrics
from serval.analyze.attention import Attention, HookedMemory, attend
from serval.analyze.survey import Surveyor, sink_rate
from serval.errors import ConfigError
from serval.models.batch import PackedBatch
from serval.models.memory import CausalMemory
from tests.analyze.models import KINDS, decoder_of, dense_weights, tokens_of

CLOSE = {"rtol": 1e-3, "atol": 2e-5}


def attention(
    length: int = 40, window: int | None = None, sinks: bool = False, seed: int = 0
) -> tuple[Attention, Tensor]:
    """One layer over one document, and its attention matrix [H, T, T]."""
    torch.manual_seed(seed)
    q, k, v = 2 * torch.randn(length, 4, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 6)
    bias = torch.randn(4) if sinks else None
    o = attend(q, k, v, 0.4, 0, window, bias)
    seen = Attention(0, 0, q, k, v, 0.4, 0, window, bias, o)
    return seen, dense_weights(q, k, 0.4, window, bias)


CASES = [(None, False), (7, False), (None, True), (7, True)]


@pytest.mark.parametrize(("window", "sinks"), CASES)
def test_metrics_equal_the_matrix(window: int | None, sinks: bool) -> None:
    a, weights = attention(window=window, sinks=sinks)
    length = weights.shape[-1]
    visible = (dense_weights(a.q, 0 * a.k, 0.4, window) > 0).double()  # [H, T, T]
    alpha = weights.sum(1) / visible.sum(1)
    torch.testing.assert_close(metrics.importance(a).double(), alpha, **CLOSE)
    short = weights[:, :16, :16].sum(1) / visible[:, :16, :16].sum(1)
    torch.testing.assert_close(metrics.importance(a, 16).double(), short, **CLOSE)
    plain = dense_weights(a.q, a.k, 0.4, window)
    again = metrics.importance(a, renormalise=True)
    torch.testing.assert_close(again.double(), plain.sum(1) / visible.sum(1), **CLOSE)
    for key in (0, 5):
        later = weights[:, key + 1 :, key].sum(-1) / visible[:, key + 1 :, key].sum(-1)
        torch.testing.assert_close(metrics.sink_mass(a, key).double(), later, **CLOSE)
    sums = weights.sum(-1).T
    torch.testing.assert_close(metrics.row_sums(a).double(), sums, **CLOSE)
    rest = (1 - weights.sum(-1)).clamp(min=0)
    entropy = -(torch.xlogy(weights, weights).sum(-1) + torch.xlogy(rest, rest)).T
    torch.testing.assert_close(metrics.entropy(a).double(), entropy, rtol=1e-3, atol=1e-4)
    assert metrics.entropy(a).shape == (length, 4)


def test_sink_rate_thresholds_before_averaging() -> None:
    """Gu et al.'s order: a head at 0.4 and one at 0.0 are one hit in two, not a mean of 0.2."""
    alpha = torch.tensor([[0.4, 0.1], [0.0, 0.1]])
    assert metrics.sink_hits(alpha).float().mean(0).tolist() == [0.5, 0.0]
    assert (alpha.mean(0) > metrics.EPSILON).sum() == 0


def test_received_sinks_and_tau() -> None:
    mass = torch.ones(2, 32)
    mass[0, 3] = 20
    assert metrics.received_sinks(mass, 8.0).nonzero().tolist() == [[0, 3]]
    assert metrics.received_sinks(mass).nonzero().tolist() == [[0, 3]]  # tau = 32 / 8
    for tau in (32.0, 0.5, 1000.0):
        with pytest.raises(ConfigError, match="between 1 and 32"):
            metrics.received_sinks(mass, tau)


def test_values_keys_and_states() -> None:
    a, _ = attention()
    norms = a.v.norm(dim=-1)
    torch.testing.assert_close(metrics.value_drain(a, 3), norms[3] / norms.median(0).values)
    mean = a.k.mean(0)
    cosine = (a.k * mean).sum(-1) / (a.k.norm(dim=-1) * mean.norm(dim=-1))
    torch.testing.assert_close(metrics.key_cosine(a), cosine.T)
    states = torch.randn(9, 16)
    ortho = metrics.orthorank(states)
    assert ortho[0] == pytest.approx(0, abs=1e-6)
    want = 1 - (states[4] @ states[0] / states[4].norm() / states[0].norm()).abs()
    assert ortho[4].item() == pytest.approx(want.item(), abs=1e-6)
    up = torch.tensor([[1.0, 2.0, 5.0, 9.0]])
    assert metrics.spearman(up, up.exp()).item() == pytest.approx(1)
    assert metrics.spearman(up, -up).item() == pytest.approx(-1)


def test_hidden_state_statistics() -> None:
    torch.manual_seed(0)
    gauss = torch.randn(200, 512)
    assert hidden.kurtosis(gauss).mean().item() == pytest.approx(3, abs=0.1)
    states = 0.05 * gauss
    states[7, 11] = -900.0
    states[7, 12] = 90.0  # large beside the median, yet below 100
    found = hidden.describe(states)
    assert found.massive == 1
    first = found.largest[0]
    assert (first.token, first.channel, first.value) == (7, 11, -900.0)
    assert found.peak == 900
    assert found.channels[12] == 90
    x = states[7].double()
    fourth = (x - x.mean()).pow(4).mean() / (x.var(unbiased=False).square() + 1e-6)
    assert hidden.kurtosis(states)[7].item() == pytest.approx(fourth.item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_observing_changes_nothing_and_sees_every_layer(kind: str) -> None:
    """Whole documents, two at a time, and one that grows token by token; per-head sizes."""
    decoder = decoder_of(kind)
    tokens = tokens_of(30)
    want = decoder(tokens, PackedBatch.from_lengths([18, 12]))
    layers: dict[int, list[int]] = {}

    def look(a: Attention) -> None:
        layers.setdefault(a.layer, []).append(a.document)
        assert a.mass.shape == (4, a.k.shape[0])
        torch.testing.assert_close(a.mass.sum(-1), metrics.row_sums(a).sum(0), rtol=1e-4, atol=1e-4)

    batch = HookedMemory([look]).batch([18, 12])
    torch.testing.assert_close(decoder(tokens, batch), want, rtol=1e-4, atol=1e-4)
    assert layers == {n: [0, 1] for n in range(len(decoder.trunk_attention_layers))}
    memory = HookedMemory()
    parts = [decoder(tokens[:5], memory.batch([5]))]
    parts += [decoder(tokens[i : i + 1], memory.batch([1])) for i in range(5, 18)]
    torch.testing.assert_close(torch.cat(parts), want[:18], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_survey_of_a_decoder(kind: str) -> None:
    """Per-layer, per-head means over sequences agree with the matrices."""
    decoder = decoder_of(kind)
    sequences = [tokens_of(24, seed).tolist() for seed in (1, 2)]
    surveyor = Surveyor(decoder)
    for tokens in sequences:
        surveyor.add(tokens)
    survey = surveyor.result()
    matrices: dict[int, list[Tensor]] = {}

    class Recording(CausalMemory):
        def attend(self, layer, q, k, v, scale, *, window=None, sinks=None, weights=None):
            dense = dense_weights(q, k, scale, window, sinks)
            if weights is not None:
                z = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale
                z = z.masked_fill(dense == 0, float("-inf"))
                # over values that are unit vectors, the output is the weights
                values = torch.eye(len(k)).expand(2, -1, -1)
                if kind == "kv bias":  # whose value is 0 here, of the model's width
                    column = weights.column(q.transpose(0, 1), scale)
                    dense = torch.cat([z, column], -1).double().softmax(-1)[..., :-1]
                else:
                    dense = weights(z, q.transpose(0, 1), values, scale).double()
            matrices.setdefault(layer, []).append(dense)
            return super().attend(
                layer, q, k, v, scale, window=window, sinks=sinks, weights=weights
            )

    for n, tokens in enumerate(sequences):
        batch = PackedBatch.from_lengths([24])
        batch.memory = Recording([0, 24])
        final = decoder(torch.tensor(tokens), batch)
        torch.testing.assert_close(survey.final[n], final, rtol=1e-4, atol=1e-4)
    specs = decoder.trunk_attention_layers
    for layer, spec in enumerate(specs):
        seen = min(spec.window or 24, 24) - 1
        first = torch.stack([m[:, 1:, 0].sum(-1) / seen for m in matrices[layer]]).mean(0)
        torch.testing.assert_close(survey.heads.first_token[layer].double(), first, **CLOSE)
    assert survey.heads.row_sum.shape == (len(specs), 4)
    normal = kind in ("gqa", "mla", "moe", "shortcut")
    assert bool((survey.heads.row_sum < 0.999).any()) != normal
    sums = torch.stack([m.sum(-1).mean(-1) for m in matrices[0]]).mean(0)
    torch.testing.assert_close(survey.heads.row_sum[0].double(), sums, rtol=1e-4, atol=1e-4)
    assert len(survey.layers) == decoder.config.num_hidden_layers
    if kind in ("softpick", "sigmoid"):  # Gu et al.: rows over their sums
        matrices = {
            n: [m / (m.sum(-1, keepdim=True) + 1e-8) for m in found]
            for n, found in matrices.items()
        }
    rates = sink_rate(decoder, sequences, epsilon=0.1)
    hits = torch.stack(
        [
            torch.stack([m[:, :, 0].sum(-1) / min(s.window or 24, 24) > 0.1 for m in matrices[n]])
            for n, s in enumerate(specs)
        ]
    )
    torch.testing.assert_close(rates, 100 * hits.float().mean(1))


def test_hidden_states_are_seen_after_each_block() -> None:
    decoder = decoder_of("gqa")
    seen: dict[int, Tensor] = {}
    with hidden.watch_layers(decoder, lambda layer, x: seen.update({layer: x})):
        before = decoder(tokens_of(10), PackedBatch.from_lengths([10]), pre_norm=True)
    torch.testing.assert_close(seen[2], before)
    assert sorted(seen) == [0, 1, 2]
    decoder(tokens_of(10, 9), PackedBatch.from_lengths([10]))  # no longer watched
    torch.testing.assert_close(seen[2], before)
