"""Checkpoints as compressed-tensors itself writes them load; ours load in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serval.compress.compressed_tensors import quantization_config_of
from serval.compress.install import install
from serval.compress.scheme import WeightScheme
from serval.compress.storage import FORMATS
from serval.compress.targets import targets
from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from tests.compress.test_modules import NAMES, SCHEMES, rounded
from tests.compress.toy import decoder, mla_decoder, moe_decoder

GROUP4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CHANNEL8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, PackedBatch.from_lengths([len(tokens)])))


def quantised(model: Decoder, scheme: WeightScheme, format_: str | None = None) -> Decoder:
    for target in targets(model):
        if target.kind == "linear":
            weight = rounded(target.module.weight.detach(), scheme)
            if weight.input_scale is not None:
                weight.input_scale = 0.05
            install(model, target, weight, format=format_)
    model.quantization_config = quantization_config_of(model)
    return model


# -- ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("format_", FORMATS)
def test_save_and_load_give_the_same_model(
    tmp_path: Path, scheme: WeightScheme, format_: str
) -> None:
    model = quantised(decoder(intermediate_size=96), scheme, format_)
    checkpoint.save(model, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    tokens = torch.arange(20)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    first = model.layers[1].mlp.down_proj.quantized()
    second = again.layers[1].mlp.down_proj.quantized()
    assert torch.equal(first.codes, second.codes)
    if scheme.scales == "integer":
        assert torch.equal(first.integer, second.integer)
        assert torch.equal(first.row_factor, second.row_factor)
    assert (tmp_path / "out/private.serval").exists() == (scheme.scales == "integer")
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert not any("row_factor" in name for name in names)
    checkpoint.save(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("format_", FORMATS)
def test_transformers_computes_the_same(tmp_path: Path, scheme: WeightScheme, format_: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = quantised(decoder(intermediate_size=96), scheme, format_)
    checkpoint.save(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    got = logits(model, tokens)
    # With int8 activations theirs clip at -128 and divide by 127.5, ours at 127 and by 127.
    tolerance = 1e-4 if scheme.activations == "none" else 0.03
    assert (got - expected).norm() < tolerance * expected.norm()
    # After its first forward transformers holds float weights: exactly our codes times scales.
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        weight = theirs.model.get_submodule(path).weight
        torch.testing.assert_close(weight, model.get_submodule(path).quantized().dequantize())


def test_transformers_loads_packed_experts(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    scheme = WeightScheme(4, 4, "none")
    model = moe_decoder()
    for target in targets(model):
        if target.kind == "experts":
            stack = target.module
            parts = [
                weight
                for gate_up, down in zip(stack.gate_up_proj, stack.down_proj, strict=True)
                for weight in (*gate_up.detach().chunk(2), down.detach())
            ]
            install(model, target, [rounded(weight, scheme) for weight in parts])
        elif target.kind == "linear":
            install(model, target, rounded(target.module.weight.detach(), scheme))
    model.quantization_config = quantization_config_of(model)
    checkpoint.save(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert (logits(model, tokens) - expected).norm() < 0.01 * expected.norm()
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_bits_may_differ_by_module(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = decoder(intermediate_size=96)
    schemes = {"down_proj": WeightScheme(8), "o_proj": None, "layers.1.mlp.up_proj": SCHEMES[0]}
    for target in targets(model):
        if target.kind == "linear":
            found = [s for end, s in schemes.items() if target.path.endswith(end)]
            scheme = found[0] if found else WeightScheme(4, 32)
            if scheme is not None:
                install(model, target, rounded(target.module.weight.detach(), scheme))
    model.quantization_config = quantization_config_of(model)
    assert len(model.quantization_config["config_groups"]) == 3
    checkpoint.save(model, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    tokens = torch.arange(30)
    assert again.layers[1].mlp.down_proj.storage.scheme == WeightScheme(8)
    assert again.layers[1].mlp.up_proj.storage.scheme == WeightScheme(4)
    assert type(again.layers[0].self_attn.o_proj).__name__ == "Linear"
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert (logits(model, tokens) - expected).norm() < 0.03 * expected.norm()


def test_latent_projection_is_expanded_and_saved_as_it_was(tmp_path: Path) -> None:
    model = mla_decoder()
    target = next(t for t in targets(model) if t.kind == "latent")
    weight = rounded(target.module.weight.detach(), WeightScheme(4, 8, "none"))
    made = install(model, target, weight)
    assert torch.equal(made.weight, weight.dequantize())
    model.quantization_config = quantization_config_of(model)
    checkpoint.save(model, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(again.get_submodule(target.path).weight, made.weight)
    checkpoint.save(again, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_a_quantised_model_stay_as_stored(tmp_path: Path, tied: bool) -> None:
    model = quantised(decoder(tie_word_embeddings=tied).bfloat16(), WeightScheme(4))
    checkpoint.save(model, tmp_path / "out")
    narrow = checkpoint.load(tmp_path / "out")
    assert narrow.embed_tokens.weight.dtype == torch.bfloat16
    assert narrow.norm.weight.dtype == torch.float32
    wide = checkpoint.load(tmp_path / "out")
    for module in (wide.embed_tokens, wide.lm_head):
        if module is not None:
            assert module.weight.dtype == torch.bfloat16
            module.float()
    tokens = torch.arange(40)
    got = logits(narrow, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, logits(wide, tokens), atol=1e-4, rtol=1e-4)


# -- theirs ----------------------------------------------------------------------------------------


def written_elsewhere(
    directory: Path, groups: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float32
) -> Path:
    """A small Llama, rounded to nearest and saved by compressed-tensors and transformers."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    applied = {"config_groups": groups, "ignore": ["lm_head"]}
    apply_quantization_config(model, QuantizationConfig.model_validate(applied))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        weight = module.weight.data
        spans = weight.unflatten(1, (module.weight_scale.shape[1], -1))
        scale, zero = calculate_qparams(spans.amin(-1), spans.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.04)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    return directory


