"""How attention sinks come about, and which variants of attention do without: bigram-backcopy.

Guo et al., arXiv 2410.13835. A sequence of 32 starts with BOS; an ordinary token is followed by a
draw from a fixed bigram table, in which each of 3 trigger tokens has probability .05; a trigger is
followed by a copy of the token before it. One attention head over learned positions adds to a
learned bigram table, so it has work at triggers only and should do nothing elsewhere: with softmax
it learns to look at BOS there, and BOS loses its value. 4000 steps of AdamW (lr 1e-2, no decay)
from embeddings of standard deviation .02, three seeds, which change weights and data.

Reported per variant, on fresh sequences: weight of BOS at ordinary and at trigger queries, sums of
rows, |v_BOS| over the mean of the other |v|, and the loss at triggers (copying is certain, so 0
can be reached). Orderings that should hold in every seed are checked and printed; after half the
steps those of the gates still fail in one seed of three. Sink logits grow with the logarithm of the
steps only, and differ from seed to seed; value gates and value biases do not remove sinks.

Every finished run is kept (`SERVAL_BENCH_DIR`). The picture:

    python -m serval.bench.sink_emergence sinks.json --picture docs/images/sink-emergence.png
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serval.bench.harness import Case, Report, Setup
from serval.bench.table import read_report
from serval.bench.training_runs import kept_path, trained
from serval.evaluate.plots import PALETTE, new_figure, png
from serval.kernels.attention_variants import reference as variants

SEEDS = 3
INITIAL = 0.02  # standard deviation of embeddings at the start, as in language models
TAU = -0.5  # where elastic softmax starts; from -1 it did not learn the task in 4000 steps


@dataclass(frozen=True)
class Task:
    """Of the experiment; see the module's text."""

    tokens: int = 24
    triggers: int = 3
    trigger_share: float = 0.05
    length: int = 32
    width: int = 32
    batch: int = 32
    steps: int = 4000
    lr: float = 1e-2
    test_sequences: int = 512

    @property
    def bos(self) -> int:
        return self.tokens

    def table(self) -> Tensor:
        """The bigram table [tokens, tokens], the same for every seed."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(self.tokens, self.tokens, generator=generator).mul(1.5).softmax(-1)
        rows[:, : self.triggers] = 0
        rows = rows / rows.sum(-1, keepdim=True) * (1 - self.triggers * self.trigger_share)
        rows[:, : self.triggers] = self.trigger_share
        return rows

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Sequences int64 [count, length + 1], BOS first; the first ordinary token is uniform."""
        table = self.table()
        out = torch.empty(count, self.length + 1, dtype=torch.int64)
        out[:, 0] = self.bos
        out[:, 1] = torch.randint(self.triggers, self.tokens, (count,), generator=generator)
        for i in range(2, self.length + 1):
            now, before = out[:, i - 1], out[:, i - 2]
            follow = torch.multinomial(table[now], 1, generator=generator)[:, 0]
            out[:, i] = torch.where(now < self.triggers, before, follow)
        return out


QUICK = Task(length=12, batch=8, steps=20, test_sequences=16)


