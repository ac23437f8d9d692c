"""The tables, findings and picture of a `kv-quality` report, made from its JSON and nothing else.

    python -m serval.bench.kv_quality_report docs/results/kv-quality.json \
        --page docs/methods/oscar.md --picture docs/images/kv-quality.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serval.bench.harness import Case, Report
from serval.bench.report_command import printed_by, report_command
from serval.evaluate.plots import PALETTE

OURS = ("oscar", "oscar:zero=min")
MOST_POINTS, MOST_PERPLEXITY = 1.0, 0.02  # that a 2-bit cache may cost at window 128
# Token errors over OScaR's, regime "modalities": what a simulation of the paper's setting gave for
# KIVI and for per-token keys.
MARGIN = {"kivi": 0.58 / 0.15, "int2": 0.39 / 0.15, "int2:rotate=true": 0.39 / 0.15}


def result_table(report: Report) -> str:
    """Markdown: the model's cases, the keys' cases, what they say about the claims."""
    parts = []
    cases = [case for case in report.cases if "perplexity" in case.metrics]
    if cases:
        lines = [
            "| cache | window | bits per number | perplexity | vs full | in chunks of 256 "
            "| KL, mnats | same top | retrieval | variables |",
            "| --- |" + 9 * " ---: |",
        ]
        parts.append("\n".join(lines + [_line(case.metrics) for case in cases]))
    for regime, found in _regimes(report).items():
        lines = [
            f"Keys, regime **{regime}**, relative errors (smallest to largest draw):",
            "",
            "| cache | all tokens | short tokens | attention output |",
            "| --- | ---: | ---: | ---: |",
        ]
        parts.append("\n".join(lines + [_errors(case.metrics) for case in found]))
    parts.append("\n".join(f"- {line}" for line in findings(report)))
    parts.append(printed_by(report))
    return "\n\n".join(part for part in parts if part)


def findings(report: Report) -> list[str]:
    """The claims beside what was measured, met or not."""
    by_name = {case.case: case.metrics for case in report.cases}
    lines = []
    for kv, window in ((kv, window) for window in (128, 32) for kv in OURS):
        ours = by_name.get(f"{kv} window {window}")
        if ours is None:
            continue
        lost, worse = -ours["retrieval_change"], ours["perplexity_change"]
        served = ours["served_perplexity_change"]
        error = f" ± {ours['retrieval_error']:.1f}" if "retrieval_error" in ours else ""
        text = (
            f"`{kv}`, 2 bits, window {window}: {lost:+.1f}{error} points of retrieval lost, "
            f"perplexity {worse:+.2%}, in chunks of 256 {served:+.2%}"
        )
        if window == 128:
            verdicts = [lost <= MOST_POINTS, worse <= MOST_PERPLEXITY, served <= MOST_PERPLEXITY]
            words = ["met" if met else "not met" for met in verdicts]
            text += f" (claim: at most 1 point and 2 %): {', '.join(words)}"
        lines.append(text + ".")
        for peer in ("kivi", "int2"):
            theirs = by_name.get(f"{peer} window {window}")
            if theirs is not None:
                lines.append(
                    f"Window {window}: KL of `{kv}` is {ours['kl'] / theirs['kl']:.2f} of that "
                    f"of {peer}."
                )
    ours = by_name.get("norms modalities oscar")
    for peer, margin in MARGIN.items():
        theirs = by_name.get(f"norms modalities {peer}")
        if ours is not None and theirs is not None:
            ratio = theirs["token_error"] / ours["token_error"]
            lines.append(
                f"Keys of two norms: the mean token error of {peer} is {ratio:.1f} times that of "
                f"OScaR (claim: {margin:.1f}): {'met' if ratio >= margin else 'not met'}."
            )
    return lines


def _regimes(report: Report) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in report.cases:
        if "regime" in case.metrics:
            found.setdefault(case.metrics["regime"], []).append(case)
    return found


def _line(m: dict[str, Any]) -> str:
    cells = [
        f"`{m['kv'].split(':residual')[0].split(',residual')[0]}`",
        str(m["window"] or ""),
        f"{m['bits']:.2f}",
        f"{m['perplexity']:.3f}",
        f"{m['perplexity_change']:+.2%}",
        f"{m['served_perplexity_change']:+.2%}",
        f"{1e3 * m['kl']:.2f}",
        f"{m['same_top']:.1%}",
        *(f"{m[task]:.1%}{_spread(m, task)}" for task in ("retrieval", "variables")),
    ]
    return "| " + " | ".join(cells) + " |"


def _spread(m: dict[str, Any], name: str) -> str:
    low, high = m[f"{name}_spread"]
    return f" ({low:.0%}-{high:.0%})"


def _errors(m: dict[str, Any]) -> str:
    cells = [f"`{m['kv']}`"]
    for name in ("token", "short_token", "output"):
        low, high = m[f"{name}_error_spread"]
        cells.append(f"{m[f'{name}_error']:.3f} ({low:.3f}-{high:.3f})")
    return "| " + " | ".join(cells) + " |"


def draw(report: Report, picture: Path) -> None:
    """Draw into `picture` (PNG or SVG): KL and retrieval of the model by layout and window, and the
    token errors of keys by regime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.8), layout="constrained", dpi=110)
    left, middle, right = figure.subplots(1, 3)
    cases = [case.metrics for case in report.cases if "perplexity" in case.metrics]
    windows = sorted({m["window"] for m in cases if m["window"]})
    names = list(dict.fromkeys(_base(m) for m in cases if m["window"]))
    for index, window in enumerate(windows):
        found = {_base(m): m for m in cases if m["window"] == window}
        places = [i + 0.36 * (index - (len(windows) - 1) / 2) for i in range(len(names))]
        chosen = [(x, found[name]) for x, name in zip(places, names, strict=True) if name in found]
        colour, label = PALETTE[index % len(PALETTE)], f"window {window}"
        xs = [x for x, _ in chosen]
        left.bar(xs, [1e3 * m["kl"] for _, m in chosen], 0.34, color=colour, label=label)
        middle.bar(xs, [100 * m["retrieval"] for _, m in chosen], 0.34, color=colour, label=label)
    for m in cases:
        if m["kv"] == "full":
            middle.axhline(100 * m["retrieval"], color="#667085", linewidth=1, linestyle="--")
    left.set_yscale("log")
    left.set_ylabel("KL from exact attention, mnats")
    middle.set_ylabel("retrieval, % (dashed: full)")
    for panel in (left, middle):
        panel.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    left.legend(frameon=False)
    regimes = _regimes(report)
    kinds = list(dict.fromkeys(c.metrics["kv"] for found in regimes.values() for c in found))
    for index, (regime, some) in enumerate(regimes.items()):
        by_kind = {c.metrics["kv"]: c.metrics["token_error"] for c in some}
        right.plot(
            range(len(kinds)), [by_kind.get(kind) for kind in kinds], "o-", label=regime,
            color=PALETTE[(index + 2) % len(PALETTE)], markersize=4, linewidth=1,
        )  # fmt: skip
    right.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8)
    right.set_ylabel("mean relative error of a key")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for panel in (left, middle, right):
        panel.grid(axis="y", color="#e4e7ec", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Caches of few bits: the shipped model, and keys of unequal norms", fontsize=11)
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f".writing-{picture.name}")
    figure.savefig(temporary, format=picture.suffix.lstrip(".") or "png")
    temporary.replace(picture)


def _base(m: dict[str, Any]) -> str:
    """The layout without its window."""
    return m["kv"].split(":residual")[0].split(",residual")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's text."""
    report_command(["kv-quality"], result_table, draw, arguments)


if __name__ == "__main__":
    main()
