"""Commands that train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serval.cli.app import Force, Fresh, Model, Overrides, Recipe, app


@app.command()
def train(
    recipe: Recipe,
    override: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Train a model from a recipe, resuming an interrupted run; works under torchrun too."""
    from serval.train.run import run

    result = run(recipe, overrides=override or [], fresh=fresh)
    if result.interrupted:
        sys.exit(130)


@app.command()
def tune(
    recipe: Recipe,
    override: Overrides = None,
    fresh: Fresh = False,
) -> None:
    """Fine-tune a model on conversations or completions: all weights, LoRA or AFA-LoRA."""
    from serval.adapt.tune import run

    result = run(recipe, overrides=override or [], fresh=fresh)
    if result.interrupted:
        sys.exit(130)


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="PEFT LoRA adapter directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    force: Force = False,
) -> None:
    """Merge a LoRA adapter into a checkpoint's weights."""
    from serval.adapt.merging import merge_checkpoint

    print(f"wrote {merge_checkpoint(model, adapter, out, force=force)}")
