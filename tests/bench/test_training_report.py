"""Tables and pictures of the training benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serval.bench import BENCHES
from serval.bench.harness import Case, Report
from serval.bench.table import BEGIN, END, write_report
from serval.bench.training_report import LAYOUTS, main, picture, result_table
from serval.errors import ConfigError

MACHINE = {"cpu": "CPU", "threads": 2, "torch": "2.0", "date": "2026-01-01"}


def of_arm(losses: list[float], **more: Any) -> dict[str, Any]:
    return {"losses": losses, "validation_loss": sum(losses) / len(losses), "lr": 4e-3, **more}


CASES = {
    "optim-quality": [
        Case("adamw-dense", None, metrics=of_arm([4.0, 4.2], lr_at_edge=True, eigenvalue=20.0)),
        Case("mona-lite-moe", None, metrics=of_arm([3.5, 3.6], share_of_tokens_to_adamw=0.5)),
    ],
    "wisca": [
        Case("none-gqa", None, metrics=of_arm([3.0, 3.2])),
        Case(
            "every-250-gqa",
            None,
            metrics=of_arm([2.9, 3.1], against_none=-0.1, against_none_error=0.01, better="2/2"),
        ),
    ],
    "afa-lora": [
        Case("expressiveness-lora", None, metrics={"losses": [0.5], "energy_left": 0.5}),
        Case("afa-lora-r8", None, metrics={"losses": [3.0, 3.5], "test_loss": 3.25, "rank": 8}),
        Case("dora-r8", None, peer="PEFT", missing="pip install 'serval-llm[adapt]'"),
    ],
    "prune": [
        Case("serval-tiny-100", None, metrics={"perplexity": 7.0}),
        Case(
            "serval-tiny-50-taylor-long",
            None,
            metrics={"perplexity": 20.5, "perplexities": [20.5], "steps": 125},
        ),
        Case("serval-tiny-50-speed", 0.1, metrics={"tokens_per_second": 700.4}),
    ],
}


def report(bench: str, quick: bool = False) -> Report:
    return Report(bench, MACHINE, CASES[bench], quick)


def test_every_layout_is_of_a_benchmark_and_tested_here() -> None:
    assert CASES.keys() == LAYOUTS.keys() <= BENCHES.keys()


@pytest.mark.parametrize("bench", LAYOUTS)
def test_a_line_per_case_and_no_empty_column(bench: str) -> None:
    lines = result_table(report(bench)).splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in table[2:]] == [case.case for case in CASES[bench]]
    columns = [line.strip().strip("|").split("|") for line in lines if line.startswith("| ")]
    for column in range(len(columns[0])):
        assert any(row[column].strip() for row in columns[2:])
    assert f"serval bench {bench}" in lines[-1]


def test_cells_say_what_was_measured() -> None:
    text = result_table(report("optim-quality"))
    assert "| adamw-dense | 0.004 (edge) | 4.100 (4.000-4.200) |  | 20.0 |" in text
    assert "50%" in text
    assert "-0.1000 ± 0.0100 | 2/2" in result_table(report("wisca"))
    assert "not installed: pip install" in result_table(report("afa-lora"))


@pytest.mark.parametrize("bench", LAYOUTS)
def test_page_and_picture(bench: str, tmp_path: Path) -> None:
    source, page, image = (tmp_path / name for name in ("r.json", "page.md", "sub/p.png"))
    write_report(report(bench), source)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(source), "--page", str(page), "--picture", str(image)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert image.read_bytes().startswith(b"\x89PNG")
    write_report(report(bench, quick=True), source)
    with pytest.raises(SystemExit):
        main([str(source), "--page", str(page)])


def test_other_reports_and_empty_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match="a report of 'kv'; this shows those of: optim-quality"):
        result_table(Report("kv", MACHINE, []))
    with pytest.raises(ConfigError, match="no case that could be drawn"):
        picture(Report("prune", MACHINE, [Case("serval-tiny-100", None)]))
