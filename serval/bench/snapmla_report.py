"""The tables and the picture of a `snapmla` report, made from its JSON and nothing else.

    python -m serval.bench.snapmla_report docs/results/snapmla.json \
        --page docs/methods/snapmla.md --picture docs/images/snapmla-errors.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serval.bench.harness import Case, Report
from serval.bench.report_command import printed_by, report_command
from serval.bench.snapmla_errors import CONFIGS, REGIMES
from serval.evaluate.plots import PALETTE


def result_table(report: Report) -> str:
    """Markdown: errors at the longest context per regime, quality of the model, decode steps."""
    errors = _errors(report)
    parts = []
    if errors:
        parts.append(_error_table(errors, report))
    models = [case for case in report.cases if case.case.startswith("model-")]
    if models:
        parts.append(_model_table(models))
    steps = [case for case in report.cases if "attention-" in case.case]
    if steps:
        parts.append(_step_table(steps))
    parts.append(printed_by(report))
    return "\n\n".join(parts)


def _errors(report: Report) -> list[Case]:
    return [case for case in report.cases if case.case.startswith("errors-")]


def _error_table(errors: list[Case], report: Report) -> str:
    longest = max(case.metrics["context"] for case in errors)
    lines = [
        f"Errors over {longest} tokens:",
        "",
        "| configuration | regime | relative L2 | 1 - cosine | LSE error | same top key "
        "| bytes per token |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in errors:
        m = case.metrics
        if m["context"] == longest:
            lines.append(
                f"| {m['config']} | {m['regime']} | {m['relative_l2']:.4f} "
                f"| {m['cosine_difference']:.2g} | {m['lse_error']:.2g} | {m['top1']:.1%} "
                f"| {m['bytes']:g} |"
            )
    return "\n".join(lines)


def _model_table(models: list[Case]) -> str:
    lines = [
        "The shipped MLA model, all attention in FP8:",
        "",
        "| configuration | rotary keys | perplexity | vs full | KL, mnats | same top token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in models:
        m = case.metrics
        lines.append(
            f"| {m['config']} | x{m['factor']:g} | {m['perplexity']:.3f} "
            f"| {m['perplexity_change']:+.2%} | {1e3 * m['kl']:.2f} | {m['same_top']:.1%} |"
        )
    return "\n".join(lines)


def _step_table(steps: list[Case]) -> str:
    lines = [
        "One decode step of one sequence, one layer:",
        "",
        "| case | time | against | ratio (spread) | GB/s | of the byte floor "
        "| of the float32 roof |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in steps:
        m = case.metrics
        time = "-" if case.ours is None else f"{1e3 * case.ours:.2f} ms"
        ratio = "" if case.ratio is None else f"{case.ratio:.2f}x"
        if case.spread is not None:
            ratio += f" ({case.spread[0]:.2f}-{case.spread[1]:.2f})"
        floor = "" if case.floor_fraction is None else f"{case.floor_fraction:.0%}"
        roof = f"{m['of_float32_roof']:.0%}" if "of_float32_roof" in m else ""
        read = f"{m['gb_per_s']:.1f}" if "gb_per_s" in m else ""
        lines.append(
            f"| {case.case} | {time} | {case.peer} | {ratio} | {read} | {floor} | {roof} |"
        )
    return "\n".join(lines)


def draw(report: Report, picture: Path) -> None:
    """Draw the relative L2 error by context, a panel per regime, a line per configuration, into
    `picture` (PNG or SVG)."""
    from matplotlib.figure import Figure

    errors = [case.metrics for case in _errors(report)]
    figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(REGIMES), sharey=True)
    titles = {"gaussian": "normal latents", "rope": "large rotary keys", "norms": "uneven norms"}
    for panel, regime in zip(panels, REGIMES, strict=True):
        for index, config in enumerate(CONFIGS):
            line = [m for m in errors if m["regime"] == regime and m["config"] == config]
            panel.plot(
                [m["context"] for m in line],
                [m["relative_l2"] for m in line],
                marker="os^Dv"[index],
                color=PALETTE[index % len(PALETTE)],
                label="SnapMLA" if config == "snapmla" else config.upper(),
                linewidth=1.2,
                markersize=4,
            )
        panel.set(title=titles[regime], xscale="log", yscale="log", xlabel="tokens")
        panel.grid(color="#e4e7ec", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("relative L2 error of attention")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    temporary = picture.with_name(f".writing-{picture.name}")
    figure.savefig(temporary, format=picture.suffix.lstrip(".") or "png")
    temporary.replace(picture)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's text."""
    report_command(["snapmla"], result_table, draw, arguments)


if __name__ == "__main__":
    main()
