"""The models in `assets/`: they load, are small, and predict Python better than chance by far."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serval.data.tokenizer import load_tokenizer
from serval.errors import ConfigError
from serval.evaluate.perplexity import cut, score
from serval.evaluate.scorer import Scorer
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.train.recipe import load_recipe

TEXT = '''
def read_lines(path, encoding="utf-8"):
    """Read a text file and return its lines."""
    lines = []
    with open(path, encoding=encoding) as file:
        for line in file:
            lines.append(line.rstrip())
    return lines
'''

ASSETS = {
    "serval-tiny": "qwen3",
    "serval-tiny-moe": "qwen3_moe",
    "serval-tiny-mla": "glm4_moe_lite",
}


@pytest.mark.parametrize(("name", "family"), ASSETS.items())
def test_each_shipped_model_is_a_language_model(name: str, family: str) -> None:
    directory = shipped_model(f"assets/{name}")
    decoder = checkpoint.load(directory).eval()
    assert decoder.config.family == family
    ids = load_tokenizer(directory)(TEXT)["input_ids"]
    assert max(ids) < decoder.config.vocab_size
    result = score(Scorer(decoder), cut([ids], window=256))
    assert result.perplexity < 30  # even odds over the vocabulary: 6144


@pytest.mark.parametrize("name", ["serval-tiny-moe", "serval-tiny-mla"])
def test_the_small_models_come_with_what_made_them(name: str) -> None:
    directory = shipped_model(f"assets/{name}")
    files = {path.name for path in directory.iterdir()}
    assert {"README.md", "recipe.yaml", "log.jsonl", "loss.png", "eval.json"} <= files
    assert (directory / "model.safetensors").stat().st_size < 8e6
    shipped, tiny = (shipped_model(f"assets/{n}") / "tokenizer.json" for n in (name, "serval-tiny"))
    assert shipped.read_bytes() == tiny.read_bytes()
    kept = yaml.safe_load((directory / "recipe.yaml").read_text())
    assert kept == yaml.safe_load(Path(f"recipes/{name}.yaml").read_text())
    config = checkpoint.read_config(directory)
    widths = [config.hidden_size, config.intermediate_size, config.moe.intermediate_size]
    assert all(width % 128 == 0 for width in widths)
    load_recipe(directory / "recipe.yaml")


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="assets/none was not found here"):
        shipped_model("assets/none")
