"""What the commands that put a report on a page share: arguments, checks, errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from serval.bench.harness import Report
from serval.bench.table import read_report, replace_results
from serval.errors import ConfigError, ServalError


def printed_by(report: Report) -> str:
    """The line below a table: the command and where it ran."""
    places = [
        f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}, "
        f"torch {machine['torch']}, {machine['date']}"
        for machine in report.machines()
    ]
    return f"Printed by `serval bench {report.bench}` on {'; '.join(dict.fromkeys(places))}."


def update_page(report: Report, page: Path, table: Callable[[Report], str]) -> None:
    """Put the report's table between the result marks of `page`. Raises `ConfigError` for a report
    of tiny shapes, or a page without marks."""
    if report.quick:
        raise ConfigError("the report was measured with --quick, which is no result")
    replace_results(page, f"\n{table(report)}\n")


def report_command(
    benches: Collection[str],
    table: Callable[[Report], str],
    draw: Callable[[Report, Path], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Read a report of one of `benches`; put its table on --page, draw --picture, or print it.

    Exits with 1 and one line when the file is no such report or the page cannot take it.
    """
    parser = argparse.ArgumentParser(description="Tables and picture of a report.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown file whose results are replaced")
    parser.add_argument("--picture", type=Path, help="PNG or SVG file to draw")
    chosen = parser.parse_args(arguments)
    try:
        report = read_report(chosen.report)
        if report.bench not in benches:
            raise ConfigError(
                f"{chosen.report} is a report of {report.bench!r}; this shows those of: "
                f"{', '.join(benches)}"
            )
        if chosen.page is not None:
            update_page(report, chosen.page, table)
        if chosen.picture is not None:
            draw(report, chosen.picture)
        if chosen.page is None and chosen.picture is None:
            print(table(report))
    except ServalError as error:
        parser.exit(1, f"{error}\n")
