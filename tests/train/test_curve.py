"""The loss curve: drawn from a log, resumed steps counted once."""

from __future__ import annotations

import json

from serval.train.curve import draw_curve


def test_curve_is_drawn_from_training_and_validation_rows(tmp_path) -> None:
    rows = [{"step": s, "loss": 5 - s / 100} for s in range(1, 150)]
    rows += [{"step": 100, "loss": 1.0}, {"step": 100, "validation_loss": 2.0}]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(row) for row in rows))
    picture = draw_curve(log, tmp_path / "loss.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.jsonl", "loss.png"]


def test_log_without_steps_draws_nothing(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"step": 0, "validation_loss": 2.0}))
    assert draw_curve(log, tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()
