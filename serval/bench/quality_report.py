"""The table and the picture of a `w4a8-quality` report, made from its JSON and nothing else.

    python -m serval.bench.quality_report docs/results/w4a8-quality.json \
        --page docs/methods/w4a8-quality.md --picture docs/images/w4a8-quality.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serval.bench.harness import Case, Report
from serval.bench.report_command import printed_by, report_command
from serval.evaluate.plots import PALETTE

GRANULARITIES = ("channel", "g128", "g32")


def result_table(report: Report) -> str:
    """Markdown: one table per model, one line per recipe and granularity; what integer scales
    change stands beside the float scales they were made from."""
    parts = []
    for model in _models(report):
        cases = [case for case in report.cases if case.metrics["model"] == model]
        lines = [
            f"**{model}**",
            "",
            "| recipe | weights, inputs | scales per | perplexity | vs float | KL, mnats "
            "| same top | retrieval | layer error | perplexity with integer scales |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        integer = {_key(case): case for case in cases if case.metrics["scales"] == "integer"}
        for case in cases:
            if case.metrics["scales"] != "integer":
                lines.append(_line(case, integer.get(_key(case))))
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {line}" for line in findings(report)))
    parts.append(printed_by(report))
    return "\n\n".join(parts)


def findings(report: Report) -> list[str]:
    """What the numbers say about the claims, computed from the cases."""
    changes = [
        (abs(case.metrics["integer_change"]), case.case)
        for case in report.cases
        if "integer_change" in case.metrics
    ]
    lines = []
    if changes:
        largest, where = max(changes)
        inside = sum(change < 1e-3 for change, _ in changes)
        lines.append(
            f"Integer scales change perplexity by at most {largest:.3%} ({where}); in {inside} of "
            f"{len(changes)} cases by less than 0.1 % (means over calibration seeds)."
        )
    for model in _models(report):
        lines += _model_findings(model, report)
    return lines


def _model_findings(model: str, report: Report) -> list[str]:
    cases = [c for c in report.cases if c.metrics["model"] == model]
    four_bit = [c for c in cases if c.metrics["weights"] == "w4a8"]
    lines = []
    found = {(c.metrics["recipe"], c.metrics["granularity"], c.metrics["scales"]): c for c in cases}
    rtn, odyssey = (found.get((name, "channel", "float")) for name in ("rtn", "odyssey"))
    if rtn is not None and odyssey is not None:
        ours, theirs = odyssey.metrics, rtn.metrics
        lines.append(
            f"{model}: per channel, Odyssey's KL is {ours['kl'] / theirs['kl']:.2f} of "
            f"round-to-nearest's (seeds {_range(ours['kl_spread'], 1e3, 1)} against "
            f"{1e3 * theirs['kl']:.1f} mnats), perplexity {ours['perplexity_change']:+.2%} "
            f"against {theirs['perplexity_change']:+.2%} of float."
        )
    if four_bit:
        best = min(four_bit, key=lambda c: c.metrics["kl"])
        lines.append(
            f"{model}: the least KL with 4-bit weights and 8-bit inputs has {best.case}: "
            f"perplexity {best.metrics['perplexity_change']:+.2%} of float."
        )
    return lines


def _models(report: Report) -> list[str]:
    return list(dict.fromkeys(case.metrics["model"] for case in report.cases))


def _key(case: Case) -> tuple[str, ...]:
    return tuple(case.metrics[name] for name in ("recipe", "weights", "granularity"))


def _line(case: Case, integer: Case | None) -> str:
    m = case.metrics
    cells = [
        m["recipe"],
        m["weights"],
        m["granularity"],
        f"{m['perplexity']:.3f}{_spread(m, 'perplexity', 1, 3)}",
        f"{m['perplexity_change']:+.2%}",
        f"{1e3 * m['kl']:.2f}{_spread(m, 'kl', 1e3, 2)}",
        f"{m['same_top']:.1%}",
        f"{m['retrieval']:.1%}{_spread(m, 'retrieval', 100, 0)}",
        f"{m['layer_error']:.1%}",
        "" if integer is None else _integer(integer),
    ]
    return "| " + " | ".join(cells) + " |"


def _integer(case: Case) -> str:
    m = case.metrics
    spread = m.get("integer_change_spread")
    seeds = "" if spread is None else f", {spread[0]:+.2%} to {spread[1]:+.2%}"
    return f"{m['perplexity']:.3f} ({m['integer_change']:+.3%}{seeds})"


def _spread(metrics: dict[str, Any], name: str, scale: float, digits: int) -> str:
    spread = metrics.get(f"{name}_spread")
    return "" if spread is None else f" ({_range(spread, scale, digits)})"


def _range(spread: Sequence[float], scale: float, digits: int) -> str:
    return f"{scale * spread[0]:.{digits}f}-{scale * spread[1]:.{digits}f}"


def draw(report: Report, picture: Path) -> None:
    """Draw KL from the float model by recipe and granularity into `picture` (PNG or SVG); filled:
    float scales, hollow: integer scales, bars: over calibration seeds."""
    from matplotlib.figure import Figure

    models = _models(report)
    columns = min(2, max(1, len(models)))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.5), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    recipes = list(dict.fromkeys(c.metrics["recipe"] for c in report.cases if _four_bit(c)))
    for panel, model in zip(panels, models, strict=False):
        cases = [c for c in report.cases if c.metrics["model"] == model and _four_bit(c)]
        for index, recipe in enumerate(recipes):
            shift = 0.13 * (index - (len(recipes) - 1) / 2)
            for case in cases:
                if case.metrics["recipe"] == recipe:
                    _point(panel, case, shift, PALETTE[index % len(PALETTE)])
            panel.plot([], [], "o", color=PALETTE[index % len(PALETTE)], label=recipe)
        panel.set_title(model, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xticks(range(len(GRANULARITIES)), GRANULARITIES)
        panel.set_ylabel("KL from the float model, mnats")
        panel.grid(axis="y", color="#e4e7ec", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    if models:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("4-bit weights, 8-bit inputs (hollow: integer scales)", fontsize=11)
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f".writing-{picture.name}")
    figure.savefig(temporary, format=picture.suffix.lstrip(".") or "png")
    temporary.replace(picture)


def _four_bit(case: Case) -> bool:
    return case.metrics["weights"] == "w4a8" and case.metrics["granularity"] in GRANULARITIES


def _point(panel: Any, case: Case, shift: float, colour: str) -> None:
    m = case.metrics
    integer = m["scales"] == "integer"
    x = GRANULARITIES.index(m["granularity"]) + shift + (0.05 if integer else 0.0)
    middle = 1e3 * m["kl"]
    low, high = (1e3 * kl for kl in m.get("kl_spread") or (m["kl"], m["kl"]))
    panel.errorbar(
        [x],
        [middle],
        yerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
        fmt="o",
        color=colour,
        markerfacecolor="white" if integer else colour,
        markersize=5,
        linewidth=1,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's text."""
    report_command(["w4a8-quality"], result_table, draw, arguments)


if __name__ == "__main__":
    main()
