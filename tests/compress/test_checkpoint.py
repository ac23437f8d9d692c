from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serval.compress import CompressOptions, run
from serval.compress.calibrate import Calibration
from serval.compress.scheme import WeightScheme, quantize
from serval.errors import CheckpointError, ConfigError, DataError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, mla_decoder, moe_decoder


def logits(model, tokens):
    with torch.no_grad():
        return model.logits(model(tokens, PackedBatch.from_lengths([len(tokens)])))


@pytest.fixture
def source(tmp_path) -> Path:
    return checkpoint.save(decoder(tie_word_embeddings=True), tmp_path / "source")


@pytest.mark.parametrize("make", [decoder, moe_decoder, mla_decoder])
@pytest.mark.parametrize("head", [False, True])
def test_save_and_load_give_the_same_logits(tmp_path, make, head):
    checkpoint.save(make(), tmp_path / "source")
    options = CompressOptions(tmp_path / "source", tmp_path / "out", head=8 if head else None)
    result = run(options)
    assert result.bytes_after < 0.7 * result.bytes_before
    first = checkpoint.load(tmp_path / "out")
    checkpoint.save(first, tmp_path / "again")
    again = checkpoint.load(tmp_path / "again")
    tokens = torch.arange(20)
    assert torch.equal(logits(first, tokens), logits(again, tokens))
    exact = logits(checkpoint.load(tmp_path / "source"), tokens)
    assert (logits(first, tokens) - exact).norm() < 0.15 * exact.norm()
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_tied_int8_table_round_trip(tmp_path, source):
    result = run(CompressOptions(source, tmp_path / "out", head=8))
    assert result.kept == {}
    model = checkpoint.load(tmp_path / "out")
    exact = logits(checkpoint.load(source), torch.arange(20))
    assert (logits(model, torch.arange(20)) - exact).norm() < 0.15 * exact.norm()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_of_its_own_is_compressed_when_asked(tmp_path, bits):
    exact = decoder(tie_word_embeddings=False)
    checkpoint.save(exact, tmp_path / "source")
    result = run(CompressOptions(tmp_path / "source", tmp_path / "plain", head=8))
    assert "--embedding 8" in result.kept["model.embed_tokens"]
    out = tmp_path / "out"
    result = run(CompressOptions(tmp_path / "source", out, head=8, embedding=bits))
    assert result.kept == {}
    assert set(result.quantised) >= {"model.embed_tokens", "lm_head"}
    model = checkpoint.load(out)
    rounded = quantize(exact.embed_tokens.weight, WeightScheme(bits, None if bits == 8 else 32))
    rows = model.embed_tokens(torch.arange(20))
    torch.testing.assert_close(rows, rounded.dequantize()[:20], rtol=2e-2, atol=1e-6)
    tokens = torch.arange(20)
    assert (logits(model, tokens) - logits(exact, tokens)).norm() < 0.3 * logits(
        exact, tokens
    ).norm()
    checkpoint.save(decoder(tie_word_embeddings=True), tmp_path / "tied")
    with pytest.raises(ConfigError, match=r"embedding is its output head too.*--head"):
        run(CompressOptions(tmp_path / "tied", tmp_path / "x", embedding=8))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scales", ["float", "integer"])
def test_a_four_bit_head_has_groups(tmp_path, tied, scales):
    exact = decoder(tie_word_embeddings=tied, intermediate_size=96)
    checkpoint.save(exact, tmp_path / "source")
    options = {"weights": "rtn", "bits": 8, "group_size": 32, "scales": scales, "head": 4}
    result = run(CompressOptions(tmp_path / "source", tmp_path / "out", **options))
    table = "model.embed_tokens" if tied else "lm_head"
    assert result.quantised[table].startswith("W4A8 g32")
    assert ("integer" in result.quantised[table]) == (scales == "integer")
    model = checkpoint.load(tmp_path / "out")
    rounded = quantize((exact.lm_head or exact.embed_tokens).weight, WeightScheme(4, 32))
    held = (model.embed_tokens if tied else model.lm_head).quantized()
    assert torch.equal(held.codes, rounded.codes)
    torch.testing.assert_close(held.scales, rounded.scales, rtol=2e-2, atol=0)


