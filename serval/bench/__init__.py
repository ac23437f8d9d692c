"""Benchmarks: `serval bench NAME` runs a peer and Serval in turn and reports the ratio.

One file per benchmark, each with `collect(setup) -> list[Case]`. `harness.py` holds what they
share (paired rounds, ratios, spread), `worker.py` runs an engine in a process of its own,
`peers.py` the engines that users would pick instead, `table.py` the JSON and the tables.

    report = run("decode", json_path=Path("docs/results/decode.json"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from serval.bench.harness import Case, Report, Setup
from serval.bench.table import (
    merge_report,
    print_report,
    read_report,
    update_readme,
    write_report,
)
from serval.errors import ConfigError
from serval.registry import Entry, resolve

__all__ = ["BENCHES", "Case", "Report", "Setup", "run", "run_command"]

BENCHES: dict[str, Entry] = {
    "decode": Entry("serval.bench.decode:collect", "tokens/s of decoding, Llama-3.2-1B shape"),
    "prefill": Entry("serval.bench.prefill:collect", "tokens/s of prefill, Llama-3.2-1B shape"),
    "w4a8": Entry(
        "serval.bench.w4a8:collect", "products with 4-bit weights: torch, ggml, scale forms"
    ),
    "kv": Entry("serval.bench.kv:collect", "decode attention per cache layout, Llama-3.1-8B layer"),
    "snapmla": Entry(
        "serval.bench.snapmla:collect", "FP8 latent cache: errors, quality, decode attention"
    ),
    "kv-quality": Entry(
        "serval.bench.kv_quality:collect", "what caches of few bits cost in quality"
    ),
    "prefixkv": Entry(
        "serval.bench.prefixkv:collect", "cache policies at equal budgets: quality, memory, speed"
    ),
    "train": Entry("serval.bench.train:collect", "training tokens/s against transformers.Trainer"),
    "optim": Entry("serval.bench.optim:collect", "Muon and MONA steps against torch.optim.Muon"),
    "optim-quality": Entry(
        "serval.bench.optim_quality:collect", "AdamW, Muon and MONA train small language models"
    ),
    "w4a8-quality": Entry(
        "serval.bench.w4a8_quality:collect", "what 4-bit weights and 8-bit inputs cost in quality"
    ),
    "prune": Entry(
        "serval.bench.prune:collect", "MaskPrune against one-shot pruning, quality and tokens/s"
    ),
    "wisca": Entry(
        "serval.bench.wisca:collect", "small models with and without WISCA, paired by seed"
    ),
    "afa-lora": Entry(
        "serval.bench.afa_lora:collect", "AFA-LoRA against LoRA, rsLoRA, DoRA and full tuning"
    ),
    "sinks": Entry(
        "serval.bench.sink_emergence:collect",
        "how attention sinks emerge, and without which variants",
    ),
    "streaming": Entry(
        "serval.bench.streaming:collect", "perplexity at four times the context in a short cache"
    ),
    "serve": Entry("serval.bench.serve:collect", "32 streaming clients against the server"),
}


def run(
    name: str,
    json_path: Path | None = None,
    quick: bool = False,
    only: str | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Report]:
    """Run the benchmark `name` ("all": every one), print its table, write its JSON.

    json_path: a file, or with "all" a directory. quick: tiny shapes, to see that it works. only:
    run the cases whose name contains this text; they replace those cases in an existing file.
    note: receives progress lines (default: stderr). Raises ConfigError for an unknown name, and
    when no case contains `only`.
    """
    from serval.bench.machine import describe_machine

    setup = Setup(quick=quick, only=only) if note is None else Setup(quick, only, note)
    names = list(BENCHES) if name == "all" else [name]
    collectors = {each: resolve(BENCHES, each, "benchmark") for each in names}
    machine = describe_machine(quick)
    reports = []
    for each, collect in collectors.items():
        setup.note(f"benchmark {each}")
        report = Report(each, machine, collect(setup), quick)
        if only and not report.cases:
            continue
        target = json_path / f"{each}.json" if json_path and name == "all" else json_path
        if target is not None:
            if only and target.exists():
                report = merge_report(read_report(target), report)
            write_report(report, target)
        print_report(report)
        reports.append(report)
    if only and not reports:
        known = ", ".join(setup.offered)
        raise ConfigError(f"no case's name contains {only!r} (--only); the cases are: {known}")
    return reports


def run_command(
    name: str,
    files: Sequence[Path] = (),
    readme: Path | None = None,
    json_path: Path | None = None,
    quick: bool = False,
    only: str | None = None,
) -> None:
    """`serval bench`: `run`, or for the name "table" put the reports `files` into `readme`
    (default: README.md). Raises ConfigError for options that do not belong to the name."""
    if name == "table":
        if json_path is not None or quick or only is not None:
            raise ConfigError("bench table takes report files and --readme only")
        update_readme(files, readme or Path("README.md"))
        return
    if files or readme is not None:
        raise ConfigError(
            f"bench {name} takes no files and no --readme; those belong to `serval bench table "
            "FILE ... --readme README.md`"
        )
    run(name, json_path, quick, only)
