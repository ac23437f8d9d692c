"""Plots of evaluations: PNG bytes, so that a report can hold them or a file take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from serval.evaluate.retrieval import Cell

PALETTE = ("#5b8def", "#f2994a", "#27ae60", "#9b51e0", "#eb5757", "#2d9cdb")
_INK, _GRID = "#30343f", "#e4e7ec"


def heatmaps(cells: Sequence[Cell], title: str = "") -> bytes:
    """One panel per task: exact match by context length (across) and depth (down)."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = new_figure(width=max(4.5, 3.1 * len(tasks) + 0.8), height=3.3)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for index, (task, axis) in enumerate(zip(tasks, axes, strict=True)):
        _heatmap(axis, [cell for cell in cells if cell.task == task], task, first=index == 0)
    if title:
        figure.suptitle(title, color=_INK, fontsize=11, fontweight="bold")
    return png(figure)


def _heatmap(axis: Axes, cells: Sequence[Cell], task: str, *, first: bool) -> None:
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        grid[depths.index(cell.depth)][lengths.index(cell.length)] = 100 * cell.accuracy
    axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto", alpha=0.85)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axis.set_title(task, fontsize=10, color=_INK)
    axis.set_xlabel("context, tokens")
    if first:
        axis.set_ylabel("depth of the fact")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def bars(values: Mapping[str, float], title: str, unit: str = "", digits: int = 1) -> bytes:
    """One bar per name, its value above it."""
    figure = new_figure(width=max(5.2, 1.1 * len(values)), height=2.9)
    axis = figure.subplots()
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(values))]
    drawn = axis.bar(range(len(values)), list(values.values()), width=0.6, color=colours)
    axis.bar_label(drawn, [f"{v:,.{digits}f}" for v in values.values()], fontsize=9, padding=2)
    axis.set_xticks(range(len(values)), list(values), fontsize=8)
    _plain(axis, title, unit)
    return png(figure)


def grouped_bars(
    groups: Mapping[str, Mapping[str, float]], title: str, unit: str = "", digits: int = 0
) -> bytes:
    """groups: label -> {series: value}; one cluster of bars per label, one colour per series."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / max(1, len(series))
    figure = new_figure(width=max(5.2, 0.65 * len(groups) * len(series)), height=2.9)
    axis = figure.subplots()
    for index, name in enumerate(series):
        heights = [values.get(name, float("nan")) for values in groups.values()]
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(groups))]
        colour = PALETTE[index % len(PALETTE)]
        drawn = axis.bar(places, heights, width=0.92 * width, color=colour, label=name)
        labels = [f"{h:,.{digits}f}" if h == h else "" for h in heights]
        axis.bar_label(drawn, labels, fontsize=8, padding=2)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    _plain(axis, title, unit)
    return png(figure)


def _plain(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10, color=_INK, pad=10)
    axis.set_ylabel(unit, fontsize=8)
    axis.margins(y=0.14)
    axis.grid(axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, labelcolor=_INK)


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
