"""`serval tune` from JSONL to an adapter, a merged model, and back to where it was interrupted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from serval import LLM, SamplingParams
from serval.adapt.merging import merge_checkpoint
from serval.adapt.peft_format import CONFIG, WEIGHTS, load_adapter
from serval.adapt.recipe import load_tune_recipe
from serval.adapt.tune import run
from serval.cli import app
from serval.errors import ConfigError, DataError
from serval.models import checkpoint
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.train.checkpoint import list_checkpoints
from serval.train.reporting import Callback
from tests.adapt.toy import logits
from tests.engine.helpers import VOCAB, byte_tokenizer
from tests.processes import torchrun

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAIRS = [("one", "uno"), ("two", "dos"), ("three", "tres"), ("four", "cuatro")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(
        ModelConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            initializer_range=0.1,
            eos_token_id=287,
            family="llama",
        )
    )
    path = tmp_path_factory.mktemp("base") / "model"
    checkpoint.save(decoder, path)
    byte_tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture
def make(base: Path, tmp_path: Path):
    def write(**changes: Any) -> Path:
        rows = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in PAIRS * 4
        ]
        rows += [{"prompt": f"{a}:", "completion": b} for a, b in PAIRS * 4]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {
            "output": str(tmp_path / "out"),
            "model": str(base),
            "method": "afa-lora",
            "data": {"path": str(data), "row_tokens": 64, "validation_fraction": 0.0},
            "adapter": {"rank": 4, "anneal_end": 0.5},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.0},
            "train": {"steps": 6, "batch_rows": 2, "dtype": "float32"},
            "checkpoint": {"every": 2},
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) else value
        values = {k: v for k, v in values.items() if v is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def silent(line: str) -> None:
    pass


def log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int, *rest: Any) -> None:
        if step == self.step:
            raise RuntimeError("power cut")


def test_an_interrupted_run_ends_in_the_same_adapter(make: Any, tmp_path: Path) -> None:
    whole = run(make(output=str(tmp_path / "whole")), note=silent)
    lines = log(tmp_path / "whole")
    assert [line["beta"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert lines[3]["beta"] == 0.0
    recipe = make(output=str(tmp_path / "cut"))
    with pytest.raises(RuntimeError):
        run(recipe, note=silent, callbacks=[StopAt(3)])
    saved = list_checkpoints(tmp_path / "cut" / "checkpoints")[-1]
    names = set(load_file(saved.path / "state.safetensors"))
    assert saved.step == 2
    assert saved.meta()["callbacks"][0]["beta"] == pytest.approx(1 / 3)
    assert not [n for n in names if n.startswith("model.") and "lora_" not in n]  # frozen: not kept
    result = run(recipe, note=silent)
    assert [line["beta"] for line in log(tmp_path / "cut")] == [line["beta"] for line in lines]
    first, second = (load_file(r.adapter / WEIGHTS) for r in (whole, result))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match=r"steps = 6"):
        run(recipe, note=silent, overrides=["train.steps=8"])


def test_all_weights_learn_the_answers(make: Any, tmp_path: Path) -> None:
    result = run(
        make(method="full", adapter=None, train={"steps": 60}, checkpoint={"every": 0}), note=silent
    )
    assert log(tmp_path / "out")[-1]["loss"] < 0.1
    llm = LLM(result.model)
    params = SamplingParams(temperature=0, max_tokens=8)
    answers = llm.chat([[{"role": "user", "content": a}] for a, _ in PAIRS], params)
    assert [out.outputs[0].text.strip() for out in answers] == [b for _, b in PAIRS]
    assert {out.outputs[0].finish_reason for out in answers} == {"stop"}


def test_the_merged_model_is_the_adapted_one(make: Any, base: Path, tmp_path: Path) -> None:
    recipe = make(adapter={"rank": 16, "alpha": 32}, train={"steps": 40}, merge=True)
    result = run(recipe, note=silent)
    losses = [line["loss"] for line in log(tmp_path / "out")]
    assert losses[-1] < 0.6 * losses[0]
    decoder = checkpoint.load(base)
    load_adapter(decoder, result.adapter)
    tokens = torch.arange(40) * 7 % VOCAB
    merged = logits(checkpoint.load(result.model), tokens)
    torch.testing.assert_close(logits(decoder, tokens), merged, rtol=0, atol=1e-4)
    assert "afa" not in (result.adapter / CONFIG).read_text()
    assert LLM(result.model).generate("one:", SamplingParams(max_tokens=2))


def test_the_shipped_recipe_runs_on_another_model(base: Path, tmp_path: Path) -> None:
    """recipes/tune.yaml as it is, but for the model, the place of its examples and its length."""
    values = yaml.safe_load((RECIPES / "tune.yaml").read_text())
    changes = {
        "output": str(tmp_path / "out"),
        "model": str(base),
        "data.path": str(RECIPES / "tune.jsonl"),
        "data.row_tokens": 128,
        "train.epochs": 0.5,
        "adapter.anneal_end": 0.8,
    }
    recipe = load_tune_recipe(RECIPES / "tune.yaml", [f"{k}={v}" for k, v in changes.items()])
    assert recipe.method == values["method"] == "afa-lora"
    notes: list[str] = []
    result = run(
        RECIPES / "tune.yaml",
        overrides=[f"{key}={value}" for key, value in changes.items()],
        note=notes.append,
    )
    examples = [json.loads(line) for line in (RECIPES / "tune.jsonl").read_text().splitlines()]
    assert {key for row in examples for key in row} == {"messages", "prompt", "completion"}
    assert any(f"examples from {changes['data.path']}" in line for line in notes)
    *lines, validation = log(tmp_path / "out")
    assert (lines[0]["beta"], lines[-1]["beta"]) == (1.0, 0.0)
    assert "validation_loss" in validation
    read = json.loads((result.adapter / CONFIG).read_text())
    assert (read["r"], read["lora_alpha"]) == (8, 16)
    assert (result.model / "model.safetensors").is_file()
    assert checkpoint.locate(values["model"]).is_dir()  # the model that the recipe names is shipped


def test_the_command_that_the_recipe_prints_works(base: Path, tmp_path: Path) -> None:
    """Every `serval tune` line of the recipe's own comment, on a small model."""
    path = RECIPES / "tune.yaml"
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("serval tune")]
    assert len(commands) == 2
    changes = {
        "output": tmp_path / "out",
        "model": base,
        "data.path": RECIPES / "tune.jsonl",
        "data.row_tokens": 128,
        "train.steps": 2,
        "merge": False,
    }
    extra = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    for words in commands:
        words[words.index("recipes/tune.yaml")] = str(path)
        done = CliRunner().invoke(app, [*words, *extra, "--fresh"])
        assert done.exit_code == 0, (done.output, done.exception)
    assert (tmp_path / "out" / "adapter" / CONFIG).is_file()
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["method"] == "lora"


