"""The loss curve of a run, drawn from its log.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path


def draw_curve(log: Path, picture: Path) -> Path | None:
    """Draw training and validation loss over steps into `picture` (PNG).

    Training loss is averaged over about a hundredth of the run, so that the trend shows. Returns
    None, writing nothing, when the log holds no training step. Steps that a resumed run did again
    appear once, as done last.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        if "validation_loss" in row:
            validation[row["step"]] = row["validation_loss"]
        elif "loss" in row:
            training[row["step"]] = row["loss"]
    if not training:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = sorted(training)
    width = max(1, len(steps) // 100)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    means = [sum(training[s] for s in group) / len(group) for group in groups]
    axes.plot([g[len(g) // 2] for g in groups], means, color="#94a3b8", label="training (mixture)")
    if validation:
        held_out = sorted(validation)
        axes.plot(
            held_out,
            [validation[s] for s in held_out],
            "o-",
            color="#f97316",
            label="held-out text",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name(f".{picture.name}")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, picture)
    return picture
