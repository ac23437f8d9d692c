from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from serval.engine.llm import LLM
from serval.errors import ConfigError, DataError
from serval.evaluate import EvalOptions, run
from serval.evaluate.pipeline import EvalResult
from serval.evaluate.plots import bars, grouped_bars
from serval.evaluate.progress import progress_bar
from serval.evaluate.report import print_result, write, write_json
from serval.evaluate.retrieval import Cell
from serval.evaluate.speed import cache_bytes, measure_speed, weight_bytes
from serval.evaluate.texts import evaluation_texts
from tests.evaluate.toy import toy_decoder


def small(model: Path, texts: Path, **changes) -> EvalOptions:
    values = {
        "text": str(texts),
        "text_tokens": 300,
        "window": 64,
        "tasks": ("needle",),
        "lengths": [96],
        "samples": 1,
        "depths": 2,
    } | changes
    return EvalOptions(model, **values)


def test_run_measures_what_was_asked(model, texts, tmp_path):
    stages: list[tuple[str, int, int]] = []
    options = small(model, texts, kv="int8", reference=model)
    result = run(options, lambda *stage: stages.append(stage))
    assert result.text.tokens == 300
    assert 0 < result.text.kl < 0.1
    assert sum(cell.total for cell in result.cells) == 2
    assert [s for s in stages if s[0] == "text"][-1][1:] == (300, 300)
    assert stages[-1] == ("retrieval", 2, 2)
    console = Console(record=True, width=100, file=StringIO())
    print_result(result, console)
    shown = console.export_text()
    assert "perplexity" in shown
    assert "KL from the reference" in shown
    assert "needle" in shown
    written = write(result, tmp_path / "out")
    assert [path.name for path in written] == ["result.json", "retrieval.png"]
    values = json.loads(written[0].read_text())
    assert values["text"]["tokens"] == 300
    assert values["retrieval"]["all"] == result.retrieval
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_result(model, texts):
    first, second = (run(small(model, texts, tasks=())) for _ in range(2))
    assert first.text == second.text
    assert math.isnan(first.retrieval)


def test_only_what_is_asked_for_is_measured(model, texts):
    result = run(small(model, texts, text_tokens=0))
    assert result.text is None
    assert result.cells


def test_held_out_text_follows_the_models_recipe(model, tmp_path, texts):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{source: folder, path: {texts}, validation_fraction: 0.999}}\n")
    documents = evaluation_texts(None, tmp_path)
    assert 0 < len(documents) <= 6
    assert documents[0] in {path.read_text() for path in texts.iterdir()}
    recipe.write_text("data: {source: folder, path: /nowhere}\n")
    with pytest.raises(DataError, match=r"nowhere.*recipe\.yaml; choose another with --text"):
        evaluation_texts(None, tmp_path)
    recipe.write_text("data: {sauce: folder}\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        evaluation_texts(None, tmp_path)
    recipe.write_text("[")
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        evaluation_texts(None, tmp_path)


def test_text_sources(tmp_path, texts):
    assert len(evaluation_texts(str(texts), tmp_path)) == 6
    one = texts / "0.py"
    assert evaluation_texts(str(one), tmp_path) == [one.read_text()]
    (tmp_path / "x.jsonl").write_text('{"text": "hello"}\n')
    assert evaluation_texts(str(tmp_path / "x.jsonl"), tmp_path) == ["hello"]
    with pytest.raises(DataError, match="does not exist"):
        evaluation_texts(str(tmp_path / "nowhere"), tmp_path)


def test_bad_options_are_named(model, texts):
    with pytest.raises(ConfigError, match="1024 tokens exceeds the model's 512"):
        run(small(model, texts, lengths=[1024]))
    with pytest.raises(ConfigError, match="window of 1024 tokens exceeds the model's 512"):
        run(small(model, texts, window=1024))
    with pytest.raises(ConfigError, match="unknown task 'haystack'"):
        run(small(model, texts, tasks=("haystack",)))
    with pytest.raises(ConfigError, match="unknown cache layout 'int3'"):
        run(small(model, texts, kv="int3"))


def test_speed_and_sizes():
    decoder = toy_decoder()
    llm = LLM(decoder, prefix_caching=False)
    speed = measure_speed(llm, batch=2, prompt=16, output=6, repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0
    assert weight_bytes(decoder) == 4 * sum(p.numel() for p in decoder.parameters())
    assert cache_bytes(decoder, "full") == 2 * 2 * (16 + 16) * 4
    assert cache_bytes(decoder, "int8") == 2 * 2 * (16 + 16 + 8)


def test_plots_and_json_take_missing_numbers(tmp_path):
    assert bars({"a": 1.0, "b": 2.0}, "t", "MB").startswith(b"\x89PNG")
    groups = {"one": {"x": 1.0}, "two": {"x": 2.0, "y": 3.0}}
    assert grouped_bars(groups, "t").startswith(b"\x89PNG")
    path = write_json({"x": float("nan"), "y": [float("inf"), 1.5], "p": tmp_path}, tmp_path / "j")
    assert json.loads(path.read_text()) == {"x": None, "y": [None, 1.5], "p": str(tmp_path)}
    with pytest.raises(DataError, match="cannot write"):
        write_json({}, tmp_path / "j" / "below-a-file")


def test_by_task_and_progress_bar():
    cells = [Cell("a", 64, 0.5, 1, 2), Cell("b", 64, 0.5, 2, 2)]
    result = EvalResult("m", "full", cells=cells)
    assert result.by_task() == {"a": 0.5, "b": 1.0}
    assert result.retrieval == 0.75
    with progress_bar(Console(file=StringIO())) as report:
        report("text", 0, 10)
        report("text", 10, 10)
