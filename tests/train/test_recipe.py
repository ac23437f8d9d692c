from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from serval.errors import ConfigError
from serval.optim import OPTIMIZERS, READS, OptimizerOptions, Role, build
from serval.train.checkpoint import flatten
from serval.train.distributed import World
from serval.train.recipe import load_recipe
from serval.train.run import settings_of
from serval.train.wisca import WiscaCallback

GOOD = """
output: runs/x
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48}
data: {source: stdlib, row_tokens: 128}
train: {steps: 10, batch_rows: 4}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_and_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    text = GOOD + "optimizer: {name: muon, lr: 1e-3, roles: {embedding: {lr: 2}}}\n"
    recipe = load_recipe(write(tmp_path, text))
    options = recipe.optimizer.options()
    assert options.lr == 1e-3  # YAML reads 1e-3 as a string
    assert options.roles[Role.EMBEDDING].lr == 2.0
    assert recipe.train.clip_norm == 1.0
    assert recipe.directory == Path("runs/x")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["train.steps=20", "optimizer.name=muon", "output=/tmp/y"])
    assert (recipe.train.steps, recipe.optimizer.name, recipe.output) == (20, "muon", "/tmp/y")
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        load_recipe(path, ["train.steps"])
    with pytest.raises(ConfigError, match="'output' is not a section"):
        load_recipe(path, ["output.name=1"])
    with pytest.raises(ConfigError, match=r"train\.steps: expected int, got 'many'"):
        load_recipe(path, ["train.steps=many"])


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("optimizer: {lr: abc}", r"optimizer\.lr: expected float, got 'abc'"),
        ("optimizer: {lrr: 1}", r"unknown key 'optimizer\.lrr' \(did you mean 'lr'\?\)"),
        ("shedule: {}", r"unknown key 'shedule' \(did you mean 'schedule'\?\)"),
        ("schedule: 3", r"schedule: expected a mapping, got 3"),
        ("optimizer: {roles: {head: {x: 1}}}", r"unknown key 'optimizer\.roles\.head\.x'"),
        ("optimizer: {roles: {heat: {lr: 1}}}", r"'hidden_matrix'.*got 'heat'"),
        ("train: {steps: 10.5}", r"train\.steps: expected int, got 10\.5"),
        ("train: {batch_rows: 4}", r"missing key 'train\.steps'"),
        ("train: {steps: 0}", r"train\.steps: expected greater than 0, got 0"),
        ("train: {steps: 1, dtype: fp8}", r"train\.dtype: expected 'auto', .*got 'fp8'"),
        ("data: {sorce: x}", r"unknown key 'data\.sorce' \(did you mean 'source'\?\)"),
        ("optimizer: {lr: .inf}", r"optimizer\.lr: expected a finite number, got inf"),
        ("optimizer: {betas: [2, 2]}", r"optimizer\.betas\.0: expected less than 1, got 2"),
        ("optimizer: {eps: 0}", r"optimizer\.eps: expected greater than 0, got 0"),
        ("optimizer: {weight_decay: .nan}", r"optimizer\.weight_decay: expected .*, got nan"),
        ("optimizer: {name: muon, muon_lr: -3}", r"optimizer\.muon_lr: expected greater than 0"),
        ("optimizer: {name: muon, momentum: 1}", r"optimizer\.momentum: expected less than 1"),
        ("optimizer: {name: muon, ns_steps: 100}", r"optimizer\.ns_steps: expected less than 100"),
        ("optimizer: {name: mona, mona_alpha: .nan}", r"optimizer\.mona_alpha: expected a finite"),
        ("optimizer: {roles: {norm: {lr: -1}}}", r"roles\.norm\.lr: expected greater than or"),
        ("optimizer: {roles: {norm: {weight_decay: -1}}}", r"roles\.norm\.weight_decay: expected"),
        ("model: {hidden_siz: 3}", r"unknown key 'model\.hidden_siz' \(did you mean 'hidden_size'"),
        ("model: {hidden_size: wide}", r"model\.hidden_size: expected int, got 'wide'"),
        ("model: {rope: {knd: yarn}}", r"unknown key 'model\.rope\.knd' \(did you mean 'kind'\?\)"),
        ("model: {hidden_size: 8}", r"missing key 'model\.num_hidden_layers'"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, addition: str, message: str) -> None:
    values = yaml.safe_load(GOOD) | yaml.safe_load(addition)
    path = write(tmp_path, yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- 1", "the file is a list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        load_recipe(binary)


QK = GOOD.replace("model: {", "model: {qk_norm: true, ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=sgd", "unknown optimizer 'sgd'"),
        ("optimizer.muon_lr=0.1", r"optimizer\.muon_lr means nothing to optimizer 'adamw'.*muon"),
        ("optimizer.mona_beta=0.9", "means nothing to optimizer 'adamw'.*: mona, mona-lite"),
        ("optimizer={name: muon, mona_beta: 0.9}", r"mona_beta means nothing to optimizer 'muon'"),
        ("optimizer={name: mona, mona_alpha: -40}", r"optimizer: mona alpha is -40.*= 40"),
        ("initializer=zeros", "unknown initializer 'zeros'"),
        ("schedule.name=step", "unknown schedule 'step'"),
        (
            "schedule={name: cosine, decay_steps: 1}",
            r"decay_steps means nothing .*'cosine'.*: wsd$",
        ),
        ("schedule={name: constant, final: 0.1}", r"schedule\.final means .*: wsd, cosine$"),
        ("schedule.warmup_steps=11", "exceed the 10 steps"),
        ("train.micro_batch_rows=3", r"train\.batch_rows is 4; expected a multiple"),
        ("data.row_tokens=4096", r"data\.row_tokens 4096 exceeds"),
        ("data.source=web", "unknown data source 'web'"),
        ("data.field=body", r"data\.field is 'body', but source 'stdlib' reads whole files"),
        ("data.tasks={chess: {share: 0.1}}", r"data\.tasks\.chess: unknown task"),
        ("data.chat={share: 1.5}", "less than or equal to 1"),
        ("callbacks.wisdom={}", "unknown callback 'wisdom'; choose one of: wisca"),
        ("callbacks.wisca.evry=2", r"key 'callbacks\.wisca\.evry' \(did you mean 'every'\?\)"),
        ("callbacks.wisca.every=often", r"callbacks\.wisca\.every: expected int, got 'often'"),
        ("callbacks.wisca.qk=rows", r"callbacks\.wisca\.qk: expected 'tensor', 'head' or 'row'"),
        ("callbacks.wisca.every=-2", "wisca every is -2; expected 0"),
    ],
)
def test_choices_are_checked_when_the_recipe_is_read(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_model_that_its_family_cannot_express_is_refused_before_training(tmp_path: Path) -> None:
    path = write(tmp_path, QK)
    with pytest.raises(ConfigError, match=r"'llama' cannot express model\.qk_norm.*qwen3"):
        load_recipe(path)
    assert load_recipe(path, ["model.family=qwen3"]).model["family"] == "qwen3"


def test_callbacks_are_built_from_their_section(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path).build_callbacks() == []
    (wisca,) = load_recipe(path, ["callbacks.wisca="]).build_callbacks()
    assert wisca == WiscaCallback()
    section = ["callbacks.wisca={every: 7, qk: row, vo: null, covariant: false}"]
    (wisca,) = load_recipe(path, section).build_callbacks()
    assert wisca == WiscaCallback(every=7, qk="row", vo=None, covariant=False)
    assert load_recipe(path).fingerprint() != load_recipe(path, section).fingerprint()


def test_fingerprint_ignores_where_and_how_long(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    same = load_recipe(path, ["output=z", "train.steps=99", "schedule.name=cosine"])
    other = load_recipe(path, ["optimizer.lr=0.5"])
    assert load_recipe(path).fingerprint() == same.fingerprint()
    assert load_recipe(path).fingerprint() != other.fingerprint()


def test_settings_tell_which_options_hold_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    chosen = ["optimizer.eps=1.0e-9", "train.clip_norm=1.0"]
    settings = settings_of(load_recipe(path, chosen), World())
    assert settings.defaults >= {"train.clip_norm", "optimizer.mona_beta", "initializer"}
    assert not settings.defaults & {"optimizer.eps", "train.batch_rows", "model.hidden_size"}
    assert settings.defaults < set(flatten(settings.fingerprint or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_reads_is_what_changes_its_groups(name: str) -> None:
    """Every option but the roles, against what is built from it."""
    given: dict[str, Any] = {
        "lr": 0.5, "betas": (0.1, 0.2), "eps": 0.5, "weight_decay": 0.5, "muon_lr": 0.5,
        "momentum": 0.5, "nesterov": False, "ns_steps": 3, "ns_coefficients": "dion",
        "ns_dtype": "bfloat16", "muon_adjust": "original", "mona_alpha": 1.0, "mona_beta": 0.5,
    }  # fmt: skip
    assert {*given, "roles"} == {field.name for field in dataclasses.fields(OptimizerOptions)}

    def groups(**options: Any) -> list[dict[str, Any]]:
        built = build(name, nn.Linear(2, 2), OptimizerOptions(**options)).param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in built]

    read = {key for key, value in given.items() if groups(**{key: value}) != groups()}
    assert read == READS[name] - {"roles"}


def test_null_takes_back_the_key_of_another_optimizer(tmp_path: Path) -> None:
    muon = "optimizer: {name: muon, muon_lr: 0.1, muon_adjust: original}\n"
    path = write(tmp_path, GOOD + muon)
    assert load_recipe(path).optimizer.muon_lr == 0.1
    adamw = ["optimizer.name=adamw", "optimizer.muon_lr=null"]
    with pytest.raises(ConfigError, match=r"optimizer\.muon_adjust means nothing.*null on the"):
        load_recipe(path, adamw)
    recipe = load_recipe(path, [*adamw, "optimizer.muon_adjust=null"])
    assert recipe.fingerprint() == load_recipe(write(tmp_path, GOOD)).fingerprint()
    with pytest.raises(ConfigError, match=r"optimizer\.lr: expected float, got None"):
        load_recipe(path, ["optimizer.lr=null"])


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted({*RECIPES.glob("*.yaml")} - {RECIPES / "tune.yaml"}))
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).optimizer.name in OPTIMIZERS
