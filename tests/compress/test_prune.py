"""`serval prune`: one-shot rankings, a whole run, what is written, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from serval.cli import app
from serval.compress.maskprune import PruneOptions, Pruning, prune_decoder, run
from serval.compress.maskprune.masks import MaskedDecoder
from serval.compress.maskprune.pruner import Task
from serval.compress.maskprune.rows import RowStream, text_state
from serval.compress.maskprune.scores import Magnitude, Random, Taylor, Uniform, Wanda
from serval.compress.maskprune.units import Costs, Levels, find_sites
from serval.compress.registry import PRUNERS
from serval.errors import ConfigError, ServalError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from serval.train.loss import LanguageModelLoss
from serval.train.stream import next_token_targets
from serval.train.throughput import ModelFlops
from tests.compress import toy
from tests.models import tiny_models

TINY: dict[str, Any] = {
    "batch_rows": 2,
    "calibration_rows": 2,
    "lora_rank": 2,
    "dtype": "float32",
    "multiple": 4,
}


def quiet(line: str) -> None:
    """No output in tests."""


def stream(seed: int = 0) -> RowStream:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(203, (12,), generator=generator)
    return RowStream([(start + torch.arange(24)) % 203 for start in starts], seed)


def task(decoder: Decoder) -> Task:
    sites = find_sites(decoder)
    costs = Costs.of(decoder, sites, "parameters", 64)
    rows = [next_token_targets(stream().next()) for _ in range(2)]
    masked = MaskedDecoder(decoder, sites)
    return Task(masked, costs, Levels.of(costs, 1), 0.7, None, rows, 0, 5)


def owner(decoder: Decoder, name: str) -> Any:
    return decoder.get_submodule(name)


# -- rankings -----------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_all_a_units_weights() -> None:
    decoder = toy.decoder(mlp_bias=True)
    work = task(decoder)
    scores = Magnitude().scores(work)
    mlp = owner(decoder, "layers.1.mlp")
    parts = [mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.inner.weight[:, 7]]
    parts += [mlp.gate_proj.bias[7:8], mlp.up_proj.bias[7:8]]
    torch.testing.assert_close(scores["layers.1.mlp"][7], torch.cat(parts).norm().detach())
    attention = owner(decoder, "layers.0.self_attn")
    rows = [
        attention.q_proj.weight[32:],
        attention.k_proj.weight[16:],
        attention.v_proj.weight[16:],
    ]
    blocks = [*rows, attention.o_proj.inner.weight[:, 32:]]
    norm = torch.cat([block.flatten() for block in blocks]).norm().detach()
    torch.testing.assert_close(scores["layers.0.self_attn"][1], norm)


def test_taylor_sums_weight_times_gradient_over_each_unit() -> None:
    decoder, plain = toy.decoder(), toy.decoder()
    scores = Taylor().scores(task(decoder))
    loss = LanguageModelLoss(plain)
    for row in [next_token_targets(stream().next()) for _ in range(1)] * 2:
        (loss(row)[0] / row.weights.sum()).backward()
    mlp: Any = plain.layers[0].mlp
    expected = torch.zeros(())
    for weight, unit in (
        (mlp.gate_proj.weight, (3,)),
        (mlp.up_proj.weight, (3,)),
        (mlp.down_proj.weight, (slice(None), 3)),
    ):
        expected = expected + (weight * weight.grad)[unit].abs().sum().detach()
    torch.testing.assert_close(scores["layers.0.mlp"][3], expected, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for n, p in decoder.named_parameters() if "mask" not in n)
    assert all(p.grad is None for p in decoder.parameters())


def test_wanda_weighs_columns_by_their_inputs_norm() -> None:
    decoder = toy.decoder()
    work = task(decoder)
    seen: list[Tensor] = []
    down = owner(decoder, "layers.1.mlp").down_proj
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    scores = Wanda().scores(work)["layers.1.mlp"]
    handle.remove()
    norms = torch.cat(seen).norm(dim=0)
    torch.testing.assert_close(scores, down.inner.weight.detach().abs().sum(0) * norms)


def test_uniform_is_evenly_spaced_and_random_is_drawn_with_the_seed() -> None:
    work = task(toy.decoder(intermediate_size=64))
    order = Uniform().scores(work)["layers.0.mlp"].argsort(descending=True, stable=True)
    for count in (8, 16, 32):
        gaps = order[:count].sort().values.diff()
        assert set(gaps.tolist()) == {64 // count}
    first, again = Random().scores(work), Random().scores(work)
    assert torch.equal(first["layers.0.mlp"], again["layers.0.mlp"])
    assert not torch.equal(first["layers.0.mlp"], first["layers.1.mlp"])


# -- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRUNERS)
def test_every_method_meets_the_budget_with_uniform_widths(method: str) -> None:
    options = Pruning(method=method, keep=0.6, steps=20, **TINY)
    pruned, report = prune_decoder(toy.decoder(), options, stream(), note=quiet)
    assert report.fraction <= 0.6 + 1e-9
    after = sum(p.numel() for p in pruned.parameters())
    assert (report.parameters_after, report.fraction) == (
        after,
        pytest.approx(after / report.parameters_before),
    )
    assert {len(units) for name, units in report.kept.items() if "mlp" in name} == {
        report.widths["channels"]
    }
    assert report.widths["channels"] % 4 == 0
    with torch.no_grad():
        tokens = stream().next()[0]
        assert pruned(tokens, PackedBatch.from_lengths([24])).isfinite().all()


def test_a_budget_of_flops_is_met_where_long_contexts_cost_heads() -> None:
    """At a longer context heads cost more of a token's flops, so that more of them go."""
    taken = {}
    for context in (1, 128):
        options = Pruning(
            method="taylor", keep=0.7, budget="flops", context=context, steps=4, **TINY
        )
        decoder = toy.decoder(num_attention_heads=8, num_key_value_heads=8)
        flops = [flops_of(decoder, context)]
        pruned, report = prune_decoder(decoder, options, stream(), note=quiet)
        flops.append(flops_of(pruned, context))
        assert flops[1] / flops[0] == pytest.approx(report.fraction)
        assert 0.6 < report.fraction <= 0.7
        taken[context] = report.widths
    assert taken[1] != taken[128]


