"""Every damaged or hostile checkpoint is refused with a message that names what is wrong."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from serval.errors import CheckpointError, ConfigError, ServalError
from serval.models import checkpoint
from serval.models.checkpoint.hub_config import HubConfig
from serval.models.checkpoint.reading import empty_decoder
from serval.models.checkpoint.registry import family_of_hub_config
from serval.models.checkpoint.safetensors_file import read_header
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder

SMALL = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return checkpoint.save(Decoder(SMALL), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return checkpoint.save(Decoder(SMALL), tmp_path / "model", max_shard_bytes=4000)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(directory: Path, *words: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        checkpoint.load(directory)
    for word in words:
        assert word in str(caught.value)


def test_missing_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.pop(UP))
    refused(directory, UP, "is missing from", "model.safetensors")


def test_unexpected_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.layers.9.odd": torch.zeros(2)}))
    refused(directory, "model.layers.9.odd", "has no place in a llama model")


def test_misshapen_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({UP: torch.zeros(24, 15)}))
    refused(directory, UP, "[24, 15]", "[24, 16]")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_tensor(directory: Path, value: float, word: str, dtype: torch.dtype) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].to(dtype)
        tensors[UP][-1, -1] = value

    edit_tensors(directory, poison)
    refused(directory, UP, word, "check_finite=False")
    loaded = checkpoint.load(directory, check_finite=False)
    assert not torch.isfinite(loaded.layers[1].mlp.up_proj.weight).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_dtype_that_is_no_weight(directory: Path, dtype: torch.dtype) -> None:
    edit_tensors(directory, lambda t: t.update({UP: torch.zeros(24, 16).to(dtype)}))
    refused(directory, UP, str(dtype), "dequantise")


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_truncated_file(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "model.safetensors")


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, tuple[object, bytes, str]] = {
    "overlap": ({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24), "overlaps"),
    "same-range": ({"a": entry(0, 16), "b": entry(0, 16)}, bytes(16), "overlaps"),
    "hole": ({"a": entry(0, 8), "b": entry(16, 24)}, bytes(24), "hole"),
    "beyond-end": ({"a": entry(0, 1 << 40)}, bytes(8), "truncated"),
    "negative": ({"a": entry(-8, 8, [4])}, bytes(16), "byte range"),
    "reversed": ({"a": entry(8, 0, [-2])}, bytes(8), "shape"),
    "shape-overflow": ({"a": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8), "needs"),
    "float-shape": ({"a": entry(0, 8, [2.0])}, bytes(8), "shape"),
    "boolean-shape": ({"a": entry(0, 4, [True])}, bytes(4), "shape"),
    "unknown-dtype": ({"a": entry(0, 8, [2], "PICKLE")}, bytes(8), "dtype"),
    "dtype-list": ({"a": entry(0, 8, [2], ["F32"])}, bytes(8), "dtype"),
    "not-object": ([1, 2], b"", "JSON object"),
    "entry-not-object": ({"a": 3}, b"", "'a'"),
    "not-json": (b"{nope", b"", "not JSON"),
    "not-text": (b"\xff\xfe\x00", b"", "not JSON"),
    "deep": (b"[" * 200_000, b"", "not JSON"),
    "trailing": ({"a": entry(0, 8)}, bytes(80), "belong to no tensor"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
        b'"data_offsets":[0,4]}}',
        bytes(4),
        "twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(directory: Path, case: str) -> None:
    header, data, word = HOSTILE[case]
    write_header(directory / "model.safetensors", header, data)
    refused(directory, "model.safetensors", word)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 200_000_000, 50])
def test_header_length_beyond_the_file(directory: Path, length: int) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(directory, "model.safetensors", str(length))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_corrupted_headers_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4, dtype=torch.int8)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 3, len(raw)))])
    with contextlib.suppress(CheckpointError):
        assert all(t.end <= len(raw) for t in read_header(path).values())


def test_index_pointing_elsewhere(sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    for shard in ("../outside.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, ".."):
        edit_json(index, weight_map={**weight_map, UP: shard})
        refused(sharded, UP, "same directory")


def test_missing_shard_and_wrong_index(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.ghost": weight_map[UP]})
    refused(sharded, "model.ghost", "lacks it")
    edit_json(index, weight_map={})
    refused(sharded, "weight_map")
    edit_json(index, weight_map=weight_map)
    (sharded / weight_map[UP]).unlink()
    refused(sharded, "shard", weight_map[UP], "is missing")


def test_tensor_in_two_shards(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    save_file({UP: torch.zeros(24, 16)}, sharded / "extra.safetensors")
    edit_json(index, weight_map={**weight_map, UP: "extra.safetensors"})
    refused(sharded, UP, "extra.safetensors")


def test_pickles_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pickle", "pytorch_model.bin", "save_pretrained")


def test_places_that_are_no_checkpoint(tmp_path: Path, directory: Path) -> None:
    refused(tmp_path, "config.json", "is missing")
    refused(tmp_path / "nowhere", "no directory")
    refused(directory / "config.json", "is a file")
    (directory / "model.safetensors").unlink()
    refused(directory, "model.safetensors")
    (directory / "config.json").write_text("{")
    refused(directory, "config.json", "not valid JSON")
    (directory / "config.json").write_text("[]")
    refused(directory, "config.json", "JSON object")


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"org/model.*hub did not provide.*no route"):
        checkpoint.load("org/model")


def test_hub_name_fetches_no_code(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    asked: dict[str, object] = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert checkpoint.load("org/model").config.vocab_size == SMALL.vocab_size
    assert asked["name"] == "org/model"
    assert not any(".py" in p or ".bin" in p or p == "*" for p in asked["patterns"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_type", "longrope", "yarn")),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, ("rope_type", "dynamic")),
        ({"rope_parameters": {"rope_type": "llama3"}}, ("rope_parameters.factor", "missing")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"vocab_size": "many"}, ("vocab_size", "many")),
        ({"vocab_size": None}, ("vocab_size", "missing")),
        ({"vocab_size": True}, ("vocab_size", "True")),
        ({"num_attention_heads": 0}, ("num_attention_heads",)),
        ({"num_attention_heads": 0, "head_dim": None}, ("num_attention_heads",)),
        ({"intermediate_size": -4}, ("intermediate_size", "-4")),
        ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads",)),
        ({"eos_token_id": "</s>"}, ("eos_token_id",)),
        ({"pretraining_tp": 2}, ("pretraining_tp",)),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ("quant_method", "mxfp4")),
        ({"quantization_config": [1]}, ("quant_method",)),
    ],
)
def test_config_values_are_refused_by_key(
    directory: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    (directory / "generation_config.json").unlink()
    edit_json(directory / "config.json", **changes)
    refused(directory, *words, kind=ConfigError)


def test_more_layers_than_tensors(directory: Path) -> None:
    edit_json(directory / "config.json", num_hidden_layers=5000)
    refused(directory, "5000 layers")
    edit_json(directory / "config.json", num_hidden_layers=10**9)
    refused(directory, "num_hidden_layers", "1000000000", kind=ConfigError)


def test_more_experts_than_tensors(tmp_path: Path) -> None:
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_experts=10**7, num_local_experts=10**7)
    refused(tmp_path, "is missing from")


def test_unknown_architecture_lists_the_families(directory: Path) -> None:
    edit_json(
        directory / "config.json",
        model_type="mamba",
        architectures=["MambaForCausalLM"],
        auto_map={"AutoModelForCausalLM": "evil.Model"},
    )
    (directory / "evil.py").write_text("raise SystemExit('code from a checkpoint ran')")
    refused(directory, "MambaForCausalLM", "llama", "longcat_flash", kind=ConfigError)
    edit_json(directory / "config.json", architectures=["LlamaForCausalLM"])
    assert checkpoint.load(directory).config.family == "llama"


def test_tied_model_accepts_a_stored_head(directory: Path) -> None:
    edit_json(directory / "config.json", tie_word_embeddings=True)
    assert checkpoint.load(directory).lm_head is None


@pytest.mark.parametrize("name", tiny_models.FAMILY_CASES)
def test_missing_tensor_is_named_in_every_family(name: str, tmp_path: Path) -> None:
    tiny_models.make(name).save_pretrained(tmp_path)
    names = sorted(load_file(tmp_path / "model.safetensors"))
    victim = next(n for n in names if "layers.1" in n and "mlp" in n)
    edit_tensors(tmp_path, lambda t: t.pop(victim))
    refused(tmp_path, victim)


@pytest.mark.parametrize("name", tiny_models.FAMILY_CASES)
def test_no_config_value_crashes(name: str) -> None:
    """Any key with a wrong value either means something or is refused in words."""
    base = json.loads(json.dumps(tiny_models.CONFIGS[name]().to_dict()))
    family = family_of_hub_config(base)
    odd = [0, -1, 3, 1.5, "x", None, [1], {}, True, float("nan")]
    for key in base:
        for value in odd:
            with contextlib.suppress(ServalError):
                empty_decoder(family.read_config(HubConfig({**base, key: value})))
    for key in base["rope_parameters"]:
        for value in odd:
            rope = {**base["rope_parameters"], key: value}
            with contextlib.suppress(ServalError):
                family.read_config(HubConfig({**base, "rope_parameters": rope}))


def test_fewer_mtp_layers_than_promised(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["deepseek_v3"]()
    family = family_of_hub_config(config.to_dict())
    read = family.read_config(HubConfig({**config.to_dict(), "num_nextn_predict_layers": 10**7}))
    with pytest.raises(CheckpointError, match="hold 1 layers after the first 3"):
        family.fit(read, ["model.norm.weight", "model.layers.3.eh_proj.weight"])
