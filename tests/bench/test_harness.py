"""The harness: rounds, ratios, missing peers, reports on disk, the README table, workers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serval import bench
from serval.bench.harness import (
    Case,
    Contestant,
    MissingPeerError,
    Outcome,
    Report,
    Sample,
    Setup,
    compare,
    paired_rounds,
)
from serval.bench.language_models import cache_bytes_per_number
from serval.bench.report_command import printed_by
from serval.bench.table import (
    BEGIN,
    END,
    merge_report,
    print_report,
    read_report,
    update_readme,
    write_report,
)
from serval.bench.worker import Worker, WorkerError, WorkerPool
from serval.errors import ConfigError

MACHINE = {"cpu": "a processor", "threads": 2, "torch": "2", "date": "2026-01-01"}


def quiet(line: str) -> None:
    """No progress lines."""


def timed(name: str, seconds: list[float], order: list[str]) -> Contestant:
    values = iter(seconds)

    def measure() -> Sample:
        order.append(name)
        return Sample(next(values), cpu_seconds=0.5)

    return Contestant(name, measure)


def test_rounds_alternate_and_ratio_is_of_medians() -> None:
    order: list[str] = []
    found = paired_rounds(
        [timed("ours", [1.0, 2.0, 4.0], order), timed("peer", [3.0, 4.0, 4.0], order)], 3, quiet
    )
    assert order == ["ours", "peer"] * 3
    case = compare("x", found["ours"], found["peer"], floor_seconds=1.0)
    assert (case.ours, case.peer_value, case.ratio) == (2.0, 4.0, 2.0)
    assert case.spread == (1.0, 3.0)
    assert case.floor_fraction == 0.5
    assert case.metrics == {"cpu_seconds": 0.5, "peer_cpu_seconds": 0.5}


def test_a_missing_or_failing_peer_is_reported_and_the_others_go_on() -> None:
    def absent() -> Sample:
        raise MissingPeerError("llama.cpp", "pip install llama-cpp-python")

    def broken() -> Sample:
        raise RuntimeError("no memory")

    order: list[str] = []
    found = paired_rounds(
        [timed("ours", [1.0, 1.0], order), Contestant("a", absent), Contestant("b", broken)],
        2,
        quiet,
    )
    assert order == ["ours", "ours"]
    missing = compare("x", found["ours"], found["a"]).to_dict()
    assert missing["peer_value"] is None
    assert missing["ratio"] is None
    assert missing["missing"] == "pip install llama-cpp-python"
    failed = compare("x", found["ours"], found["b"])
    assert failed.failed == "b: RuntimeError: no memory"
    assert failed.ours == 1.0
    ours_failed = compare("x", found["b"], found["ours"])
    assert ours_failed.ours is None
    assert ours_failed.ratio is None


def report() -> Report:
    fast = Case("w4a8-decode-batch1-ctx512", 0.01, "llama.cpp Q4_0", 0.02, 2.0, (1.9, 2.1), 0.71)
    fast.metrics = {"tokens_per_second": 100.0, "peer_tokens_per_second": 50.0}
    absent = Case("float32-decode", 0.5, "other", missing="pip install other")
    quality = Case("int8-quality", None, metrics={"perplexity": 3.21})
    return Report("decode", MACHINE, [fast, absent, quality])


def test_the_table_is_made_of_results_only(tmp_path: Path) -> None:
    readme, tiny = tmp_path / "README.md", tmp_path / "tiny.json"
    readme.write_text(f"{BEGIN}\nold\n{END}\n")
    write_report(replace(report(), quick=True), tiny)
    with pytest.raises(ConfigError, match="needs the reports"):
        update_readme([], readme)
    with pytest.raises(ConfigError, match=r"tiny\.json was measured with --quick"):
        update_readme([tiny], readme)
    assert "old" in readme.read_text()
    write_report(report(), tiny)
    with pytest.raises(ConfigError, match=r"--readme .*nowhere\.md"):
        update_readme([tiny], tmp_path / "nowhere.md")


def test_bytes_of_state_are_columns_where_a_case_has_them(tmp_path: Path) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "optim.json"
    readme.write_text(f"{BEGIN}\n{END}\n")
    step = Case("step", 1.0, "peer", 2.0, 2.0, metrics={"state_mib": 12.4, "peer_state_mib": 8})
    write_report(Report("optim", MACHINE, [step, Case("other", 1.0)]), file)
    update_readme([file], readme)
    lines = readme.read_text().splitlines()
    assert lines[1].endswith("| of the floor | state, MiB | peer's state, MiB |")
    assert lines[3].endswith("| 12 | 8 |")
    assert len({line.count("|") for line in lines[1:5]}) == 1
    write_report(report(), file)
    update_readme([file], readme)
    assert "state" not in readme.read_text()


def test_arguments_of_the_other_kind_of_bench_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong to `serval bench table"):
        bench.run_command("decode", files=[tmp_path / "a.json"])
    with pytest.raises(ConfigError, match="belong to `serval bench table"):
        bench.run_command("decode", readme=tmp_path / "README.md")
    with pytest.raises(ConfigError, match="report files and --readme only"):
        bench.run_command("table", [tmp_path / "a.json"], only="x")


def test_a_name_that_no_case_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(setup: Setup) -> list[Case]:
        return [Case(name, 1.0) for name in ("decode-ctx1", "decode-ctx2") if setup.wants(name)]

    monkeypatch.setattr("serval.bench.decode.collect", collect)
    out = tmp_path / "decode.json"
    with pytest.raises(ConfigError, match=r"'zzz'.*decode-ctx1, decode-ctx2"):
        bench.run("decode", out, quick=True, only="zzz", note=quiet)
    assert not out.exists()


def test_the_memory_of_a_cache_layout_is_what_the_layout_says() -> None:
    assert cache_bytes_per_number("full") == 4.0
    assert cache_bytes_per_number("int8") == (64 + 64 + 2 * 4) / 128


def test_reports_survive_the_disk_and_merge(tmp_path: Path) -> None:
    path = tmp_path / "results" / "decode.json"
    write_report(report(), path)
    assert read_report(path) == report()
    assert [p.name for p in path.parent.iterdir()] == ["decode.json"]
    newer = Report("decode", MACHINE, [Case("float32-decode", 0.4, "other", 0.8, 2.0)])
    merged = merge_report(read_report(path), newer)
    assert [c.ours for c in merged.cases] == [0.01, 0.4, None]
    with pytest.raises(ConfigError, match="'train'"):
        merge_report(Report("train", MACHINE, []), newer)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a benchmark report"):
        read_report(path)


def test_cases_of_other_threads_keep_their_machine(tmp_path: Path) -> None:
    path, page = tmp_path / "decode.json", tmp_path / "page.md"
    write_report(report(), path)
    single = {**MACHINE, "threads": 1}
    newer = Report("decode", single, [Case("float32-decode", 0.4, "other", 0.8, 2.0)])
    write_report(merge_report(read_report(path), newer), path)
    merged = read_report(path)
    assert [case.machine for case in merged.cases] == [MACHINE, None, MACHINE]
    assert merged.machines() == [single, MACHINE]
    assert printed_by(merged).count("thread") == 2
    page.write_text(f"{BEGIN}\n{END}\n")
    update_readme([path], page)
    assert page.read_text().count("Printed by") == 2
    back = merge_report(merged, replace(report(), machine=MACHINE))
    assert back.machines() == [MACHINE]


def test_the_readme_table_replaces_what_stands_between_the_marks(tmp_path: Path) -> None:
    file, readme = tmp_path / "decode.json", tmp_path / "README.md"
    write_report(report(), file)
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    for _ in range(2):
        update_readme([file], readme)
    text = readme.read_text()
    assert text.startswith(f"above\n{BEGIN}\n| benchmark")
    assert text.endswith(f"{END}\nbelow\n")
    assert "old" not in text
    assert "100 tokens/s | llama.cpp Q4_0 | 50 tokens/s | **2.00x** (1.90-2.10) | 71% |" in text
    assert "missing: pip install other" in text
    assert "a processor, 2 threads" in text
    update_readme([Path(f"{file}:{report().cases[0].case}")], readme)
    assert "missing: pip install other" not in readme.read_text()
    assert "llama.cpp Q4_0 | 50 tokens/s" in readme.read_text()
    with pytest.raises(ConfigError, match=r"no case of .*'nothing'"):
        update_readme([Path(f"{file}:nothing")], readme)
    readme.write_text("no marks")
    with pytest.raises(ConfigError, match="lacks the marks"):
        update_readme([file], readme)


def test_the_console_table_prints_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report())
    shown = capsys.readouterr().out
    assert "2.00x" in shown
    assert "perplexity 3.21" in shown
    absent = Case("x", 1.0, "peer", missing="pip install 'serval-llm[bench]'")
    print_report(Report("decode", MACHINE, [absent]))
    assert "serval-llm[bench]" in capsys.readouterr().out  # no markup


class Target:
    """What the workers of these tests run."""

    def __init__(self, value: int = 0, peer: str | None = None) -> None:
        if peer is not None:
            raise MissingPeerError(peer, "pip install it")
        self.value = value

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value

    def threads(self) -> str:
        return os.environ["OMP_NUM_THREADS"]

    def fail(self) -> None:
        raise ValueError("wrong")

    def die(self) -> None:
        os.write(2, b"last words")
        os._exit(3)


TARGET = f"{__name__}:Target"


def test_a_worker_keeps_its_object_and_passes_errors_on() -> None:
    worker = Worker(TARGET, {"value": 1}, threads=3)
    assert worker.call("add", 2) == 3
    assert worker.call("add", 2) == 5
    assert worker.call("threads") == "3"
    assert worker.peak_bytes() >= worker.resident_bytes() > 0
    with pytest.raises(WorkerError, match="ValueError: wrong"):
        worker.call("fail")
    with pytest.raises(WorkerError, match=r"(?s)code 3.*last words"):
        worker.call("die")
    worker.close()
    with pytest.raises(MissingPeerError, match="engine is not installed; run: pip install it"):
        Worker(TARGET, {"peer": "engine"}, threads=1)


def test_the_pool_ends_the_largest_workers_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"bytes": 100}
    monkeypatch.setattr("serval.bench.worker.memory_bytes", lambda: free["bytes"])
    started: list[str] = []

    class Fake:
        def __init__(self, target: str, arguments: dict[str, Any], threads: int) -> None:
            self.size = arguments["size"]
            free["bytes"] -= self.size
            started.append(target)

        def close(self) -> None:
            free["bytes"] += self.size

    monkeypatch.setattr("serval.bench.worker.Worker", Fake)
    with WorkerPool(1, reserve=0) as pool:
        for name, size in (("a", 60), ("b", 30), ("c", 50), ("b", 30), ("a", 60)):
            pool.get(name, name, {"size": size}, size)
        assert started == ["a", "b", "c", "a"]
    assert free["bytes"] == 100


def test_benchmarks_are_registered_and_unknown_names_refused() -> None:
    assert {"decode", "prefill", "train", "serve"} <= set(bench.BENCHES)
    with pytest.raises(ConfigError, match="unknown benchmark 'fast'"):
        bench.run("fast")


def test_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(setup: Setup) -> list[Case]:
        names = [name for name in ("a-ctx1", "b-ctx2") if setup.wants(name)]
        outcome = Outcome("ours", [Sample(1.0)])
        return [compare(name, outcome, None) for name in names]

    entry = bench.BENCHES["decode"]
    monkeypatch.setattr(type(entry), "load", lambda self: collect)
    path = tmp_path / "decode.json"
    bench.run("decode", path, quick=True, note=quiet)
    bench.run("decode", path, quick=True, only="ctx2", note=quiet)
    found = read_report(path)
    assert [case.case for case in found.cases] == ["a-ctx1", "b-ctx2"]
    assert found.quick
    assert found.machine["threads"] >= 1
    assert found.machine["cpu"]
