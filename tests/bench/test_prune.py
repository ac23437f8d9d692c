"""`serval bench prune` on few steps and random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serval import bench
from serval.bench import prune as bench_prune
from serval.bench.harness import Setup
from serval.bench.prune import FULL, METHODS, ONE_SHOT, QUICK_EFFORT, Bench, Size, collect
from serval.bench.table import read_report
from serval.compress.maskprune.rows import RowStream


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two budgets, ten steps; the corpus is not tokenised."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6144, (16,), generator=generator) for _ in range(8)]
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr("serval.bench.prune.QUICK", Size((0.8, 0.5), 10, 1, 16, 1, 8, 3, 1))
    monkeypatch.setattr("serval.bench.prune.make_stream", lambda *_, **__: RowStream(rows, 0))


@pytest.mark.usefixtures("small")
def test_methods_share_the_learnt_widths_and_finished_runs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "prune.json"
    bench.run("prune", target, quick=True, only="-80-", note=lambda _: None)
    by_name = {case.case: case for case in read_report(target).cases}
    assert set(by_name) == {f"serval-tiny-80-{name}" for name in (*METHODS, "speed")}
    learnt = by_name["serval-tiny-80-maskprune"].metrics
    for method in METHODS:
        metrics = by_name[f"serval-tiny-80-{method}"].metrics
        assert 0.75 < metrics["parameters_kept"] <= 0.8
        assert metrics["perplexity"] > 1
        assert metrics["steps"] == (10 if method in ("maskprune", "taylor-long") else 4)
        if method in ONE_SHOT:
            for key in ("key_value_heads", "intermediate_size", "parameters"):
                assert metrics[key] == learnt[key]
    speed = by_name["serval-tiny-80-speed"]
    assert speed.ratio == pytest.approx(speed.peer_value / speed.ours, rel=1e-3)
    assert [speed.metrics["channels"]] == learnt["intermediate_size"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kept result was computed again")

    monkeypatch.setattr("serval.bench.prune.prune_decoder", refuse)
    assert learnt["perplexities"] == [learnt["perplexity"]]
    gap = by_name["serval-tiny-80-random"].metrics["against_maskprune"]
    others = by_name["serval-tiny-80-random"].metrics["perplexity"]
    assert gap == pytest.approx(others - learnt["perplexity"], abs=1e-3 * others)
    again = collect(Setup(quick=True, only="80-wanda", note=lambda _: None))
    kept = by_name["serval-tiny-80-wanda"].metrics["perplexity"]
    assert [case.metrics["perplexity"] for case in again] == [pytest.approx(kept, rel=1e-4)]


@pytest.mark.usefixtures("small")
def test_seeds_differ_and_rankings_follow_their_own_seed(tmp_path: Path) -> None:
    model = Bench(bench_prune.QUICK, QUICK_EFFORT, 2, lambda line: None)
    learnt = [model.learnt(0.5, seed) for seed in range(2)]
    taught = model.results("maskprune", 0.5)
    ranked = model.results("wanda", 0.5)
    assert [run["widths"] for run in ranked] == learnt
    assert taught[0]["perplexity"] != taught[1]["perplexity"]
    assert ranked[0]["perplexity"] != ranked[1]["perplexity"]


def test_the_full_run_measures_every_method_at_three_sizes() -> None:
    assert FULL.keeps == (0.8, 0.65, 0.5)
    assert set(METHODS) >= {"maskprune", "taylor", "wanda", "magnitude", "uniform", "random"}
