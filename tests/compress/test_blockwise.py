from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from serval.compress import (
    RECIPES,
    Calibration,
    CompressOptions,
    Method,
    compress_decoder,
    pipeline,
    run,
)
from serval.compress.blockwise import Blockwise
from serval.compress.calibrate import random_tokens
from serval.compress.recipe import Recipe
from serval.compress.rtn import round_to_nearest
from serval.compress.scheme import WeightScheme
from serval.compress.stores import MemoryStore
from serval.compress.workspace import Workspace
from serval.errors import CheckpointError, ConfigError, DataError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.config import MoEConfig
from tests.compress.toy import decoder, mla_decoder, moe_decoder

CALIBRATION = Calibration("random", samples=3, length=20)
MAKERS = [decoder, moe_decoder, mla_decoder]


def logits(model, tokens=None):
    tokens = torch.arange(40) if tokens is None else tokens
    with torch.no_grad():
        return model.logits(model(tokens, PackedBatch.from_lengths([len(tokens)])))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def quick(weights: str) -> dict:
    """Settings that keep a method's search short."""
    return {"odyssey": {"steps": 5}, "awq": {"steps": 4}}.get(weights, {})


@pytest.mark.parametrize("weights", list(RECIPES))
@pytest.mark.parametrize("make", MAKERS)
def test_every_method_on_disk_does_what_it_does_in_memory(tmp_path, weights, make):
    model = make()
    checkpoint.save(model, tmp_path / "source")
    exact = logits(model)
    method: dict = {"weights": weights, "bits": 8, "group_size": 4, "settings": quick(weights)}
    result = run(
        CompressOptions(tmp_path / "source", tmp_path / "out", calibration=CALIBRATION, **method)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    loaded = checkpoint.load(tmp_path / "out")
    tokens = random_tokens(model.config, 3, 20)
    report = compress_decoder(model, Method(**method), tokens)
    assert report.quantised == result.quantised
    assert report.plan == result.plan
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert (logits(loaded) - exact).norm() < 0.15 * exact.norm()
    assert result.fell_back == {}


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, weights):
    checkpoint.save(decoder(num_hidden_layers=3), tmp_path / "source")
    arguments: dict = {"weights": weights, "group_size": 4, "calibration": CALIBRATION}
    run(CompressOptions(tmp_path / "source", tmp_path / "straight", **arguments))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.compress.kill_worker", str(tmp_path / "source")]
    killed = subprocess.run([*command, str(out), weights, "2"], capture_output=True, timeout=300)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not out.exists()
    assert (tmp_path / ".out.partial").is_dir()
    (tmp_path / ".out.partial/part-00009.safetensors").write_bytes(b"left over")
    seen: list[str] = []
    work = []
    original = Blockwise._quantise_block

    def counted(self, block):
        work.append(block.index)
        return original(self, block)

    Blockwise._quantise_block = counted
    try:
        run(CompressOptions(tmp_path / "source", out, **arguments), note=seen.append)
    finally:
        Blockwise._quantise_block = original
    assert work == [2]
    assert len(seen) == 3
    assert files(out) == files(tmp_path / "straight")
    assert not (tmp_path / ".out.partial").exists()


def test_other_options_start_anew(tmp_path):
    source, out = checkpoint.save(decoder(), tmp_path / "source"), tmp_path / "out"
    command = [sys.executable, "-m", "tests.compress.kill_worker", str(source), str(out)]
    subprocess.run([*command, "rtn", "1"], capture_output=True, timeout=300)
    result = run(CompressOptions(source, out, weights="rtn", group_size=2))
    assert set(result.quantised.values()) == {"W4A8 g2"}
    assert len(result.quantised) == 14


def test_an_interruption_keeps_finished_parts_and_errors_keep_nothing(tmp_path):
    source, out = checkpoint.save(decoder(), tmp_path / "source"), tmp_path / "out"

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(CompressOptions(source, out), note=interrupt)
    assert (tmp_path / ".out.partial/state.json").exists()
    with Workspace(out, "any"), pytest.raises(CheckpointError, match="another process"):
        run(CompressOptions(source, out))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    checkpoint_files = sorted(path.name for path in tmp_path.iterdir())
    assert checkpoint_files == ["empty.txt", "source"]
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is empty"):
        run(CompressOptions(source, out, weights="gptq", calibration=Calibration(str(empty))))
    assert sorted(path.name for path in tmp_path.iterdir()) == checkpoint_files