def compare(directory: Path, tolerance: float) -> Decoder:
    """Load in both; returns ours."""
    from transformers import AutoModelForCausalLM

    ours = checkpoint.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    assert (logits(ours, tokens) - expected).norm() < tolerance * expected.norm()
    return ours


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        (GROUP4, None, WeightScheme(4, 32, "none")),
        (GROUP4, TOKEN, WeightScheme(4, 32, "token")),
        ({**GROUP4, "strategy": "channel", "group_size": None}, TOKEN, WeightScheme(4)),
        (CHANNEL8, TOKEN, WeightScheme(8)),
        (CHANNEL8, TENSOR, WeightScheme(8, None, "static")),
        (CHANNEL8, None, WeightScheme(8, None, "none")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_the_package_load(
    tmp_path: Path, weights: dict, inputs: dict | None, expected: WeightScheme, dtype: torch.dtype
) -> None:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    directory = written_elsewhere(tmp_path / "out", {"group_0": group}, dtype)
    ours = compare(directory, 1e-4 if inputs is None else 0.03)
    made = ours.layers[0].mlp.up_proj
    assert made.storage.scheme == expected
    assert made.storage.scale_dtype == dtype
    stored = load_file(directory / "model.safetensors")
    checkpoint.save(ours, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    prefix = "model.layers.0.mlp.up_proj."
    for name in (name for name in again if name.startswith(prefix)):
        assert torch.equal(again[name], stored[name]), name


def test_asymmetric_files_load(tmp_path: Path) -> None:
    weights = {**GROUP4, "symmetric": False}
    group = {"targets": ["Linear"], "weights": weights}
    ours = compare(written_elsewhere(tmp_path / "out", {"group_0": group}), 1e-4)
    assert ours.layers[0].mlp.up_proj.shift is not None
    checkpoint.save(ours, tmp_path / "again")
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    assert torch.equal(a[name], b[name])


def test_files_with_activation_order_load(tmp_path: Path) -> None:
    """`weight_g_idx`, which older releases of the package wrote: each input names its group."""
    from transformers import LlamaForCausalLM

    from serval.compress.storage import unpack_int32

    group = {"targets": ["Linear"], "weights": GROUP4}
    directory = written_elsewhere(tmp_path / "out", {"group_0": group})
    stored = load_file(directory / "model.safetensors")
    dense = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        prefix = name.removesuffix("weight_packed")
        columns, scale = int(stored[f"{prefix}weight_shape"][1]), stored[f"{prefix}weight_scale"]
        index = torch.randperm(columns) % scale.shape[1]
        stored[f"{prefix}weight_g_idx"] = index.to(torch.int32)
        codes = unpack_int32(stored[name], 4, columns)
        dense[f"{prefix}weight"] = codes.float() * scale[:, index]
    save_file(stored, directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (directory / "config.json").write_text(json.dumps(values))
    ours = checkpoint.load(directory)
    assert ours.layers[0].mlp.up_proj.order is not None
    del values["quantization_config"]
    config = LlamaForCausalLM.config_class.from_dict(values)
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(dense)
    tokens = torch.arange(40)
    with torch.no_grad():
        expected = theirs.eval()(tokens[None]).logits[0]
    assert (logits(ours, tokens) - expected).norm() < 1e-4 * expected.norm()
    checkpoint.save(ours, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    for leaf in ("weight_packed", "weight_g_idx", "weight_scale"):
        name = f"model.layers.0.mlp.up_proj.{leaf}"
        assert torch.equal(again[name], stored[name]), name


def test_files_of_mixed_precision_load(tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": GROUP4, "input_activations": TOKEN},
        "group_1": {"targets": ["re:.*down_proj"], "weights": CHANNEL8, "input_activations": TOKEN},
        "group_2": {"targets": ["model.layers.0.mlp.up_proj"], "weights": GROUP4},
    }
    ours = compare(written_elsewhere(tmp_path / "out", groups), 0.03)
    assert ours.layers[1].mlp.down_proj.storage.scheme == WeightScheme(8)
    assert ours.layers[0].mlp.up_proj.storage.scheme == WeightScheme(4, 32, "none")
    assert ours.layers[1].mlp.up_proj.storage.scheme == WeightScheme(4, 32)


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return checkpoint.save(quantised(decoder(), WeightScheme(4, 4)), tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weights", {"num_bits": 3}, r"group_0\.weights\.num_bits is 3; Serval reads 4 or 8"),
        ("weights", {"type": "float"}, r"weights\.type is 'float'"),
        ("weights", {"strategy": "block"}, r"weights\.strategy is 'block'"),
        ("weights", {"group_size": None}, r"weights\.group_size is None"),
        (
            "weights",
            {"group_size": 7},
            r"layers\.0\.\S+: group_size=7 does not divide the 64",
        ),
        ("weights", {"symmetric": False}, r"weights\.symmetric is False"),
        ("input_activations", {"num_bits": 4}, r"input_activations\.num_bits is 4"),
        ("input_activations", {"symmetric": False}, r"input_activations\.symmetric is False"),
        ("input_activations", {"strategy": "group"}, r"input_activations\.strategy is 'group'"),
        ("input_activations", {"dynamic": "local"}, r"input_activations\.dynamic is 'local'"),
    ],
)
def test_schemes_that_cannot_be_honoured_are_named(
    saved: Path, part: str, change: dict[str, Any], message: str
) -> None:
    values = json.loads((saved / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"][part].update(change)
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        checkpoint.load(saved)


def test_other_formats_are_named(saved: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"format is 'marlin-24'; Serval reads 'int-quantized'"):
        checkpoint.load(saved)


def test_damage_is_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    name = "model.layers.0.self_attn.k_proj"
    stored = load_file(path)
    cut = {**stored, f"{name}.weight_packed": stored[f"{name}.weight_packed"][:, :-1].contiguous()}
    save_file(cut, path)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_packed.* has shape \[32, 7\]"):
        checkpoint.load(saved)
    cut = {key: value for key, value in stored.items() if key != f"{name}.weight_shape"}
    save_file(cut, path)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_shape.* is missing"):
        checkpoint.load(saved)
    save_file(
        {**stored, f"{name}.weight_scale": stored[f"{name}.weight_scale"] * float("nan")}, path
    )
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight_scale.* NaN"):
        checkpoint.load(saved)
    shape = torch.tensor([32, 63])  # as many words as for 64 inputs
    save_file({**stored, f"{name}.weight_shape": shape}, path)
    with pytest.raises(CheckpointError, match=rf"^{name}\.weight_shape is \(32, 63\)"):
        checkpoint.load(saved)