def flops_of(decoder: Decoder, context: int) -> float:
    """Of training on one token at `context` tokens, counted on the model itself."""
    flops = ModelFlops.of(decoder.requires_grad_(True))
    return flops.per_token + flops.per_pair * (context + 1) / 2


def test_maskprune_meets_a_budget_of_flops() -> None:
    options = Pruning(keep=0.6, budget="flops", context=100, steps=20, **TINY)
    decoder = toy.decoder()
    before = flops_of(decoder, 100)
    pruned, report = prune_decoder(decoder, options, stream(), note=quiet)
    assert flops_of(pruned, 100) / before == pytest.approx(report.fraction)
    assert 0.5 < report.fraction <= 0.6 + 1e-9


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    """`--set mask_lr=1e-2` arrives as the text '1e-2'."""
    assert yaml.safe_load("1e-2") == "1e-2"
    results = []
    for rate in ("1e-2", 0.01):
        options = Pruning(keep=0.7, steps=20, settings={"mask_lr": rate}, **TINY)
        pruned, _ = prune_decoder(toy.decoder(), options, stream(), note=quiet)
        results.append(pruned.state_dict())
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())
    default, _ = prune_decoder(
        toy.decoder(), Pruning(keep=0.7, steps=20, **TINY), stream(), note=quiet
    )
    moved = default.state_dict()
    assert any(
        t.shape != moved[name].shape or not torch.equal(t, moved[name])
        for name, t in results[0].items()
    )


def test_seeds_reproduce_and_training_lowers_the_loss() -> None:
    options = Pruning(keep=0.7, steps=40, lora_lr=1e-2, **TINY)
    first, report = prune_decoder(toy.decoder(), options, stream(), note=quiet)
    second, again = prune_decoder(toy.decoder(), options, stream(), note=quiet)
    assert (report.kept, report.loss) == (again.kept, again.loss)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert report.loss is not None
    assert report.loss[1] < report.loss[0] - 0.1


