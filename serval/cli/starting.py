"""Commands to begin with: the tour, and the list of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serval.cli.app import app


@app.command()
def quickstart(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to use (default: assets/serval-tiny).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the models made.")] = Path(
        "quickstart-out"
    ),
    server: Annotated[bool, typer.Option(help="Serve the result and complete a prompt.")] = True,
) -> None:
    """Evaluate a small model, compress it, compare before and after, and serve it."""
    from serval.quickstart import QuickstartOptions, run

    run(QuickstartOptions(model, out, serve=server))


@app.command()
def methods() -> None:
    """List every method by seam, with the paper behind it."""
    from serval.methods import print_methods

    print_methods()
