"""Reports on disk and on screen: JSON, the console table, the README's results table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from serval.bench.harness import Case, Report
from serval.errors import ConfigError

# Metrics that are columns of Markdown tables, where any case has them.
COLUMNS = {"state_mib": "state, MiB", "peer_state_mib": "peer's state, MiB"}
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON, complete or not at all."""
    values: dict[str, Any] = {"bench": report.bench, "machine": report.machine}
    if report.quick:
        values["quick"] = True
    values["cases"] = [case.to_dict() for case in report.cases]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(_rounded(values), indent=1) + "\n")
    temporary.replace(path)


def read_report(path: Path) -> Report:
    """Read a report; raises ConfigError when the file is none."""
    try:
        values = json.loads(path.read_text())
        cases = [Case.from_dict(case) for case in values["cases"]]
        return Report(values["bench"], values["machine"], cases, values.get("quick", False))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a benchmark report ({error}); expected a file written by "
            "`serval bench NAME --json FILE`"
        ) from error


def merge_report(old: Report, new: Report) -> Report:
    """`old` with the cases of `new` in place of those of the same name and peer. Cases that stay
    keep their machine, where the new one is another or has other threads."""
    if old.bench != new.bench:
        raise ConfigError(f"the file holds results of {old.bench!r}, not of {new.bench!r}")
    fresh = {(case.case, case.peer): case for case in new.cases}
    moved = any(old.machine.get(key) != new.machine.get(key) for key in ("cpu", "threads", "torch"))
    kept = []
    for case in old.cases:
        if moved and case.machine is None:
            case = replace(case, machine=old.machine)
        kept.append(fresh.pop((case.case, case.peer), case))
    return replace(new, cases=kept + list(fresh.values()))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def print_report(report: Report) -> None:
    """Print the report as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    machine = report.machine
    roof = f", {machine['read_gb_per_s']} GB/s read" if "read_gb_per_s" in machine else ""
    title = f"{report.bench}: {machine['cpu']}, {machine['threads']} threads{roof}"
    table = Table(title=title + (" (quick: tiny shapes)" if report.quick else ""))
    table.add_column("case", overflow="fold")
    for name in ("ours", "floor"):
        table.add_column(name, justify="right")
    table.add_column("peer", overflow="fold")
    for name in ("peer value", "ratio", "spread"):
        table.add_column(name, justify="right")
    table.add_column("metrics", overflow="fold")
    for case in report.cases:
        table.add_row(
            escape(case.case),
            _value(case.ours, case.metrics.get("tokens_per_second")),
            "" if case.floor_fraction is None else f"{case.floor_fraction:.0%}",
            escape(case.peer or ""),
            escape(_peer_value(case)),
            "" if case.ratio is None else f"{case.ratio:.2f}x",
            "" if case.spread is None else f"{case.spread[0]:.2f}-{case.spread[1]:.2f}",
            escape(_metrics(case)),
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _peer_value(case: Case) -> str:
    if case.missing is not None:
        return f"missing: {case.missing}"
    if case.failed is not None and case.peer_value is None:
        return f"failed: {case.failed[:60]}"
    return _value(case.peer_value, case.metrics.get("peer_tokens_per_second")) if case.peer else ""


def _metrics(case: Case) -> str:
    elsewhere = ("cpu_seconds", "tokens_per_second")  # in the JSON, in other columns
    shown = {k: v for k, v in case.metrics.items() if not k.endswith(elsewhere)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
    )


def results_table(reports: Sequence[Report]) -> str:
    """Markdown: one line per case with a peer or a quality metric, and the machines below."""
    cases = [case for report in reports for case in report.cases]
    metrics = [name for name in COLUMNS if any(name in case.metrics for case in cases)]
    names = ["benchmark", "case", "Serval", "peer", "peer's value", "ratio (spread)"]
    names += ["of the floor", *(COLUMNS[name] for name in metrics)]
    lines = [
        "| " + " | ".join(names) + " |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |" + " ---: |" * len(metrics),
    ]
    for report in reports:
        for case in report.cases:
            ratio = "" if case.ratio is None else f"**{case.ratio:.2f}x**"
            if case.spread is not None:
                ratio += f" ({case.spread[0]:.2f}-{case.spread[1]:.2f})"
            floor = "" if case.floor_fraction is None else f"{case.floor_fraction:.0%}"
            cells = [
                f"`{report.bench}`",
                case.case,
                _value(case.ours, case.metrics.get("tokens_per_second")),
                case.peer or "",
                _peer_value(case).replace("|", "/"),
                ratio,
                floor,
                *(f"{case.metrics[name]:.0f}" if name in case.metrics else "" for name in metrics),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += _machines(reports)
    return "\n".join(lines)


def _value(seconds: float | None, tokens_per_second: float | None) -> str:
    if seconds is not None and tokens_per_second is not None:
        return f"{tokens_per_second:,.4g} tokens/s"
    return _duration(seconds)


def _machines(reports: Sequence[Report]) -> list[str]:
    seen: dict[str, list[str]] = {}
    for report, machine in ((r, m) for r in reports for m in r.machines()):
        text = f"{machine['cpu']}, {machine['threads']} threads"
        if "read_gb_per_s" in machine:
            text += (
                f", {machine['read_gb_per_s']} GB/s read, "
                f"{machine['float32_gflop_per_s']} GFLOP/s float32"
            )
        text += f", torch {machine['torch']}, {machine['date']}"
        names = seen.setdefault(text, [])
        if (name := f"`serval bench {report.bench}`") not in names:
            names.append(name)
    return [f"Printed by {', '.join(names)} on {text}." for text, names in seen.items()]


def update_readme(files: Sequence[Path], readme: Path) -> None:
    """Replace what stands between the result marks of `readme` by the table of `files`; of
    "FILE:TEXT", only the cases whose name contains the text.

    Raises ConfigError, and leaves `readme` as it is, without files, with reports of tiny shapes,
    and when `readme` cannot be read or lacks the marks.
    """
    if not files:
        raise ConfigError("bench table needs the reports to show, such as docs/results/*.json")
    reports = [_read_some(path) for path in files]
    for path, report in zip(files, reports, strict=True):
        if report.quick:
            raise ConfigError(
                f"{path} was measured with --quick: tiny shapes are no result; run `serval bench "
                f"{report.bench} --json {path}` again without --quick"
            )
    replace_results(readme, results_table(reports), "--readme ")


def _read_some(path: Path) -> Report:
    """The report at `path`; of "FILE:TEXT", the cases whose name contains the text."""
    file, colon, text = str(path).rpartition(":")
    if not colon or path.exists():
        return read_report(path)
    report = read_report(Path(file))
    report.cases = [case for case in report.cases if text in case.case]
    if not report.cases:
        raise ConfigError(f"no case of {file} has {text!r} in its name")
    return report


def replace_results(page: Path, text: str, option: str = "") -> None:
    """Put `text` between the result marks of `page`; raises ConfigError, naming it with `option`
    before it, when it cannot be read or lacks the marks."""
    try:
        before = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}{page}: {error.strerror or error}") from error
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} lacks the marks {BEGIN} and {END}; add both, each on a line")
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