def test_callbacks_of_the_recipe_act(make: Any, tmp_path: Path) -> None:
    """WISCA leaves an adapter while it is bent and balances it once it is linear."""
    wisca = {"wisca": {"every": 1, "qk": None, "vo": None}}
    recipe = make()
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "callbacks": wisca}))
    result = run(recipe, note=silent)
    lines = log(tmp_path / "out")
    assert [line["step"] for line in lines if "wisca_lora" in line] == [3, 4, 5, 6]
    tensors = load_file(result.adapter / WEIGHTS)
    pairs = [(tensors[n], tensors[n.replace("lora_A", "lora_B")]) for n in tensors if "_A." in n]
    assert all(
        float(a.abs().sum() / b.abs().sum()) == pytest.approx(1.0, rel=1e-3) for a, b in pairs
    )
    for wrong, words in (("frozen", "unknown key 'callbacks.wisca.frozen'"), ("x", "'callbacks")):
        with pytest.raises(ConfigError, match=words):
            load_tune_recipe(recipe, [f"callbacks.wisca.{wrong}=true"])
    with pytest.raises(ConfigError, match="unknown callback 'wiska'"):
        load_tune_recipe(recipe, ["callbacks.wiska={}"])


def test_low_rank_factors_are_not_orthogonalised(make: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    run(make(train={"steps": 1}, optimizer={"name": "muon"}), note=notes.append)
    assert any("Muon has nothing to orthogonalise here" in line for line in notes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.name=sine", "unknown schedule 'sine'"),
        ("schedule.warmup_steps=7", "exceed the 6 steps of the run"),
        ("optimizer.name=sgd", "unknown optimizer 'sgd'"),
        ("optimizer.betas=[2, 2]", r"optimizer.*beta"),
    ],
)
def test_schedule_and_optimizer_are_checked_before_data_is_read(
    override: str, message: str, make: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tune_recipe(make(data={"path": "missing.jsonl"}), [override])


def test_two_processes_train_the_same_adapter(make: Any, tmp_path: Path) -> None:
    recipe = make(output=str(tmp_path / "one"), train={"steps": 4}, checkpoint={"every": 0})
    alone = run(recipe, note=silent)
    words = ["tune", str(recipe), "--set", f"output={tmp_path / 'two'}", "--set", "merge=true"]
    torchrun(2, "serval.cli", *words, seconds=300)
    first, second = (load_file(p / WEIGHTS) for p in (alone.adapter, tmp_path / "two" / "adapter"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-4)
    assert max(float(t.abs().max()) for n, t in first.items() if "lora_B" in n) > 1e-2
    assert [line["beta"] for line in log(tmp_path / "two")] == pytest.approx([1, 0.5, 0, 0])
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_and_validation(method: str, make: Any, tmp_path: Path) -> None:
    adapter = {"anneal_end": None} if method == "lora" else None
    recipe = make(method=method, adapter=None, data={"validation_fraction": 0.4})
    values = yaml.safe_load(recipe.read_text())
    if adapter:
        values["adapter"] = {"rank": 2, "targets": ["q_proj", "down_proj"]}
    values["train"] = {"epochs": 2, "batch_rows": 2, "dtype": "float32"}
    recipe.write_text(yaml.safe_dump(values))
    notes: list[str] = []
    result = run(recipe, note=notes.append)
    lines = log(tmp_path / "out")
    assert "validation_loss" in lines[-1]
    assert all("beta" not in line for line in lines)
    assert result.step == len([line for line in lines if "loss" in line])
    again = load_tune_recipe(tmp_path / "out" / "recipe.yaml")  # the copy is a recipe too
    assert again.written() == yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    if method == "full":
        assert result.adapter is None
        assert LLM(result.model).generate("one:", SamplingParams(max_tokens=2))
    else:
        assert json.loads((result.adapter / CONFIG).read_text())["target_modules"] == [
            "down_proj",
            "q_proj",
        ]
        assert any("lora: training" in line for line in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "unknown method 'dora'; choose one of: afa-lora, full, lora"),
        ({"method": "lora"}, "adapter.anneal_end means nothing to method 'lora'"),
        ({"method": "full"}, "adapter.anneal_end means nothing to method 'full'"),
        ({"method": "full", "adapter": None, "merge": True}, "no adapter to merge"),
        ({"adapter": {"anneal_start": 0.6}}, "anneal_start is 0.6 and anneal_end 0.5"),
        ({"adapter": {"activation": "sine"}}, r"adapter\.activation: expected 'relu'"),
        ({"adapter": {"rnak": 1}}, "unknown key 'adapter.rnak'"),
        ({"data": {"row_tokens": 4096}}, "exceeds the model's 128 positions"),
        ({"data": {"chat_template": "none.jinja"}}, "none.jinja' cannot be read"),
        ({"train": {"batch_rows": 3, "micro_batch_rows": 2}}, "multiple of"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], message: str, make: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        run(make(**changes), note=silent)


def test_late_annealing_warns_and_empty_data_is_refused(make: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    recipe = load_tune_recipe(make(adapter={"anneal_end": 0.9}))
    recipe.build_method().callbacks(10, notes.append)
    assert "last 10% of the steps" in notes[0]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="no example with something to predict"):
        run(make(data={"path": str(empty)}), note=silent)


def test_merging_into_a_directory_in_use_or_a_quantised_model(
    make: Any, base: Path, tmp_path: Path
) -> None:
    from serval.compress import CompressOptions
    from serval.compress import run as compress

    result = run(make(train={"steps": 1}), note=silent)
    words = ["merge", str(base), str(result.adapter), "--out", str(tmp_path / "merged")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "merged" in shown.output
    with pytest.raises(ConfigError, match="give --force"):
        merge_checkpoint(base, result.adapter, tmp_path / "merged")
    with pytest.raises(ConfigError, match="is the model itself"):
        merge_checkpoint(base, result.adapter, base)
    compress(CompressOptions(str(base), tmp_path / "int8", weights="int8"))
    with pytest.raises(ConfigError, match="QuantizedLinear, which has no float weights"):
        merge_checkpoint(tmp_path / "int8", result.adapter, tmp_path / "other")
    with pytest.raises(ConfigError, match="quantised and cannot be trained"):
        run(make(model=str(tmp_path / "int8")), note=silent)
