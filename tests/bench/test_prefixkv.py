"""`serval bench prefixkv` on few tokens, and its picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from serval import bench
from serval.bench import prefixkv_report
from serval.bench.harness import Case, Report
from serval.bench.prefixkv import POLICIES
from serval.errors import ConfigError


def test_quick_run_and_picture(tmp_path: Path) -> None:
    target = tmp_path / "prefixkv.json"
    (report,) = bench.run("prefixkv", target, quick=True, note=lambda _: None)
    cases = {case.case: case for case in report.cases}
    assert {f"serval-tiny-{policy}-keep20" for policy in POLICIES} < set(cases)
    shared = cases["importance"].metrics
    assert len(shared["gini"]) == len(shared["lorenz"]) == 6
    assert all(0 <= value <= 1 for value in shared["gini"])
    assert shared["least_retained_prefixkv_20"] > shared["least_retained_uniform_20"]
    for policy in POLICIES:
        metrics = cases[f"serval-tiny-{policy}-keep20"].metrics
        assert metrics["perplexity"] > 1
        assert metrics["kl"] > 0
        assert 0 <= metrics["retrieval"] <= 1
    built = cases["constructed-layers-keep20"].metrics
    assert built["largest_error_prefixkv"] < built["largest_error_uniform"]
    speed = cases["tiny-decode-keep20"]
    assert speed.ours is not None
    assert speed.peer_value is not None
    assert 0.15 < speed.metrics["kept_bytes_fraction"] < 0.45  # whole blocks of short layers
    picture = tmp_path / "prefixkv.png"
    prefixkv_report.main([str(target), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = prefixkv_report.result_table(report)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert f"| {cases['tiny-decode-keep20'].ratio:.2f}x |" in table
    for policy in POLICIES:
        score = cases[f"serval-tiny-{policy}-keep20"].metrics
        cells = f"{score['perplexity']:.1f} | {score['retrieval']:.0%}"
        assert f"| {policy} | {cells} |" in lines
    assert f"| {built['largest_error_prefixkv']:.2f} |" in table


def test_a_picture_needs_both_halves(tmp_path: Path) -> None:
    report = Report("prefixkv", {}, [Case("tiny-decode-keep20", 1.0)])
    with pytest.raises(ConfigError, match="without --only"):
        prefixkv_report.draw(report, tmp_path / "none.png")
