"""The command line's options: what is refused, and that each reaches the code behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import serval
from serval import methods
from serval.cli import app, arguments
from serval.errors import ConfigError
from serval.evaluate import EvalOptions
from serval.server import serve
from serval.train.recipe import load_recipe


def refusal(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"serval {serval.__version__}\n")


def test_lists_and_settings_that_cannot_be_read_name_their_option(tmp_path: Path) -> None:
    assert "--lengths takes whole numbers" in refusal("eval", "model", "--lengths", "abc")
    wrong = ["compress", "model", "--out", str(tmp_path), "--set", "ignore=[1"]
    assert "--set 'ignore=[1': the value is not valid YAML" in refusal(*wrong)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {}\n")
    with pytest.raises(ConfigError, match=r"'train.steps=.1': the value is not valid YAML"):
        load_recipe(recipe, ["train.steps=[1"])
    assert arguments.settings("--set", ["head=true"]) == {"head": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--text-tokens", "-5"], "--text-tokens must be at least 0"),
        (["--window", "1"], "--window must be at least 2"),
        (["--stride", "0"], "--stride must be at least 1"),
        (["--depths", "0"], "--depths must be at least 1"),
        (["--lm-eval-limit", "0"], "--lm-eval-limit must be at least 1"),
        (["--text-tokens", "0", "--tasks", ""], "nothing to measure"),
        (["--text-tokens", "0", "--reference", "other"], "--reference is compared on the text"),
    ],
)
def test_eval_refuses_what_would_measure_nothing(options: list[str], words: str) -> None:
    assert words in refusal("eval", "model", *options)


def test_eval_reads_the_named_field(tmp_path: Path) -> None:
    from serval.evaluate.texts import evaluation_texts

    file = tmp_path / "texts.jsonl"
    file.write_text('{"body": "some words"}\n')
    with pytest.raises(serval.errors.DataError, match="--text-field"):
        evaluation_texts(str(file), tmp_path)
    assert evaluation_texts(str(file), tmp_path, field="body") == ["some words"]
    assert EvalOptions("model", text_field="body").text_field == "body"


def test_serve_hands_the_engine_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[serve.ServeOptions] = []
    monkeypatch.setattr(serve, "run", lambda options: seen.append(options) or 0)
    words = ["serve", "model", "--dtype", "bfloat16", "--block-size", "16", "--seed", "3"]
    more = ["--no-prefix-caching", "--max-sequences", "5000", "--max-batch-tokens", "8000"]
    assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
    assert serve.engine_arguments(seen[0]) == {
        "kv": "full",
        "max_sequences": 5000,
        "max_batch_tokens": 8000,
        "block_size": 16,
        "prefix_caching": False,
        "dtype": torch.bfloat16,
        "seed": 3,
    }
    assert "--dtype must be one of float32" in refusal("serve", "model", "--dtype", "int4")


def test_methods_cut_no_name_and_list_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=80)
    monkeypatch.setattr(methods, "Console", lambda **_: console)
    methods.print_methods()
    shown = console.export_text()
    for registry in methods.registries().values():
        for name, entry in registry.items():
            assert name in shown
            assert not entry.paper or re.fullmatch(r"\d{4}\.\d{5}(, \d{4}\.\d{5})*", entry.paper)
            assert entry.summary
    assert "multi_needle" in shown
    assert "…" not in shown
