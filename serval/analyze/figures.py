"""Pictures of an inspection: PNG bytes, for the report or a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serval.analyze.inspection import Inspection
from serval.evaluate.plots import PALETTE, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GRID = "#30343f", "#e4e7ec"


def _height(layers: int) -> float:
    return min(9.0, max(2.4, 1.2 + 0.22 * layers))


def _grid(
    axis: Axes,
    values: Tensor,
    title: str,
    *,
    low: float | None = 0.0,
    high: float | None = None,
    colours: str = "viridis",
    digits: int = 2,
    across: str = "head",
) -> None:
    """values [layers, columns] as a heat map, with numbers in the cells where they fit."""
    grid = values.float().cpu().numpy()
    drawn = axis.imshow(
        grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
    )
    assert axis.figure is not None
    axis.figure.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    if grid.shape[1] <= 12 and grid.shape[0] <= 24:
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                red, green, blue, _ = drawn.cmap(drawn.norm(grid[row, column]))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
                axis.text(column, row, f"{grid[row, column]:.{digits}f}", ha="center", va="center",
                          fontsize=7, color="white" if dark else _INK)  # fmt: skip
    axis.set_title(title, fontsize=9, color=_INK)
    axis.set_xlabel(across, fontsize=8)
    axis.set_ylabel("attention layer", fontsize=8)
    axis.tick_params(length=0, labelsize=7)
    axis.spines[:].set_visible(False)
    for ticks, size in ((axis.set_yticks, grid.shape[0]), (axis.set_xticks, grid.shape[1])):
        ticks(range(0, size, max(1, size // 16)))


def _row(result: Inspection, *panels: Callable[[Any], None]) -> bytes:
    figure = new_figure(width=3.9 * len(panels), height=_height(result.layers))
    for axis, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis)
    return png(figure)


def sink_heads(result: Inspection) -> bytes:
    """Sink rate, first-token mass and the strongest token's weight, per layer and head."""
    heads = result.survey.heads
    top = max(0.1, heads.first_token.max().item(), heads.strongest.max().item())
    return _row(
        result,
        lambda axis: _grid(axis, result.sink_rate, "sink rate, %", high=100, digits=0),
        lambda axis: _grid(axis, heads.first_token, "mean weight of the first token", high=top),
        lambda axis: _grid(axis, heads.strongest, "mean weight of the top token", high=top),
    )


def positions(result: Inspection) -> bytes:
    """Mean weight by layer and position, as a power of ten."""
    profile = result.survey.profile.clamp(min=1e-4).log10()
    figure = new_figure(width=9.5, height=_height(result.layers))
    _grid(figure.subplots(), profile, "mean weight by position, powers of ten", low=-3, high=0,
          colours="magma", digits=1, across="position in the text")  # fmt: skip
    return png(figure)


def entropy(result: Inspection) -> bytes:
    """How widely each head looks."""
    heads = result.survey.heads
    panels = [
        lambda axis: _grid(axis, heads.entropy, "entropy of a row, nats"),
        lambda axis: _grid(axis, heads.spread, "entropy / log(visible tokens)", high=1),
    ]
    if (heads.row_sum < 0.999).any():
        panels.append(lambda axis: _grid(axis, heads.row_sum, "row sum", high=1))
    return _row(result, *panels)


def keys_and_values(result: Inspection) -> bytes:
    """Value drain, key geometry, and how well geometry tells what is attended to."""
    heads = result.survey.heads
    return _row(
        result,
        lambda axis: _grid(axis, heads.value_drain, "|v first| / median |v|", high=2,
                           across="key-value head"),
        lambda axis: _grid(axis, heads.key_cosine, "cos(k first, mean k)", low=-1, high=1,
                           colours="coolwarm", across="key-value head"),
        lambda axis: _grid(axis, heads.keydiff, "rank corr. of -cos and weight", low=-1, high=1,
                           colours="coolwarm"),
    )  # fmt: skip


def bias(result: Inspection) -> bytes:
    """The bias view: what the first token adds to every query."""
    heads = result.survey.heads
    return _row(
        result,
        lambda axis: _grid(axis, heads.bias_share, "|bias| / |output|"),
        lambda axis: _grid(axis, heads.bias_spread, "spread of the bias", high=2),
        lambda axis: _grid(axis, heads.bias_correlation, "corr. of weight and |output|", low=-1,
                           high=1, colours="coolwarm"),
    )  # fmt: skip


