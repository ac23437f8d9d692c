"""Tables and pictures of the benchmarks that train models, made from their JSON and nothing else.

    python -m serval.bench.training_report docs/results/afa-lora.json \
        --page docs/methods/afa-lora.md --picture docs/images/afa-lora.png
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serval.bench.harness import Case, Report
from serval.bench.report_command import printed_by, report_command
from serval.errors import ConfigError
from serval.evaluate.plots import PALETTE, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = tuple[str, Callable[[dict[str, Any]], str]]


def number(name: str, digits: int = 3) -> Callable[[dict[str, Any]], str]:
    return lambda metrics: "" if metrics.get(name) is None else f"{metrics[name]:.{digits}f}"


def share(name: str, digits: int = 0) -> Callable[[dict[str, Any]], str]:
    return lambda metrics: "" if metrics.get(name) is None else f"{metrics[name]:.{digits}%}"


def plain(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda metrics: str(metrics.get(name, ""))


def rate(metrics: dict[str, Any]) -> str:
    if "lr" not in metrics:
        return ""
    return f"{metrics['lr']:g}" + (" (edge)" if metrics.get("lr_at_edge") else "")


def spread(name: str) -> Callable[[dict[str, Any]], str]:
    """Mean, and least and most of the seeds."""

    def cell(metrics: dict[str, Any]) -> str:
        losses = metrics.get("losses") if metrics.get(name) is not None else []
        seeds = f" ({min(losses):.3f}-{max(losses):.3f})" if losses else ""
        return number(name)(metrics) + seeds

    return cell


def each(name: str, digits: int = 0, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    """The value of every seed, or the one value if they agree."""

    def cell(metrics: dict[str, Any]) -> str:
        values = [f"{scale * value:.{digits}f}" for value in metrics.get(name, [])]
        return ", ".join(values[:1] if len(set(values)) == 1 else values)

    return cell


def gap(name: str) -> Callable[[dict[str, Any]], str]:
    """Mean paired difference and its standard error, and in how many seeds it is below 0."""

    def cell(metrics: dict[str, Any]) -> str:
        mean, error = metrics.get(f"against_{name}"), metrics.get(f"against_{name}_error")
        if mean is None:
            return ""
        return f"{mean:+.4f}" + (f" ± {error:.4f}" if error is not None else "")

    return cell


@dataclass(frozen=True)
class Layout:
    """How one benchmark is shown. pattern: of a case's name, with groups `arm` and perhaps `panel`;
    a case that it does not match is in the table only. title: of a panel, from its name. values:
    metric with one number per seed, or a single number."""

    pattern: str
    columns: Sequence[Column]
    values: str
    unit: str
    title: str = "{}"
    logarithmic: bool = False


LOAD: Column = ("learning rate", rate)
LAYOUTS = {
    "optim-quality": Layout(
        r"(?P<arm>.+)-(?P<panel>dense|moe)",
        (
            LOAD,
            ("validation loss (seeds)", spread("validation_loss")),
            ("seeds at AdamW's loss", plain("reached_adamw")),
            ("after this share of the tokens", share("share_of_tokens_to_adamw")),
            ("largest Hessian eigenvalue", number("eigenvalue", 1)),
        ),
        "losses",
        "validation loss, nats",
    ),
    "wisca": Layout(
        r"(?P<arm>.+)-(?P<panel>gqa|mha)",
        (
            LOAD,
            ("validation loss (seeds)", spread("validation_loss")),
            ("against none, same seeds", gap("none")),
            ("lower", plain("better")),
        ),
        "losses",
        "validation loss, nats",
    ),
    "afa-lora": Layout(
        r"(?P<arm>.+)-r(?P<panel>\d+)",
        (
            LOAD,
            ("test loss (seeds)", spread("test_loss")),
            ("against LoRA, same seeds", gap("lora")),
            ("lower", plain("better")),
            ("gap to all weights closed", share("gap_closed")),
            ("energy left (seeds)", spread("energy_left")),
            ("best linear map", number("linear_floor")),
        ),
        "losses",
        "test loss, nats",
        "rank {}",
    ),
    "prune": Layout(
        r"serval-tiny-(?P<panel>\d+)-(?P<arm>(?!speed).+)",
        (
            ("steps", plain("steps")),
            ("key-value heads", each("key_value_heads")),
            ("channels", each("intermediate_size")),
            ("parameters", share("parameters_kept")),
            ("perplexity", number("perplexity", 2)),
            ("of each seed", each("perplexities", 2)),
            ("against MaskPrune, same seeds", gap("maskprune")),
            ("KL from the whole model", number("kl")),
            ("retrieval", share("retrieval")),
            ("of each seed, %", each("retrievals", scale=100)),
            ("decode tokens/s", number("tokens_per_second", 0)),
            ("unpruned", number("peer_tokens_per_second", 0)),
        ),
        "perplexities",
        "perplexity",
        "{} % of the parameters",
        logarithmic=True,
    ),
}


def layout_of(report: Report) -> Layout:
    """How a report is shown; raises ConfigError for one of another benchmark."""
    if report.bench not in LAYOUTS:
        raise ConfigError(
            f"a report of {report.bench!r}; this shows those of: {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[report.bench]


def result_table(report: Report) -> str:
    """Markdown: a line per case, with the columns that any case fills."""
    layout = layout_of(report)
    lines = [
        [case.case, *(cell(case.metrics) for _, cell in layout.columns)] for case in report.cases
    ]
    for line, case in zip(lines, report.cases, strict=True):
        if case.missing is not None:
            line[1] = f"not installed: {case.missing}"
    used = [0, *(i for i in range(1, len(layout.columns) + 1) if any(line[i] for line in lines))]
    names = ["case", *(name for name, _ in layout.columns)]
    return "\n".join(
        [
            "| " + " | ".join(names[i] for i in used) + " |",
            "| --- |" + " ---: |" * (len(used) - 1),
            *("| " + " | ".join(line[i] for i in used) + " |" for line in lines),
            "",
            printed_by(report),
        ]
    )


def picture(report: Report) -> bytes:
    """PNG: a panel per model or rank or size, one dot per seed, a line at the mean."""
    layout = layout_of(report)
    panels: dict[str, dict[str, list[float]]] = {}
    for case in report.cases:
        match = re.fullmatch(layout.pattern, case.case)
        values = _values(case, layout.values)
        if match is not None and values:
            panels.setdefault(match["panel"], {})[match["arm"]] = values
    if not panels:
        raise ConfigError("the report holds no case that could be drawn")
    arms = list(dict.fromkeys(arm for panel in panels.values() for arm in panel))
    wide = max(2.6, 0.55 * len(arms) + 0.8)
    figure = new_figure(width=wide * len(panels), height=3.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        _panel(axis, found, arms)
        axis.set_title(layout.title.format(name), fontsize=10)
        if layout.logarithmic:
            axis.set_yscale("log")
    axes[0].set_ylabel(layout.unit, fontsize=9)
    return png(figure)


def _values(case: Case, name: str) -> list[float]:
    values = case.metrics.get(name, [])
    return values if isinstance(values, list) else [values]


def _panel(axis: Axes, found: dict[str, list[float]], arms: Sequence[str]) -> None:
    for index, arm in enumerate(arms):
        values = found.get(arm, [])
        colour = PALETTE[index % len(PALETTE)]
        axis.plot([index] * len(values), values, "o", color=colour, markersize=4, alpha=0.7)
        if values:
            mean = sum(values) / len(values)
            axis.plot([index - 0.3, index + 0.3], [mean, mean], color=colour, linewidth=2)
    axis.set_xticks(range(len(arms)), arms, rotation=35, ha="right", fontsize=8)
    axis.set_xlim(-0.6, len(arms) - 0.4)
    axis.grid(axis="y", color="#e4e7ec", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def draw(report: Report, path: Path) -> None:
    """Write `picture` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(report))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module's text."""
    report_command(LAYOUTS, result_table, draw, arguments)


if __name__ == "__main__":
    main()
