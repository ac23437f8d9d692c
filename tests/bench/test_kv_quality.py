"""`serval bench kv-quality` on few tokens, its report, and the generator of unequal norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from serval import bench
from serval.bench import kv_quality_report
from serval.bench.harness import Case, Report
from serval.bench.kv_quality import IMBALANCED, Variant, imbalance_case, variants
from serval.bench.norm_imbalance import REGIMES, draw, errors
from serval.bench.table import BEGIN, END, read_report, write_report
from serval.cache.layouts import layout_class
from serval.errors import ConfigError

MACHINE = {"cpu": "a CPU", "threads": 2, "torch": "2", "date": "today"}


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    target = tmp_path / "kv-quality.json"
    bench.run("kv-quality", target, quick=True, only="oscar window", note=lambda _: None)
    report = read_report(target)
    assert report.quick
    full, ours = (case.metrics for case in report.cases)
    assert [case.case for case in report.cases] == ["full", "oscar window 32"]
    assert full["kl"] == pytest.approx(0, abs=1e-5)
    assert full["retrieval_seeds"] == [full["retrieval"]]
    assert full["perplexity_change"] == full["retrieval_change"] == 0
    assert ours["kl"] > 1e-3  # what is measured sees quantised keys
    assert 2 < ours["bits"] < 4 < full["bits"]
    assert full["served_perplexity"] == pytest.approx(full["perplexity"], rel=1e-5)
    assert ours["served_perplexity"] < ours["perplexity"]  # one chunk: exact
    with pytest.raises(SystemExit):
        kv_quality_report.main([str(target), "--page", str(tmp_path / "page.md")])


def test_every_layout_is_measured_at_both_windows() -> None:
    names = [variant.name for variant in variants(quick=False)]
    assert len(set(names)) == len(names)
    for kv in ("int4", "q4_0", "int2", "kivi", "oscar", "oscar:zero=min", "oscar:bits=4"):
        assert {f"{kv} window 32", f"{kv} window 128"} <= set(names)
    for variant in variants(quick=False):
        assert layout_class(variant.layout)
    assert Variant("oscar:bits=4", 32).layout == "oscar:bits=4,residual=32"


def test_unequal_norms_are_those_of_the_regime() -> None:
    for regime in REGIMES:
        keys = draw(regime, 3)
        norms = keys.k.flatten(1).norm(dim=1)
        ratio = norms[~keys.short].mean() / norms[keys.short].mean()
        assert ratio == pytest.approx(8 if regime == "modalities" else 20, rel=0.1)
        assert torch.equal(keys.k, draw(regime, 3).k)
    assert draw("rare-sinks", 0).short.sum() * 4 == draw("sinks", 0).short.sum()
    with pytest.raises(ConfigError, match="nothing"):
        draw("nothing", 0)


def test_oscar_serves_tokens_of_any_norm() -> None:
    """The orderings of the paper's analysis, on the generator; per-channel keys without norms lose
    short tokens altogether."""
    found = {kv: imbalance_case("modalities", kv, 2).metrics for kv in IMBALANCED}
    ours = found["oscar"]
    assert ours["token_error"] < 0.3 < found["kivi"]["token_error"]
    assert found["int2"]["token_error"] > 2 * ours["token_error"]
    low, high = ours["token_error_spread"]
    assert low <= ours["token_error"] <= high
    rotated_only = "oscar:norms=false"
    assert errors(rotated_only, draw("sinks", 0)).short_token > 0.8
    assert errors("oscar", draw("sinks", 0)).short_token < 0.3
    with pytest.raises(ConfigError, match="int8"):
        errors("int8", draw("sinks", 0))


def made(retrieval_change: float) -> Report:
    """A report with the cases that claims are about."""
    model = {
        "perplexity": 5.0, "kl": 0.01, "same_top": 0.9, "retrieval": 0.8, "variables": 0.5,
        "retrieval_spread": [0.7, 0.9], "variables_spread": [0.4, 0.6], "bits": 3.0,
        "perplexity_change": 0.01, "served_perplexity_change": 0.005,
        "retrieval_change": retrieval_change,
    }  # fmt: skip
    cases = [Case("full", None, metrics={**model, "kv": "full", "window": 0})]
    for kv, kl in (("oscar", 0.01), ("kivi", 0.02)):
        for window in (32, 128):
            metrics = {**model, "kv": f"{kv}:residual={window}", "window": window, "kl": kl}
            cases.append(Case(f"{kv} window {window}", None, metrics=metrics))
    cases += [imbalance_case("modalities", kv, 1) for kv in ("kivi", "int2", "oscar")]
    return Report("kv-quality", MACHINE, cases)


def test_the_report_says_whether_claims_are_met(tmp_path: Path) -> None:
    for change, verdict in ((-0.5, "met"), (-3.0, "not met")):
        (line,) = [x for x in kv_quality_report.findings(made(change)) if "2 %" in x]
        assert line.endswith(f": {verdict}, met, met.")
    several = made(0.0)
    for case in several.cases:
        case.metrics["retrieval_error"] = 0.84
    assert any("-0.0 ± 0.8 points" in line for line in kv_quality_report.findings(several))
    lines = kv_quality_report.findings(made(0.0))
    assert any("0.50 of that of kivi" in line for line in lines)
    assert sum("Keys of two norms" in line for line in lines) == 2
    page, picture, source = (tmp_path / name for name in ("page.md", "p.png", "r.json"))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter")
    write_report(made(0.0), source)
    kv_quality_report.main([str(source), "--page", str(page), "--picture", str(picture)])
    text = page.read_text()
    assert text.startswith("before")
    assert "old" not in text
    assert "| `oscar` | 128 |" in text
    assert picture.stat().st_size > 10_000
    assert json.loads(source.read_text())["bench"] == "kv-quality"
