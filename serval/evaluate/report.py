"""Presenting evaluations: tables for the terminal, JSON and PNG files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from serval.errors import DataError
from serval.evaluate import plots
from serval.evaluate.pipeline import EvalResult
from serval.evaluate.retrieval import Cell, accuracy


def print_result(result: EvalResult, console: Console | None = None) -> None:
    """One model's numbers as tables."""
    console = console or Console()
    console.print(
        f"[bold]{result.model}[/bold], cache layout {result.kv}"
        + ("" if result.policy is None else f", policy {result.policy}")
    )
    if result.text is not None:
        console.print(text_table(result))
    if result.cells:
        console.print(retrieval_table(result.cells))
    for task, metrics in result.lm_eval.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        console.print(f"{task}: {values}")


def text_table(result: EvalResult) -> Table:
    """Perplexity and, with a reference, divergence and agreement."""
    assert result.text is not None
    text = result.text
    table = Table(
        "measure", "value", box=box.SIMPLE_HEAD, title="Held-out text", title_justify="left"
    )
    low, high = (math.exp(text.nats + sign * text.stderr) for sign in (-1.0, 1.0))
    error = "" if math.isnan(text.stderr) else f"  ({low:.3f} to {high:.3f} within one std. error)"
    table.add_row("perplexity", f"{text.perplexity:.3f}{error}")
    table.add_row("tokens scored", f"{text.tokens:,} in {text.windows} windows")
    if text.kl is not None and text.same_top is not None:
        table.add_row("reference perplexity", f"{text.reference_perplexity:.3f}")
        table.add_row("KL from the reference", f"{text.kl:.5f} nats per token")
        table.add_row("same most likely token", f"{100 * text.same_top:.2f} %")
    return table


def retrieval_table(cells: Iterable[Cell]) -> Table:
    """Exact match by task and context length, over depths, and the worst depth."""
    cells = list(cells)
    lengths = sorted({cell.length for cell in cells})
    table = Table(
        "task",
        *(f"{length}" for length in lengths),
        "all",
        "worst depth",
        box=box.SIMPLE_HEAD,
        title="Retrieval, exact match by context length",
        title_justify="left",
    )
    for task in dict.fromkeys(cell.task for cell in cells):
        mine = [cell for cell in cells if cell.task == task]
        by_length = [percent(accuracy([c for c in mine if c.length == n])) for n in lengths]
        depths = sorted({cell.depth for cell in mine})
        worst = min(depths, key=lambda d: accuracy([c for c in mine if c.depth == d]))
        at_worst = accuracy([c for c in mine if c.depth == worst])
        note = f"{percent(at_worst)} at {100 * worst:.0f} %"
        table.add_row(task, *by_length, percent(accuracy(mine)), note)
    return table


def percent(share: float) -> str:
    """0.5 -> "50.0 %"; NaN -> a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def write(result: EvalResult, directory: Path) -> list[Path]:
    """Write result.json and, if retrieval was measured, retrieval.png; returns what was written."""
    written = [write_json(result.to_dict(), directory / "result.json")]
    if result.cells:
        png = plots.heatmaps(result.cells, "Exact match, %")
        written.append(write_bytes(png, directory / "retrieval.png"))
    return written


def write_json(values: Any, path: Path) -> Path:
    """Write JSON with NaN and infinity as null, which JSON lacks."""
    text = json.dumps(_finite(values), indent=2, ensure_ascii=False)
    return write_bytes(f"{text}\n".encode(), path)


def write_bytes(data: bytes, path: Path) -> Path:
    """Write a file, making its folder; raises DataError naming the path when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