class OneHead(nn.Module):
    """A learned bigram table plus one attention head, with one of the variants.

    Returned beside the logits: weights of real tokens [B, L, L] and the values [B, L, D].
    """

    def __init__(self, task: Task, variant: str) -> None:
        super().__init__()
        width, vocabulary = task.width, task.tokens + 1
        self.task, self.variant = task, variant
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=INITIAL)
        self.position = nn.Parameter(INITIAL * torch.randn(task.length, width))
        self.bigram = nn.Embedding(vocabulary, vocabulary)
        nn.init.zeros_(self.bigram.weight)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, vocabulary, bias=False)
        rows = {"gate headwise": 1, "gate elementwise": width}.get(variant)
        self.gate = nn.Linear(width, rows, bias=False) if rows else None
        self.value_gate = nn.Linear(width, width) if variant == "value gate" else None
        zero = torch.zeros
        self.logit = nn.Parameter(zero(())) if variant == "sink logit" else None
        self.bias_key = nn.Parameter(zero(width)) if variant in ("K bias", "KV bias") else None
        self.bias_value = nn.Parameter(zero(width)) if variant in ("KV bias", "V bias") else None
        self.tau = nn.Parameter(torch.tensor(TAU)) if variant == "elastic" else None
        self.register_buffer("hidden", torch.ones(task.length, task.length).triu(1).bool())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(tokens) + self.position  # [B, L, D]
        q, k, v = self.q(x), self.k(x), self.v(x)
        scale = q.shape[-1] ** -0.5
        z = (q @ k.transpose(1, 2) * scale).masked_fill(self.hidden, float("-inf"))
        if self.value_gate is not None:
            v = variants.value_gate(v, self.value_gate.weight, self.value_gate.bias)
        weights = self._weights(z, q * scale)
        o = weights @ v
        if self.variant == "KV bias":
            assert self.bias_value is not None
            o = o + (1 - weights.sum(-1, keepdim=True)) * self.bias_value
        elif self.bias_value is not None:
            o = variants.v_bias(o, self.bias_value)
        if self.gate is not None:
            o = variants.output_gate(o[:, :, None], x, self.gate.weight)[:, :, 0]
        return self.bigram(tokens) + self.out(o), weights, v

    def _weights(self, z: Tensor, q: Tensor) -> Tensor:
        """q: scaled queries [B, L, D]."""
        if self.variant == "softmax1":
            return variants.softmax1(z)
        if self.logit is not None:
            return variants.sink_logit(z, self.logit.view(1, 1, 1))
        if self.bias_key is not None:
            return variants.k_bias(z, (q @ self.bias_key)[..., None])
        if self.variant == "clipped softmax":
            return variants.clipped_softmax(z, -4.0 / self.task.length)
        if self.variant == "softpick":
            return variants.softpick(z)
        if self.variant == "sigmoid":
            return variants.sigmoid(z, -math.log(self.task.length))
        if self.tau is not None:
            return variants.elastic_softmax(z, self.tau.view(1, 1, 1))
        return variants.softmax(z)


VARIANTS = (
    "softmax",
    "gate headwise",
    "gate elementwise",
    "sigmoid",
    "softmax1",
    "sink logit",
    "softpick",
    "clipped softmax",
    "K bias",
    "KV bias",
    "V bias",
    "value gate",
    "elastic",
)


def train(task: Task, variant: str, seed: int) -> dict[str, Any]:
    """Train once; the metrics of the module's text, and "curve" with the losses on the way."""
    torch.manual_seed(seed)
    model = OneHead(task, variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1000 + seed)
    data = task.draw(task.batch * task.steps, generator).split(task.batch)
    curve = []
    for step, rows in enumerate(data, 1):
        logits, _, _ = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, task.steps // 20) == 0:
            curve.append([step, loss.item()])
    return {"curve": curve, **measure(model, task.draw(task.test_sequences, generator))}


