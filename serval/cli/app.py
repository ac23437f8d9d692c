"""The application that commands register with, and the options that several of them take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from serval import __version__

app = typer.Typer(
    name="serval",
    help="Train, compress, evaluate and serve long-context language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face hub name.")]
Policy = Annotated[
    str | None, typer.Option(help="What the cache keeps, as in prefixkv:keep=0.2 (default: all).")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]
Layout = Annotated[str, typer.Option("--kv", help="Cache layout; see `serval methods`.")]
TextField = Annotated[str, typer.Option(help="Field of JSONL or Parquet texts.")]
Force = Annotated[bool, typer.Option(help="Replace a checkpoint at --out.")]
Recipe = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set train.steps=100")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an earlier run's state.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"serval {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train, compress, evaluate and serve long-context language models."""


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C ends a command that goes on when it is started again: it says so, exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("serval: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