def test_given_widths_are_used_and_a_kind_without_one_stays_whole() -> None:
    options = Pruning(method="magnitude", intermediate_size=30, steps=0, **TINY)
    pruned, report = prune_decoder(toy.decoder(), options, stream(), note=quiet)
    assert report.widths == {"heads": 2, "channels": 30}
    assert pruned.config.intermediate_size == 30
    assert report.loss is None


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"qk_norm": True, "tie_word_embeddings": True} if request.param == "qwen3" else {}
    decoder = toy.decoder(family=request.param, **changes)
    directory = tmp_path_factory.mktemp("prune") / request.param
    return checkpoint.save(decoder, directory, dtype=torch.bfloat16)


def options(model: Path, out: Path, **changes: Any) -> PruneOptions:
    values: dict[str, Any] = {"data": "random", "length": 24, "steps": 20, **TINY}
    return PruneOptions(model, out, **(values | changes))


def test_transformers_loads_what_is_written(model: Path, tmp_path: Path) -> None:
    result = run(options(model, tmp_path / "out", keep=0.6), note=quiet)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == 16
    assert config["intermediate_size"] == result.report.widths["channels"] < 100
    assert config["num_key_value_heads"] == result.report.widths["heads"]
    ours = checkpoint.load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(30)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        found = ours.logits(ours(tokens, PackedBatch.from_lengths([30])))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    said = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert said["widths"] == result.report.widths
    assert said["options"]["keep"] == 0.6
    assert result.bytes_after < 0.7 * result.bytes_before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("name", ["glm4_moe_lite", "qwen3_moe"])
def test_pruned_mixtures_and_latent_attention_load_in_transformers(
    name: str, tmp_path: Path
) -> None:
    tiny_models.make(name).save_pretrained(tmp_path / "model")
    result = run(options(tmp_path / "model", tmp_path / "out", keep=0.9), note=quiet)
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["num_attention_heads"] < before["num_attention_heads"]
    assert after["num_key_value_heads"] == result.report.widths["heads"]
    assert after["moe_intermediate_size"] == before["moe_intermediate_size"]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = checkpoint.load(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(30)
    with torch.no_grad():
        expected = theirs(tokens[None], use_cache=False).logits[0]
        found = ours.logits(ours(tokens, PackedBatch.from_lengths([30])))
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=5e-5)


def test_rows_are_at_most_the_models_context(model: Path, tmp_path: Path) -> None:
    """Without --length too: 512 would not fit this model's 128 positions."""
    result = run(
        options(model, tmp_path / "out", length=None, steps=0, method="random"), note=quiet
    )
    assert result.report.widths["heads"] == 1


def test_other_weights_or_text_are_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"

    def interrupt(done: int, steps: int) -> None:
        if done == 12:
            os.kill(os.getpid(), signal.SIGINT)

    work = tmp_path / "work"
    shutil.copytree(model, work)
    with pytest.raises(KeyboardInterrupt):
        run(options(work, tmp_path / "out"), interrupt, note=quiet)
    moved = shutil.move(work, tmp_path / "elsewhere" / "work")  # the same weights
    other = checkpoint.load(model, dtype=torch.float32)
    with torch.no_grad():
        other.norm.weight.mul_(1.5)
    checkpoint.save(other, work, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="was written with weights = "):
        run(options(work, tmp_path / "out"), note=quiet)
    lines: list[str] = []
    run(options(Path(moved), tmp_path / "out"), note=lines.append)
    assert any("resumed" in line for line in lines)
    text.write_text("one")
    before = text_state(str(text), model)
    text.write_text("another")
    assert text_state(str(text), model) != before