@torch.no_grad()
def measure(model: OneHead, rows: Tensor) -> dict[str, float]:
    """BOS' own row counts for nothing: it has only itself to look at."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    logits, weights, values = model(tokens)
    trigger = tokens < model.task.triggers
    ordinary = ~trigger
    ordinary[:, 0] = False
    bos, sums, norms = weights[:, :, 0], weights.sum(-1), values.norm(dim=-1)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return {
        "bos_ordinary": bos[ordinary].mean().item(),
        "bos_trigger": bos[trigger].mean().item(),
        "row_sum_ordinary": sums[ordinary].mean().item(),
        "row_sum_trigger": sums[trigger].mean().item(),
        "bos_value": (norms[:, 0].mean() / norms[:, 1:].mean()).item(),
        "trigger_loss": losses[trigger].mean().item(),
        "ordinary_loss": losses[ordinary].mean().item(),
    }


# variants that should do without a sink
WITHOUT = ("gate headwise", "gate elementwise", "softmax1", "softpick", "K bias", "KV bias")
MEASURES = (
    "bos_ordinary",
    "bos_trigger",
    "row_sum_ordinary",
    "bos_value",
    "trigger_loss",
)


def orderings(runs: dict[str, list[dict[str, float]]]) -> dict[str, list[bool]]:
    """What should hold in every seed, per seed. runs: variant -> one result per seed."""
    seeds = range(len(runs["softmax"]))

    def each(check: Callable[[int], bool]) -> list[bool]:
        return [check(s) for s in seeds]

    def of(variant: str, measure: str, seed: int) -> float:
        return runs[variant][seed][measure]

    checks = {
        "softmax: |v_BOS| below 0.4 of the mean": each(
            lambda s: of("softmax", "bos_value", s) < 0.4
        ),
        "softmax: BOS gets 10 times more from ordinary than from trigger queries": each(
            lambda s: of("softmax", "bos_ordinary", s) > 10 * of("softmax", "bos_trigger", s)
        ),
    }
    for name in WITHOUT:
        if name in runs:
            checks[f"{name}: BOS gets less than half of softmax's weight"] = each(
                lambda s, name=name: (  # type: ignore[misc]
                    of(name, "bos_ordinary", s) < 0.5 * of("softmax", "bos_ordinary", s)
                )
            )
    if "sigmoid" in runs:
        checks["sigmoid: ordinary rows sum to less than 0.3"] = each(
            lambda s: of("sigmoid", "row_sum_ordinary", s) < 0.3
        )
    return checks


def collect(setup: Setup) -> list[Case]:
    """A case per variant, and one per ordering (metrics: in how many seeds it held)."""
    task = QUICK if setup.quick else Task()
    seeds = 1 if setup.quick else SEEDS
    wanted = [v for v in VARIANTS if setup.wants(v)]
    if not wanted:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from a second
    try:
        runs = {}
        for variant in dict.fromkeys(["softmax", *wanted]):
            runs[variant] = [_run(task, variant, seed, setup) for seed in range(seeds)]
    finally:
        torch.set_num_threads(threads)
    cases = []
    for variant in wanted:
        metrics: dict[str, Any] = {"seeds": seeds}
        for name in MEASURES:
            values = [run[name] for run in runs[variant]]
            metrics[name] = statistics.mean(values)
            metrics[f"{name}_range"] = [min(values), max(values)]
        cases.append(Case(variant, None, metrics=metrics))
    for name, held in orderings(runs).items():
        cases.append(Case(name, None, metrics={"held": f"{sum(held)}/{len(held)} seeds"}))
        setup.note(f"  {name}: {'yes' if all(held) else 'NO'} ({sum(held)}/{len(held)} seeds)")
    return cases


def _run(task: Task, variant: str, seed: int, setup: Setup) -> dict[str, Any]:
    facts = dataclasses.asdict(task) | {"initial": INITIAL, "variant": variant, "seed": seed}
    if variant == "elastic":
        facts["tau"] = TAU
    path = kept_path("sink-emergence", variant.replace(" ", "-"), facts)
    title = f"{variant} seed {seed}"
    return trained(path, lambda: train(task, variant, seed), title, setup.note)


def picture(report: Report) -> bytes:
    """BOS weight at ordinary queries, row sums and trigger loss of every variant: mean and range
    over seeds."""
    cases = [case for case in report.cases if "bos_ordinary" in case.metrics]
    titles = {
        "bos_ordinary": "weight of BOS where there is nothing to do",
        "row_sum_ordinary": "sum of such rows",
        "bos_value": "|v BOS| / mean |v|",
        "trigger_loss": "loss where a copy is due, nats",
    }
    figure = new_figure(width=12.5, height=4.0)
    for axis, (name, title) in zip(figure.subplots(1, 4, sharey=True), titles.items(), strict=True):
        means = [case.metrics[name] for case in cases]
        spans = [case.metrics[f"{name}_range"] for case in cases]
        errors = [[m - s[0] for m, s in zip(means, spans, strict=True)],
                  [s[1] - m for m, s in zip(means, spans, strict=True)]]  # fmt: skip
        colours = [PALETTE[4] if case.case == "softmax" else PALETTE[0] for case in cases]
        axis.barh(range(len(cases)), means, xerr=errors, color=colours, height=0.65,
                  error_kw={"lw": 1, "ecolor": "#30343f"})  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(cases)), [case.case for case in cases], fontsize=8)
        axis.grid(axis="x", color="#e4e7ec")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0, labelsize=8)
    figure.axes[0].invert_yaxis()
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the result of `serval bench sinks`.")
    parser.add_argument("result", type=Path, help="file of `serval bench sinks --json`")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    given = parser.parse_args(arguments)
    given.picture.write_bytes(picture(read_report(given.result)))
    print(f"wrote {given.picture}")


if __name__ == "__main__":
    main()
