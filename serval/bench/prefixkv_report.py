"""The tables and the picture of a `prefixkv` report, made from its JSON and nothing else.

    python -m serval.bench.prefixkv_report docs/results/prefixkv.json \
        --page docs/methods/prefixkv.md --picture docs/images/prefixkv.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serval.bench.harness import Case, Report
from serval.bench.report_command import printed_by, report_command
from serval.errors import ConfigError
from serval.evaluate.plots import PALETTE, new_figure, png


def result_table(report: Report) -> str:
    """Markdown: quality by policy and budget, retained attention, and blocks and decode steps."""
    parts = []
    scored = [case for case in report.cases if "perplexity" in case.metrics]
    if scored:
        parts.append(_quality_table(scored))
    built = [case for case in report.cases if case.case.startswith("constructed-layers")]
    shared = [case for case in report.cases if case.case == "importance"]
    if built or shared:
        parts.append(_layer_table(shared, built))
    steps = [case for case in report.cases if "kept_bytes_fraction" in case.metrics]
    if steps:
        parts.append(_step_table(steps))
    parts.append(printed_by(report))
    return "\n\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _quality_table(scored: Sequence[Case]) -> str:
    keeps = sorted({case.metrics["keep"] for case in scored})
    found = {(case.metrics["policy"], case.metrics["keep"]): case.metrics for case in scored}
    policies = dict.fromkeys(case.metrics["policy"] for case in scored)
    cells = {
        "perplexity": lambda metrics: f"{metrics['perplexity']:.1f}",
        "answers": lambda metrics: f"{metrics['retrieval']:.0%}",
    }
    names = [f"{name} at {keep:.0%}" for name in cells for keep in keeps]
    rows = [
        [policy]
        + [
            cell(found[policy, keep]) if (policy, keep) in found else ""
            for cell in cells.values()
            for keep in keeps
        ]
        for policy in policies
    ]
    whole = scored[0].metrics
    caption = (
        f"Perplexity of continuations ({whole['whole_perplexity']:.1f} with the whole cache) and "
        f"right answers ({whole['whole_retrieval']:.0%} with the whole cache), by share of the "
        "entries kept:"
    )
    return f"{caption}\n\n{_table(['policy', *names], rows)}"


def _layer_table(shared: Sequence[Case], built: Sequence[Case]) -> str:
    """Least retained attention of any layer, and largest output error of constructed layers."""
    rows: dict[int, list[str]] = {}
    for case in shared:
        for name, value in case.metrics.items():
            prefix, _, percent = name.rpartition("_")
            if prefix == "least_retained_prefixkv":
                uniform = case.metrics[f"least_retained_uniform_{percent}"]
                rows[int(percent)] = [f"{percent} %", f"{value:.0%}", f"{uniform:.0%}"]
    for case in built:
        percent = round(100 * case.metrics["keep"])
        row = rows.setdefault(percent, [f"{percent} %", "", ""])
        row += [
            f"{case.metrics[f'largest_error_{policy}']:.2f}"
            for policy in ("prefixkv", "uniform", "pyramid")
        ]
    names = ["kept", "least attention kept by a layer: prefixkv", "uniform"]
    if built:
        names += ["largest error, constructed layers: prefixkv", "uniform", "pyramid"]
    width = len(names)
    return _table(names, [row + [""] * (width - len(row)) for _, row in sorted(rows.items())])


def _step_table(steps: Sequence[Case]) -> str:
    first = steps[0].metrics
    caption = (
        f"{first['sequences']} sequences of {first['context']} tokens, against the whole cache in "
        "turn:"
    )
    rows = []
    for case in steps:
        ratio = "" if case.ratio is None else f"{case.ratio:.2f}x"
        step = "" if case.ours is None else f"{1e3 * case.ours:.0f} ms"
        rows.append([case.case, f"{case.metrics['kept_bytes_fraction']:.1%}", step, ratio])
    return f"{caption}\n\n{_table(['case', 'bytes of blocks', 'decode step', 'ratio'], rows)}"


def draw(report: Report, path: Path) -> None:
    """PNG: Lorenz curves per layer, and perplexity by budget per policy. Raises ConfigError when
    the report lacks either."""
    cases = report.cases
    found = [case.metrics for case in cases if case.case == "importance"]
    scored = [case.metrics for case in cases if "perplexity" in case.metrics]
    if not found or not scored:
        raise ConfigError(
            "the report has no case 'importance' or no perplexities; run `serval bench prefixkv` "
            "without --only"
        )
    figure = new_figure(width=9.5, height=3.8)
    left, right = figure.subplots(1, 2)
    curves, unequal = found[0]["lorenz"], found[0]["gini"]
    for layer, (curve, value) in enumerate(zip(curves, unequal, strict=True)):
        share = [100 * n / (len(curve) - 1) for n in range(len(curve))]
        left.plot(
            share,
            [100 * y for y in curve],
            color=PALETTE[layer % len(PALETTE)],
            alpha=1.0 if layer < len(PALETTE) else 0.5,
            label=f"layer {layer}, Gini {value:.2f}",
        )
    left.plot([0, 100], [0, 100], ":", color="grey", linewidth=1)
    left.set_xlabel("least attended tokens, %")
    left.set_ylabel("attention they receive, %")
    left.set_title("how unevenly layers attend", fontsize=10)
    left.legend(fontsize=7)
    for index, policy in enumerate(dict.fromkeys(m["policy"] for m in scored)):
        mine = sorted((m["keep"], m["perplexity"]) for m in scored if m["policy"] == policy)
        right.plot(
            [100 * keep for keep, _ in mine],
            [value for _, value in mine],
            "o-",
            markersize=3,
            color=PALETTE[index % len(PALETTE)],
            label=policy,
        )
    right.axhline(scored[0]["whole_perplexity"], linestyle=":", color="grey", label="whole cache")
    right.set_xlabel("kept, %")
    right.set_ylabel("perplexity of the continuation")
    right.set_yscale("log")
    right.set_title("one budget, split in different ways", fontsize=10)
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's text."""
    report_command(["prefixkv"], result_table, draw, arguments)


if __name__ == "__main__":
    main()
