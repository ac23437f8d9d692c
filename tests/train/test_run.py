"""`serval train` from recipe to exported model, on a folder of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from serval.errors import ConfigError, DataError, MissingExtraError, ServalError
from serval.evaluate.texts import evaluation_texts
from serval.models import checkpoint as model_checkpoint
from serval.train import reporting
from serval.train import run as run_module
from serval.train.reporting import Callback
from serval.train.run import run

RECIPE = """
output: {output}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 48
  max_position_embeddings: 64
data:
  source: folder
  path: {text}
  row_tokens: 64
  validation_fraction: 0.3
  validation_rows: 2
  tokenizer: {{vocab_size: 300}}
optimizer: {{name: muon, lr: 3e-3}}
schedule: {{warmup_steps: 1, decay_steps: 2}}
train: {{steps: 6, batch_rows: 2, dtype: float32, deterministic: true}}
validation: {{every: 3}}
checkpoint: {{every: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        words = " ".join(f"word{(number * 7 + i) % 31} is {i}" for i in range(120))
        (text / f"{number}.txt").write_text(f"document {number}: {words}")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out", text=text))
    return path


@pytest.fixture(autouse=True)
def _forget_determinism() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


class Break(Callback):
    def on_step_end(self, step: int, *rest: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt


def test_a_recipe_becomes_a_model_and_a_crash_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[Break()], note=notes.append)
    result = run(recipe, note=notes.append)
    assert result.model is not None
    assert any("resumed from" in line and "at step 2" in line for line in notes)
    other = run(recipe, overrides=[f"output={tmp_path / 'other'}"], note=notes.append)
    assert other.model is not None
    left = model_checkpoint.load(result.model, dtype=torch.float32)
    right = model_checkpoint.load(other.model, dtype=torch.float32)
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    again = run(recipe, note=notes.append)  # nothing left to do: the model is written again
    assert again.step == 6


def test_the_result_is_scored_on_what_was_held_out(recipe: Path, tmp_path: Path) -> None:
    result = run(recipe, overrides=["train.steps=3"], note=lambda line: None)
    assert result.model is not None
    notes: list[str] = []
    scored = evaluation_texts(None, result.model, notes.append)
    assert 0 < len(scored) < 20
    assert all(text.startswith("document ") for text in scored)
    (line,) = notes
    assert str(tmp_path / "text") in line
    assert str(result.model / "recipe.yaml") in line


def test_the_result_loads_in_transformers(recipe: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = run(recipe, overrides=["train.steps=3"], note=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model)
    prompt = tokenizer("word1 is", return_tensors="pt")
    with torch.no_grad():
        assert model(**prompt).logits.isfinite().all()
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )


def test_training_continues_from_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    first = run(recipe, overrides=["train.steps=3"], note=lambda line: None)
    text = recipe.read_text()
    head, tail = text.split("model:\n", 1)
    tail = tail[tail.index("data:") :].replace("{vocab_size: 300}", f"{{path: {first.model}}}")
    more = tmp_path / "more.yaml"
    more.write_text(f"{head}model: {{path: {first.model}}}\n{tail}")
    second = run(more, overrides=[f"output={tmp_path / 'more'}"], note=lambda line: None)
    assert second.step == 6
    with pytest.raises(ConfigError, match=r"model\.hidden_size: not allowed beside model\.path"):
        run(more, overrides=[f"output={tmp_path / 'z'}", "model.hidden_size=3"])


def test_fresh_forgets_the_earlier_run(recipe: Path) -> None:
    run(recipe, note=lambda line: None)
    notes: list[str] = []
    run(recipe, fresh=True, overrides=["train.steps=3"], note=notes.append)
    assert not any("resumed" in line for line in notes)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("optimizer.name=sgd", ConfigError, "unknown optimizer 'sgd'"),
        ("schedule.name=step", ConfigError, "unknown schedule 'step'"),
        ("data.source=web", ConfigError, "unknown data source 'web'"),
        ("data.path=/nonexistent", DataError, "not a folder"),
        ("data.row_tokens=128", ConfigError, r"data\.row_tokens 128 exceeds"),
        ("model.vocab_size=10", ConfigError, r"model\.vocab_size is 10, the tokenizer has 300"),
        ("schedule.warmup_steps=9", ConfigError, "exceed the 6 steps"),
        ("train.micro_batch_rows=3", ConfigError, r"train\.batch_rows is 2; expected a multiple"),
        ("output=/proc/nothing/here", ConfigError, "output: cannot create"),
    ],
)
def test_bad_values_are_explained(
    recipe: Path, override: str, error: type[ServalError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(recipe, overrides=[override], note=lambda line: None)


def test_a_folder_without_text_is_explained(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text in folder"):
        run(recipe, overrides=[f"data.path={tmp_path / 'empty'}"], note=lambda line: None)


def test_missing_tensorboard_is_one_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(reporting.TensorBoard):
        def __init__(self, directory: Path) -> None:
            raise MissingExtraError("tensorboard", "train")

    monkeypatch.setattr(run_module, "TensorBoard", Missing)
    notes: list[str] = []
    run(recipe, overrides=["tensorboard=true", "train.steps=3"], note=notes.append)
    told = [line for line in notes if "no TensorBoard log" in line]
    assert len(told) == 1
    assert "pip install 'serval-llm[train]'" in told[0]


def test_a_recipe_switches_methods_on_and_the_log_shows_them(recipe: Path, tmp_path: Path) -> None:
    section = ["callbacks.wisca={every: 2}", "train.steps=4", "checkpoint.every=1"]
    result = run(recipe, overrides=section, note=lambda line: None)
    assert result.model is not None
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "wisca_qk" in line] == [2, 4]
    decoder = model_checkpoint.load(result.model, dtype=torch.float32)
    attention = decoder.layers[0].self_attn
    q, k = (p.weight.detach().abs().sum() for p in (attention.q_proj, attention.k_proj))
    assert float(q / k) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ConfigError, match=r"written with callbacks\.wisca\.every = 2"):
        run(recipe, overrides=[*section, "callbacks.wisca.every=3"], note=lambda line: None)
