"""One pass over text that gathers every attention-sink metric of a model, per layer and head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from serval.analyze import hidden, interpret, metrics
from serval.analyze.attention import Attention, HookedMemory
from serval.analyze.hidden import HiddenStats
from serval.analyze.interpret import Circuits
from serval.models.decoder import Decoder

POSITIONS = 32  # of the profile of importance by position


@dataclass
class HeadMetrics:
    """Means over sequences, each [layers, heads] (attention layers; key-value heads where the
    comment says so).

    first_token: mean weight of the first token; strongest: of whichever token gets most;
    entropy: nats per row; spread: entropy over log of the number of visible keys; row_sum;
    received: keys above tau times the mean received mass; value_drain, key_cosine: of the first
    token, per key-value head; keydiff: rank correlation of -cos(k, mean k) with received mass;
    bias_*: see `interpret.BiasView`.
    """

    first_token: Tensor
    strongest: Tensor
    entropy: Tensor
    spread: Tensor
    row_sum: Tensor
    received: Tensor
    value_drain: Tensor
    key_cosine: Tensor
    keydiff: Tensor
    bias_spread: Tensor
    bias_share: Tensor
    bias_correlation: Tensor

    @property
    def dormant(self) -> Tensor:
        """bool [layers, heads]."""
        return metrics.dormant(self.first_token)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, NaN as None."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass
class Survey:
    """What was found. profile: mean weight by layer and position [layers, POSITIONS], over the
    queries that see it; tokens: (token id, mean of the strongest layer and head's importance,
    occurrences); alpha: importance per sequence [layers, heads, T]; layers: hidden-state
    statistics [layer][sequence]; orthorank: mean 1 - |cos(h_t, h_first)| per layer; final: final
    hidden states per sequence."""

    heads: HeadMetrics
    profile: Tensor
    tokens: list[tuple[int, float, int]]
    alpha: list[Tensor]
    layers: list[list[HiddenStats]]
    orthorank: list[float]
    circuits: Circuits
    final: list[Tensor] = field(repr=False, default_factory=list)


class Surveyor:
    """Gathers metrics sequence by sequence.

    tau: of received-mass sinks (None: T / 8).
    """

    def __init__(self, decoder: Decoder, tau: float | None = None) -> None:
        self.decoder, self.tau = decoder, tau
        self._rows: dict[int, list[dict[str, Tensor]]] = {}
        self._alpha: list[dict[int, Tensor]] = []
        self._layers: dict[int, list[HiddenStats]] = {}
        self._ortho: dict[int, list[float]] = {}
        self._peak: Counter[int] = Counter()
        self._count: Counter[int] = Counter()
        self._final: list[Tensor] = []
        self._circuits = Circuits()

    @torch.inference_mode()
    def add(self, tokens: Sequence[int]) -> None:
        """Run the model on one sequence of at least two tokens and note everything."""
        alphas: dict[int, Tensor] = {}

        def look(attention: Attention) -> None:
            row, alpha = self._measure(attention)
            self._rows.setdefault(attention.layer, []).append(row)
            alphas[attention.layer] = alpha

        def see(layer: int, states: Tensor) -> None:
            self._layers.setdefault(layer, []).append(hidden.describe(states))
            mean = metrics.orthorank(states)[1:].mean().item()
            self._ortho.setdefault(layer, []).append(mean)

        device = self.decoder.norm.weight.device
        batch = HookedMemory([look]).batch([len(tokens)], device)
        with (
            hidden.watch_layers(self.decoder, see),
            interpret.watch_circuits(self.decoder, self._circuits),
        ):
            final = self.decoder(torch.tensor(list(tokens), device=device), batch)
        self._final.append(final)
        self._alpha.append(alphas)
        best = torch.stack([alpha.amax(0) for alpha in alphas.values()]).amax(0)
        half = max(1, len(tokens) // 2)  # the last tokens are seen by few queries
        for position, token in enumerate(tokens[:half]):
            self._peak[token] += best[position].item()  # type: ignore[assignment]
            self._count[token] += 1

    def _measure(self, a: Attention) -> tuple[dict[str, Tensor], Tensor]:
        alpha = metrics.importance(a)
        heads = a.q.shape[1]
        group = heads // a.k.shape[1]
        entropy = metrics.entropy(a)
        length = a.q.shape[0]
        visible = torch.arange(1, length + 1, dtype=torch.float32, device=alpha.device)
        if a.window is not None:
            visible = visible.clamp(max=a.window)
        room = visible.log()[1:, None]
        cosine = metrics.key_cosine(a)
        view = interpret.bias_view(a)
        half = max(1, length // 2)
        row = {
            "first_token": metrics.sink_mass(a),
            "strongest": alpha[:, :half].amax(-1),
            "entropy": entropy.mean(0),
            "spread": (entropy[1:] / room).mean(0),
            "row_sum": metrics.row_sums(a).mean(0),
            "received": metrics.received_sinks(a.mass, self.tau).sum(-1).float(),
            "value_drain": metrics.value_drain(a),
            "key_cosine": cosine[:, 0],
            "keydiff": metrics.spearman(-cosine.repeat_interleave(group, 0), alpha),
            "bias_spread": view.spread,
            "bias_share": view.share,
            "bias_correlation": view.correlation,
        }
        return {name: value.cpu() for name, value in row.items()}, alpha.cpu()

    def result(self) -> Survey:
        """Means over the sequences added."""
        layers = sorted(self._rows)
        names = HeadMetrics.__dataclass_fields__
        means = {
            name: torch.stack(
                [torch.stack([row[name] for row in self._rows[n]]).mean(0) for n in layers]
            )
            for name in names
        }
        alpha = [torch.stack([found[n] for n in layers]) for found in self._alpha]
        shortest = min(min(a.shape[-1] for a in alpha), POSITIONS)
        profile = torch.stack([a[..., :shortest].mean(1) for a in alpha]).mean(0)
        ranked = sorted(
            ((t, self._peak[t] / n, n) for t, n in self._count.items()), key=lambda row: -row[1]
        )
        return Survey(
            heads=HeadMetrics(**means),
            profile=profile,
            tokens=ranked,
            alpha=alpha,
            layers=[self._layers[n] for n in sorted(self._layers)],
            orthorank=[sum(v) / len(v) for _, v in sorted(self._ortho.items())],
            circuits=self._circuits,
            final=self._final,
        )


@torch.inference_mode()
def sink_rate(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    epsilon: float = metrics.EPSILON,
    key: int = 0,
) -> Tensor:
    """Sink rate of key `key` per layer and head, in percent: [layers, heads] (Gu et al.).

    The share of sequences in which alpha_key exceeds epsilon; the model's rate is the mean. Rows of
    attention that does not normalise them (sigmoid, softpick, clipped, elastic) are divided by
    their sums first, as Gu et al. do; what goes to a silent logit or a bias key stays there.
    """
    hits: dict[int, list[Tensor]] = {}

    def look(attention: Attention) -> None:
        alpha = metrics.importance(attention, renormalise=not attention.normalised)
        hits.setdefault(attention.layer, []).append(metrics.sink_hits(alpha, epsilon)[:, key])

    device = decoder.norm.weight.device
    for a in range(0, len(sequences), 16):
        part = sequences[a : a + 16]
        flat = torch.tensor([t for tokens in part for t in tokens], device=device)
        decoder(flat, HookedMemory([look]).batch([len(tokens) for tokens in part], device))
    return torch.stack([100 * torch.stack(hits[n]).float().mean(0).cpu() for n in sorted(hits)])


def _plain(values: Tensor) -> list[Any]:
    return [
        _plain(row) if row.dim() else (None if bool(row.isnan()) else round(row.item(), 6))
        for row in values
    ]