def test_bfloat16_scales_are_stored_as_rounded(tmp_path):
    checkpoint.save(decoder(), tmp_path / "source", dtype=torch.bfloat16)
    run(CompressOptions(tmp_path / "source", tmp_path / "out"))
    stored = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert stored[f"{name}.weight"].dtype == torch.int8
    assert stored[f"{name}.weight_scale"].dtype == torch.bfloat16
    weight = load_file(tmp_path / "source/model.safetensors")[f"{name}.weight"].float()
    scale = stored[f"{name}.weight_scale"].float()
    codes = (weight / scale).round().clamp(-128, 127)
    assert torch.equal(stored[f"{name}.weight"], codes.to(torch.int8))


def test_transformers_loads_the_same_weights(tmp_path, source):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    run(CompressOptions(source, tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = checkpoint.load(tmp_path / "out")
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    # Both round activations to 8 bits, theirs by max/127.5 and ours by max/127.
    exact = logits(checkpoint.load(source), tokens)
    got = logits(ours, tokens)
    assert (got - expected).norm() < 0.03 * expected.norm()
    assert (got - exact).norm() < 0.15 * exact.norm()
    # After its first forward transformers holds float weights: exactly our codes times scales.
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        tensors = ours.get_submodule(path).checkpoint_tensors()
        weight = theirs.model.get_submodule(path).weight
        torch.testing.assert_close(weight, tensors["weight"] * tensors["weight_scale"])


def test_latent_projection_quantised_elsewhere_is_expanded_at_load(tmp_path):
    checkpoint.save(mla_decoder(), tmp_path / "source")
    run(CompressOptions(tmp_path / "source", tmp_path / "out"))
    exact = logits(checkpoint.load(tmp_path / "out"), torch.arange(20))
    path = tmp_path / "out/model.safetensors"
    stored = load_file(path)
    names = [name for name in stored if name.endswith("kv_b_proj.weight")]
    for name in names:
        made = quantize(stored[name], WeightScheme(bits=8))
        stored[name], stored[f"{name}_scale"] = made.codes, made.scales
    save_file(stored, path)
    values = json.loads((tmp_path / "out/config.json").read_text())
    ignored = values["quantization_config"]["ignore"]
    ignored[:] = [name for name in ignored if not name.endswith("kv_b_proj")]
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    model = checkpoint.load(tmp_path / "out")
    got = logits(model, torch.arange(20))
    assert 0 < (got - exact).norm() < 0.05 * exact.norm()
    checkpoint.save(model, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(again[name], stored[name]) for name in names)


def test_quantised_router_is_refused(tmp_path):
    checkpoint.save(moe_decoder(), tmp_path / "source")
    run(CompressOptions(tmp_path / "source", tmp_path / "out"))
    values = json.loads((tmp_path / "out/config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*mlp.gate$"]
    values["quantization_config"]["ignore"] = []
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate'"):
        checkpoint.load(tmp_path / "out")


def test_experts_must_be_treated_alike(tmp_path):
    checkpoint.save(moe_decoder(), tmp_path / "source")
    run(CompressOptions(tmp_path / "source", tmp_path / "out"))
    values = json.loads((tmp_path / "out/config.json").read_text())
    values["quantization_config"]["ignore"].append("re:.*experts.2.up_proj")
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"experts\.2\.up_proj.*all or none"):
        checkpoint.load(tmp_path / "out")


def test_nan_weight_is_named_and_nothing_is_written(tmp_path, source):
    path = source / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(CompressOptions(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_output_is_not_overwritten_unless_forced(tmp_path, source):
    out = tmp_path / "out"
    run(CompressOptions(source, out))
    with pytest.raises(ConfigError, match="--force"):
        run(CompressOptions(source, out))
    run(CompressOptions(source, out, force=True))
    with pytest.raises(ConfigError, match="the model itself"):
        run(CompressOptions(source, source, force=True))
    with pytest.raises(ConfigError, match="already quantised"):
        run(CompressOptions(out, tmp_path / "twice"))
    with pytest.raises(ConfigError, match="bits=3"):
        run(CompressOptions(source, tmp_path / "x", bits=3))
    with pytest.raises(ConfigError, match="unknown compression method 'int3'"):
        run(CompressOptions(source, tmp_path / "x", weights="int3"))


def test_recipe_travels_with_the_model(tmp_path, source):
    (source / "recipe.yaml").write_text("data: {}\n")
    run(CompressOptions(source, tmp_path / "out"))
    assert (tmp_path / "out/recipe.yaml").read_text() == "data: {}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_groups": {}}, "config_groups is missing or empty"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"quantization_status": "frozen"}, "quantization_status"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'"),
        ({"ignore": ["re:("]}, "not a regular expression"),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
            "num_bits",
        ),
        ({"config_groups": {"group_0": 3}}, "group_0"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, source, change, message):
    out = tmp_path / "out"
    run(CompressOptions(source, out))
    values = json.loads((out / "config.json").read_text())
    values["quantization_config"].update(change)
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(out)


def test_missing_scale_is_named(tmp_path, source):
    out = tmp_path / "out"
    run(CompressOptions(source, out))
    stored = load_file(out / "model.safetensors")
    del stored["model.layers.0.self_attn.k_proj.weight_scale"]
    save_file(stored, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_scale"):
        checkpoint.load(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 5}, "output head can have 4 or 8 bits, got 5"),
        ({"embedding": 3}, "embedding can have 4 or 8 bits, got 3"),
        ({"settings": {"depth": 1}}, "method 'int8' has no setting 'depth'; it has: none"),
        (
            {"weights": "gptq", "settings": {"damping": "much"}},
            "setting 'damping' of method 'gptq': .*number.*'much'",
        ),
        ({"settings": {"scales.mode": "pow3"}}, "setting 'mode' of scales: .*'pow3'"),
        ({"settings": {"rotation.seed": 3}}, "no rotation is chosen"),
        ({"weights": "gptq", "settings": {"damping": -1}}, "'damping' .* greater than 0, got -1"),
        ({"weights": "awq", "settings": {"steps": 0}}, "'steps' .* greater than or equal to 1"),
        ({"ignore": ["nomatch*"]}, r"ignore pattern 'nomatch\*' fits no matrix.*like 'model\."),
        ({"overrides": ["downproj:bits=8"]}, "override pattern 'downproj' fits no matrix"),
        ({"ignore": ["*"]}, "no matrix would be quantised: all 15 stay in float"),
        ({"overrides": ["*down_proj:bit=8"]}, "expected PATTERN:key=value"),
        ({"overrides": ["*down_proj:bits=5"]}, "4 or 8 bits, got bits=5"),
        ({"overrides": ["*down_proj:bits=4,bits=8"]}, "gives 'bits' twice"),
        ({"group_size": 48}, "up_proj: group_size=48 does not divide the 64 inputs|48 does not"),
        ({"group_size": "row"}, "group size 'row'"),
        ({"format": "zip"}, "format is 'zip'"),
        ({"rotate": "left"}, "unknown rotation 'left'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, source, options, message):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        run(CompressOptions(source, out, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def nan_weight(source, options):
    path = source / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(stored, path)


def empty_text(source, options):
    (source / "empty.txt").write_text(" \n")
    options["calibration"] = Calibration(str(source / "empty.txt"))


def cut_short(source, options):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_shape(source, options):
    values = json.loads((source / "config.json").read_text())
    values["intermediate_size"] += 8
    (source / "config.json").write_text(json.dumps(values))


def odd_groups(source, options):
    options["group_size"] = 48


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (nan_weight, CheckpointError, r"model\.layers\.1\.mlp\.up_proj\.weight.* holds NaN"),
        (empty_text, DataError, r"empty\.txt' is empty; give some text"),
        (cut_short, CheckpointError, r"model\.safetensors"),
        (other_shape, CheckpointError, r"mlp\.\S+ in .* has shape .*config\.json implies"),
        (odd_groups, ConfigError, r"model\.layers\.0\.\S+: group_size=48 does not divide"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, source, spoil, error, message):
    options = {"weights": "gptq", "calibration": Calibration("random", 2, 8)}
    spoil(source, options)
    with pytest.raises(error, match=message):
        run(CompressOptions(source, tmp_path / "out", **options))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
