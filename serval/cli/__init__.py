"""The command line: one verb per command; it parses, calls and prints, with no logic of its own."""

from __future__ import annotations

import sys

# Commands register with `app` when they are imported; `serval --help` lists them in this order.
from serval.cli import starting, training, measuring, compressing, serving  # isort: skip
from serval.cli.app import app
from serval.errors import ServalError

__all__ = ["app", "compressing", "main", "measuring", "serving", "starting", "training"]


def main() -> None:
    """Entry point: errors meant for the user become one line on stderr and exit code 2."""
    try:
        app()
    except ServalError as error:
        print(f"serval: {error}", file=sys.stderr)
        sys.exit(2)