def hidden(result: Inspection) -> bytes:
    """Largest and median |h|, kurtosis and OrthoRank importance after each block."""
    layers = result.survey.layers
    figure = new_figure(width=11.0, height=2.9)
    sizes, tails, angles = figure.subplots(1, 3)
    x = range(len(layers))
    sizes.plot(x, [max(s.peak for s in layer) for layer in layers], color=PALETTE[4],
               marker="o", ms=3, label="largest |h|")  # fmt: skip
    sizes.plot(x, [_mean(s.median for s in layer) for layer in layers], color=PALETTE[0],
               marker="o", ms=3, label="median |h|")  # fmt: skip
    sizes.set_yscale("log")
    sizes.legend(fontsize=7, frameon=False)
    tails.plot(x, [_mean(s.kurtosis for s in layer) for layer in layers], color=PALETTE[3],
               marker="o", ms=3)  # fmt: skip
    tails.axhline(3, color=_GRID, lw=1.2)
    angles.plot(x, result.survey.orthorank, color=PALETTE[2], marker="o", ms=3)
    angles.set_ylim(0, 1)
    titles = ("size of hidden states", "kurtosis (Gaussian: 3)", "1 - |cos(h, h first)|")
    for axis, title in zip((sizes, tails, angles), titles, strict=True):
        axis.set_title(title, fontsize=9, color=_INK)
        axis.set_xlabel("after block", fontsize=8)
        _plain(axis)
    return png(figure)


def changes(result: Inspection) -> bytes:
    """KL of every change that was tried."""
    tried = [change for change in result.changes if change.result is not None]
    figure = new_figure(width=8.6, height=0.9 + 0.3 * len(tried))
    axis = figure.subplots()
    groups = list(dict.fromkeys(change.group for change in tried))
    values = [change.result.kl for change in tried if change.result is not None]
    colours = [PALETTE[groups.index(change.group)] for change in tried]
    drawn = axis.barh(range(len(tried)), values, color=colours, height=0.62)
    axis.bar_label(drawn, [f"{v:.4f}" for v in values], fontsize=8, padding=3)
    axis.set_yticks(range(len(tried)), [change.name for change in tried], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("KL from the unchanged model, nats per token", fontsize=8)
    axis.margins(x=0.15)
    _plain(axis, grid="x")
    return png(figure)


def overview(result: Inspection) -> bytes:
    """One picture of the most telling panels."""
    heads, layers = result.survey.heads, result.survey.layers
    tall = _height(result.layers)
    figure = new_figure(width=12.0, height=2 * tall + 0.5)
    axes = figure.subplots(2, 3)
    _grid(axes[0, 0], result.sink_rate, "sink rate, %", high=100, digits=0)
    top = max(0.1, heads.first_token.max().item())
    _grid(axes[0, 1], heads.first_token, "mean weight of the first token", high=top)
    _grid(axes[0, 2], heads.spread, "entropy / log(visible tokens)", high=1)
    profile = result.survey.profile[:, :16].clamp(min=1e-4).log10()
    _grid(axes[1, 0], profile, "mean weight by position, powers of ten", low=-3, high=0,
          colours="magma", digits=1, across="position")  # fmt: skip
    _grid(axes[1, 1], heads.value_drain, "|v first| / median |v|", high=2, across="key-value head")
    axis = axes[1, 2]
    x = range(len(layers))
    axis.plot(x, [max(s.peak for s in layer) for layer in layers], color=PALETTE[4], marker="o",
              ms=3, label="largest |h|")  # fmt: skip
    axis.plot(x, [_mean(s.median for s in layer) for layer in layers], color=PALETTE[0],
              marker="o", ms=3, label="median |h|")  # fmt: skip
    axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
    axis.set_title("size of hidden states", fontsize=9, color=_INK)
    axis.set_xlabel("after block", fontsize=8)
    _plain(axis)
    figure.suptitle(f"{result.model}: {result.verdict}", fontsize=11, color=_INK)
    return png(figure)


def _plain(axis: Axes, grid: str = "y") -> None:
    axis.grid(axis=grid, color=_GRID, lw=0.8)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, labelsize=8, labelcolor=_INK)


def _mean(values: Any) -> float:
    return torch.tensor(list(values)).mean().item()


# file name -> figure
FIGURES: dict[str, Callable[[Inspection], bytes]] = {
    "overview": overview,
    "sink-heads": sink_heads,
    "positions": positions,
    "entropy": entropy,
    "keys-and-values": keys_and_values,
    "hidden": hidden,
    "bias": bias,
    "changes": changes,
}
