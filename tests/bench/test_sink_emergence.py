"""The bigram-backcopy experiment: its data, its variants, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from serval.bench import sink_emergence as bench
from serval.bench.harness import Report, Setup
from serval.bench.table import write_report


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path / "kept"))
    return tmp_path


def test_the_data_follow_the_table_and_copy_after_triggers() -> None:
    task = bench.Task()
    rows = task.draw(2000, torch.Generator().manual_seed(0))
    assert (rows[:, 0] == task.bos).all()
    assert (rows[:, 1:] != task.bos).sum() == rows[:, 1:].numel()
    now, follow = rows[:, 1:-1], rows[:, 2:]
    trigger = now < task.triggers
    assert torch.equal(follow[trigger], rows[:, :-2][trigger])
    table = task.table()
    torch.testing.assert_close(table.sum(-1), torch.ones(task.tokens))
    token = 10
    drawn = torch.bincount(follow[now == token], minlength=task.tokens) / (now == token).sum()
    torch.testing.assert_close(drawn, table[token], atol=0.04, rtol=0)
    assert drawn[: task.triggers].sum().item() == pytest.approx(0.15, abs=0.04)


@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_variants_are_causal_and_train(variant: str) -> None:
    """What comes later changes no earlier row; every parameter gets a gradient."""
    task = bench.QUICK
    torch.manual_seed(0)
    model = bench.OneHead(task, variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows = task.draw(4, torch.Generator().manual_seed(1))[:, :-1]
    logits, weights, _ = model(rows)
    other = rows.clone()
    other[:, -1] = (other[:, -1] + 1) % task.tokens
    torch.testing.assert_close(model(other)[0][:, :-1], logits[:, :-1])
    assert (weights.triu(1) == 0).all()
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_measures_from_known_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOS' own row is left out; ordinary and trigger queries are kept apart."""
    task = bench.QUICK
    model = bench.OneHead(task, "softmax")
    rows = torch.full((1, task.length + 1), 10)
    rows[0, 0], rows[0, 4] = task.bos, 1
    weights = torch.zeros(1, task.length, task.length)
    weights[:, :, 0], weights[:, 4, 0], weights[:, 4, 3] = 0.5, 0.1, 0.9
    values = torch.ones(1, task.length, task.width)
    values[:, 0] = 0.25
    logits = torch.zeros(1, task.length, task.tokens + 1)
    monkeypatch.setattr(bench.OneHead, "forward", lambda self, tokens: (logits, weights, values))
    found = bench.measure(model, rows)
    assert found["bos_ordinary"] == pytest.approx(0.5)
    assert found["bos_trigger"] == pytest.approx(0.1)
    assert found["row_sum_trigger"] == pytest.approx(1.0)
    assert found["bos_value"] == pytest.approx(0.25)
    assert found["trigger_loss"] == pytest.approx(torch.tensor(25.0).log().item())


def test_orderings_name_what_failed() -> None:
    good = {"bos_ordinary": 0.3, "bos_trigger": 0.001, "bos_value": 0.2, "row_sum_ordinary": 0.1}
    weak = good | {"bos_ordinary": 0.1}
    runs = {"softmax": [good, good], "gate headwise": [weak, good], "sigmoid": [weak, weak]}
    held = bench.orderings(runs)
    assert held["gate headwise: BOS gets less than half of softmax's weight"] == [True, False]
    assert held["sigmoid: ordinary rows sum to less than 0.3"] == [True, True]
    assert all(all(v) for k, v in held.items() if k.startswith("softmax"))


def test_quick_run_report_and_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    setup = Setup(quick=True, only="so", note=notes.append)
    cases = bench.collect(setup)
    names = [case.case for case in cases]
    assert names[:3] == ["softmax", "softmax1", "softpick"]
    assert set(bench.MEASURES) <= set(cases[0].metrics)
    assert cases[0].metrics["bos_ordinary_range"][0] <= cases[0].metrics["bos_ordinary"]
    before = len(notes)
    again = bench.collect(Setup(quick=True, only="so", note=notes.append))
    assert [case.metrics for case in again] == [case.metrics for case in cases]  # kept
    assert not any("nats in" in note for note in notes[before:])
    result = folder / "sinks.json"
    machine = {"cpu": "test", "threads": 1}
    write_report(Report("sinks", machine, cases, True), result)
    assert json.loads(result.read_text())["bench"] == "sinks"
    bench.main([str(result), "--picture", str(folder / "sinks.png")])
    assert (folder / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out