def test_an_interrupted_run_goes_on_and_ends_the_same(model: Path, tmp_path: Path) -> None:
    whole = run(options(model, tmp_path / "whole", keep=0.6), note=quiet)

    def interrupt(done: int, steps: int) -> None:
        if done == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(options(model, tmp_path / "out", keep=0.6), interrupt, note=quiet)
    assert not (tmp_path / "out").exists()
    lines: list[str] = []
    result = run(options(model, tmp_path / "out", keep=0.6), note=lines.append)
    assert any("resumed" in line and "step 12" in line for line in lines)
    assert result.report.kept == whole.report.kept
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 0.01}, "keep 0.01 cannot be met: with 1 heads, 4 channels per layer"),
        ({"keep": 0.0}, "keep is 0.0; expected a share above 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"method": "best"}, "unknown pruning method 'best'; choose one of: magnitude, maskprune"),
        ({"budget": "bytes"}, "budget is 'bytes'; expected one of parameters, blocks, flops"),
        ({"keep": 0.5, "intermediate_size": 8}, "give either keep or widths"),
        ({"intermediate_size": 101, "method": "random"}, "intermediate_size is 101; expected 1 to"),
        ({"key_value_heads": 0, "method": "random"}, "key_value_heads is 0; expected 1 to 2"),
        ({"key_value_heads": 1}, "widths are learnt by maskprune"),
        ({"steps": 2}, "2 steps are too few to learn masks"),
        ({"steps": -1}, "steps is -1; expected at least 0"),
        ({"multiple": 0}, "multiple is 0"),
        ({"micro_batch_rows": 0}, "micro_batch_rows is 0; expected at least 1"),
        ({"context": 0}, "context is 0; expected at least 1"),
        ({"lora_lr": float("nan")}, "lora_lr is nan"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"context": 64}, "context is 64, but the budget counts parameters"),
        ({"context": 129, "budget": "flops"}, "context is 129; the model has 128 positions"),
        ({"length": 99999}, "length is 99999; expected 2 to 128, the model's positions"),
        ({"length": 1}, "length is 1; expected 2 to 128"),
        ({"settings": {"warmup": float("nan")}}, "warmup is nan; expected a finite number >= 0"),
        ({"settings": {"z_lr": float("inf")}}, "z_lr is inf; expected a finite number"),
        ({"settings": {"mask_lr": "fast"}}, "setting 'mask_lr' of method 'maskprune'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"settings": {"speed": 1}}, "method 'maskprune' has no setting 'speed'; it has: warmup"),
        ({"settings": {"ramp": 0.9}}, "shares of the steps"),
        ({"settings": {"mask_lr": -1}}, "mask_lr is -1"),
        ({"batch_rows": 3, "micro_batch_rows": 2}, "batch_rows is 3; expected a multiple"),
        (
            {"data": "missing.txt"},
            "'missing.txt' does not exist; give a text file, a .jsonl or .parquet file, a folder, "
            "or one of: recipe, stdlib, self, random",
        ),
        ({"data": "recipe"}, "recipe.yaml cannot be read"),
    ],
)
def test_bad_options_name_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = checkpoint.save(toy.decoder(), tmp_path / "model")
    with pytest.raises(ServalError) as caught:
        run(options(model, tmp_path / "out", **changes), note=quiet)
    assert words in str(caught.value), caught.value
    assert not (tmp_path / "out").exists()


def test_the_output_is_not_overwritten_unasked(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        run(options(model, tmp_path, method="random", steps=0), note=quiet)
    with pytest.raises(ConfigError, match="is the model itself"):
        run(options(model, model, method="random", steps=0), note=quiet)


def test_the_command_passes_its_options_on(model: Path, tmp_path: Path) -> None:
    words = f"prune {model} --out {tmp_path / 'out'} --method wanda --budget blocks --keep 0.5 "
    words += "--multiple 16 --steps 0 --data random --length 24 --calibration-rows 2"
    done = CliRunner().invoke(app, [*words.split(), "--json", str(tmp_path / "result.json")])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "result.json").read_text())
    assert said["report"]["method"] == "wanda"
    assert said["report"]["fraction"] <= 0.5
    assert said["report"]["widths"]["channels"] % 16 == 0
    assert "every layer keeps" in done.output
    refused = CliRunner().invoke(app, [*words.split(), "--force", "--set", "x=1"])
    assert "has no setting 'x'" in str(refused.exception)