def test_bad_checkpoints_are_named_and_leave_nothing(tmp_path):
    source = checkpoint.save(decoder(), tmp_path / "source")
    path = source / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.self_attn.v_proj.weight"][3, 3] = float("nan")
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight.*NaN"):
        run(CompressOptions(source, tmp_path / "out", weights="gptq", calibration=CALIBRATION))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        run(CompressOptions(source, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    model = decoder()
    model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        compress_decoder(model, Method(weights="rtn", group_size=4))


def test_schemes_by_pattern():
    model = moe_decoder()
    method = Method(
        weights="rtn",
        group_size=4,
        activations="none",
        overrides=["*down_proj:bits=8", "*.1.mlp.*down_proj:group_size=channel,activations=token"],
        ignore=["*.k_proj"],
    )
    report = compress_decoder(model, method)
    for layer, down in (("model.layers.0", "W8A16 g4"), ("model.layers.1", "W8A8 channel")):
        assert report.quantised[f"{layer}.mlp.experts.2.down_proj"] == down
        assert report.quantised[f"{layer}.mlp.experts.2.up_proj"] == "W4A16 g4"
        assert report.quantised[f"{layer}.self_attn.q_proj"] == "W4A16 g4"
        assert report.kept[f"{layer}.self_attn.k_proj"] == "asked for"
    with pytest.raises(ConfigError, match=r"experts\.2\.up_proj"):
        compress_decoder(moe_decoder(), Method(ignore=["*.experts.2.up_proj"]))


def test_a_group_size_nobody_asked_for_is_fitted():
    model = decoder(hidden_size=96, intermediate_size=160, head_dim=24)
    made = compress_decoder(model, Method(weights="rtn")).quantised
    assert made["model.layers.0.mlp.up_proj"] == "W4A8 g32"
    assert made["model.layers.0.mlp.down_proj"] == "W4A8 g32"
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.\S+: group_size=64 does not divide"):
        compress_decoder(decoder(), Method(weights="rtn", group_size=64))


@pytest.mark.parametrize("weights", ["gptq", "awq", "fptq", "odyssey"])
def test_experts_without_tokens_are_rounded_and_reported(weights):
    moe = MoEConfig(num_experts=8, top_k=1, intermediate_size=16)
    model = decoder(moe=moe, family="qwen3_moe", qk_norm=True, num_hidden_layers=1)
    router = model.layers[0].mlp.gate
    router.weight.data[:4] = 0
    router.weight.data[4:] = 0
    router.weight.data[5] = 1.0  # most tokens
    router.weight.data[6] = -1.0  # the others
    method = Method(weights=weights, group_size=4, settings=quick(weights))
    report = compress_decoder(model, method, random_tokens(model.config, 2, 20))
    for expert in (0, 7):
        for leaf in ("gate_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}"
            assert "no calibration token" in report.fell_back[name]
            assert name in report.quantised
    assert not any("experts.5." in name or "self_attn" in name for name in report.fell_back)
    assert torch.isfinite(logits(model)).all()


@dataclass
class Folding(Recipe):
    """Folds fixed scales wherever it can; rounds to nearest."""

    statistics: ClassVar = frozenset({"range"})

    def prepare_block(self, block):
        self.expected = {}
        for site in block.sites:
            if site.place.foldable:
                site.fold(torch.linspace(0.5, 2.0, site.place.width))
            self.expected[site.name] = float(site.abs_max.max()) / 127
        return {}

    def quantize(self, matrix):
        made = round_to_nearest(matrix)
        assert self.expected  # prepared before
        return made


@pytest.mark.parametrize("make", [decoder, mla_decoder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_scales_are_those_of_the_folded_inputs(make, dtype):
    model = make().to(dtype)
    exact = logits(model).float()
    recipe = Folding()
    schemes = Method(weights="rtn", bits=8, group_size=4, activations="static").resolve()
    tokens = random_tokens(model.config, 4, 40)
    work = Blockwise(model, recipe, schemes.schemes(model), dtype, lambda: tokens)
    work.run(MemoryStore(model, dtype))
    layer = model.layers[1]
    attention = layer.self_attn.o_proj
    expected = recipe.expected["model.layers.1.self_attn.o_proj"]
    assert attention.input_scale == pytest.approx(expected, rel=1e-6)
    got = logits(model).float()
    assert (got - exact).norm() < 0.2 * exact.norm()


def test_gptq_sees_the_inputs_that_quantised_blocks_make():
    seen = []

    @dataclass
    class Spy(Recipe):
        statistics: ClassVar = frozenset({"rows"})
        inputs: ClassVar = "quantized"
        stepwise: ClassVar = True

        def quantize(self, matrix):
            seen.append((matrix.name, matrix.statistics.rows.clone()))
            return round_to_nearest(matrix)

    model = decoder(num_hidden_layers=2)
    reference = decoder(num_hidden_layers=2)
    tokens = random_tokens(model.config, 1, 24)
    schemes = Method(weights="rtn", group_size=4, activations="none").resolve().schemes(model)
    Blockwise(model, Spy(), schemes, torch.float32, lambda: tokens).run(
        MemoryStore(model, torch.float32)
    )
    inputs = {}
    for index, layer in enumerate(model.layers):
        for path, module in layer.named_modules():
            if path.endswith("_proj"):
                name = f"model.layers.{index}.{path}"
                module.register_forward_pre_hook(
                    lambda m, args, name=name: inputs.__setitem__(name, args[0].clone())
                )
    with torch.no_grad():
        model(tokens[0], PackedBatch.from_lengths([24]))
    assert len(seen) == 14
    for name, rows in seen:
        torch.testing.assert_close(rows, inputs[name].float(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        exact = reference.embed_tokens(tokens[0])
    assert not torch.allclose(seen[-1][1].mean(), exact.mean())


def test_methods_beat_rounding_to_nearest_on_the_blocks_output():
    """Inputs with a few strong channels, as language models have."""
    tokens = random_tokens(decoder().config, 12, 48, seed=1)
    held_out = random_tokens(decoder().config, 4, 48, seed=2)

    def make():
        model = decoder(num_hidden_layers=1, hidden_size=64)
        model.layers[0].post_attention_layernorm.weight.data[:3] = 12.0
        model.layers[0].input_layernorm.weight.data[5:8] = 12.0
        return model

    def error(weights):
        exact = make()
        model = make()
        method = Method(weights=weights, bits=4, group_size=None, activations="none")
        method.group_size = "channel"
        compress_decoder(model, method, tokens)
        return sum(float((logits(model, t) - logits(exact, t)).norm()) for t in held_out)

    nearest = error("rtn")
    assert error("awq") < 0.8 * nearest
    assert error("gptq") < 0.9 * nearest


def test_rotation_and_integer_scales_go_through_the_pipeline(tmp_path):
    model = decoder(tie_word_embeddings=True, intermediate_size=128)
    checkpoint.save(model, tmp_path / "source")
    options = CompressOptions(
        tmp_path / "source",
        tmp_path / "out",
        weights="rtn",
        bits=4,
        group_size=32,
        scales="integer",
        rotate="hadamard",
        head=8,
        settings={"scales.largest": 511, "rotation.seed": 3},
    )
    result = run(options)
    assert set(result.quantised.values()) == {"W4A8 g32 integer", "W8A8 channel"}
    loaded = checkpoint.load(tmp_path / "out")
    assert not loaded.config.tie_word_embeddings
    exact = logits(model)
    assert (logits(loaded) - exact).norm() < 0.5 * exact.norm()
    report = json.loads((tmp_path / "out" / pipeline.REPORT).read_text())
    assert report["method"]["rotate"] == "hadamard"


def test_the_head_of_multi_token_prediction_is_rounded_and_reported(tmp_path):
    model = mla_decoder(num_mtp_layers=1, mtp_dense=False)
    checkpoint.save(model, tmp_path / "source")
    result = run(
        CompressOptions(
            tmp_path / "source",
            tmp_path / "out",
            weights="gptq",
            group_size=4,
            calibration=CALIBRATION,
        )
    )
    fallen = {name for name in result.fell_back if name.startswith("model.layers.2.")}
    assert "model.layers.2.eh_proj" in fallen
    assert set(result.fell_back) == fallen
    assert result.quantised["model.layers.2.eh_proj"] == "W4A8 g4"
    assert checkpoint.load(tmp_path / "out").mtp is not None


def test_the_scheme_of_the_default_is_the_methods():
    for name, entry in RECIPES.items():
        recipe = entry.load()
        assert isinstance(recipe.default_scheme, WeightScheme), name
