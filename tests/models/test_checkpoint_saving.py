"""Saving is complete or leaves nothing; what was there before survives a failure."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig

from serval.errors import CheckpointError, ConfigError
from serval.models import checkpoint
from serval.models.checkpoint import writing
from serval.models.checkpoint.family import Family, Piece
from serval.models.checkpoint.registry import family_named
from serval.models.config import ModelConfig, MoEConfig, RopeConfig
from serval.models.decoder import Decoder

SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    bos_token_id=1,
    eos_token_id=[2, 3],
)


def same_weights(a: Decoder, b: Decoder) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_shards_index_and_metadata(tmp_path: Path) -> None:
    decoder = Decoder(SMALL)
    out = checkpoint.save(decoder, tmp_path / "deep" / "er" / "model", max_shard_bytes=4000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert {p.name for p in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in decoder.parameters())
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == shard.name
                file.get_tensor(name)
    assert same_weights(checkpoint.load(out), decoder)
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [2, 3]


def test_dtypes(tmp_path: Path) -> None:
    decoder = Decoder(SMALL)
    out = checkpoint.save(decoder, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    wide, half = checkpoint.load(out), checkpoint.load(out, dtype=torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, parameter), narrow in zip(decoder.named_parameters(), half.parameters()):
        assert torch.equal(parameter.bfloat16(), narrow), name


def test_router_bias_stays_float32(tmp_path: Path) -> None:
    model = tiny_models.make("longcat_flash")
    model.save_pretrained(tmp_path / "theirs")
    decoder = checkpoint.load(tmp_path / "theirs", dtype=torch.bfloat16)
    bias = decoder.layers[0].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.model.layers[0].mlp.router.e_score_correction_bias)
    moved = checkpoint.load(tmp_path / "theirs").to(torch.bfloat16)
    assert torch.equal(moved.layers[0].mlp.gate.e_score_correction_bias, bias)
    assert moved.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    out = checkpoint.save(decoder, tmp_path / "ours", dtype=torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.router.e_score_correction_bias"
    assert torch.equal(stored[name], bias)
    assert stored[name].dtype == torch.float32


def test_replaces_a_checkpoint_and_keeps_other_files(tmp_path: Path) -> None:
    out = tmp_path / "model"
    checkpoint.save(Decoder(SMALL), out, max_shard_bytes=4000)
    (out / "notes.txt").write_text("mine")
    second = Decoder(SMALL)
    checkpoint.save(second, out)
    assert not list(out.glob("model-*"))
    assert not (out / "model.safetensors.index.json").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert same_weights(checkpoint.load(out), second)
    assert os.listdir(tmp_path) == ["model"]


def test_saves_into_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("kept")
    decoder = Decoder(SMALL)
    checkpoint.save(decoder, tmp_path)
    assert (tmp_path / "log.txt").read_text() == "kept"
    assert same_weights(checkpoint.load(tmp_path), decoder)


def test_replaces_a_checkpoint_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory, or what a link points to, is filled rather than replaced."""
    checkpoint.save(Decoder(SMALL), tmp_path, max_shard_bytes=4000)
    monkeypatch.chdir(tmp_path)
    second = Decoder(SMALL)
    checkpoint.save(second, ".")
    assert sorted(os.listdir(".")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert same_weights(checkpoint.load(tmp_path), second)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    checkpoint.save(second, tmp_path / "link")
    assert same_weights(checkpoint.load(tmp_path / "real"), second)
    assert (tmp_path / "link").is_symlink()


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    decoder = Decoder(SMALL)
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj.*1e\+06.*bfloat16"):
        checkpoint.save(decoder, tmp_path / "model", dtype=torch.float16)
    assert os.listdir(tmp_path) == []


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        checkpoint.save(Decoder(SMALL), tmp_path / "model", tokenizer_dir=source)
    assert os.listdir(tmp_path) == ["tokenizer"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "odd.py"):
        (source / name).write_text(name)
    out = checkpoint.save(Decoder(SMALL), tmp_path / "model", tokenizer_dir=source)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (out / "odd.py").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_disk_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "model"
    first = Decoder(SMALL)
    checkpoint.save(first, out)
    written = writing.write_file

    def full(path: Path, tensors: list[writing.TensorToWrite]) -> None:
        written(path, tensors[: len(tensors) // 2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing, "write_file", full)
    with pytest.raises(CheckpointError, match="Nothing was left behind") as caught:
        checkpoint.save(Decoder(SMALL), out)
    assert ("MB free" in str(caught.value)) == (number == errno.ENOSPC)
    with pytest.raises(CheckpointError):
        checkpoint.save(Decoder(SMALL), tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]
    assert same_weights(checkpoint.load(out), first)


def test_write_to_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot save to"):
        checkpoint.save(Decoder(SMALL), tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, "model.qk_norm = True; families that can: qwen3"),
        ({"qkv_bias": True}, "families that can: qwen2"),
        ({"attention_sinks": True}, "no family can"),
        ({"rope": RopeConfig(fraction=0.5)}, "model.rope.fraction = 0.5"),
        ({"moe": MoEConfig(4, 2, 8)}, "model.moe"),
        ({"layer_types": ["sliding", "full"], "sliding_window": 4}, "model.sliding_window = 4"),
    ],
)
def test_a_family_refuses_what_it_cannot_express(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    decoder = Decoder(ModelConfig.from_dict({**SMALL.to_dict(), **changes}))
    with pytest.raises(ConfigError, match="cannot express") as caught:
        checkpoint.save(decoder, tmp_path / "model")
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_saves_in_another_family(tmp_path: Path) -> None:
    config = ModelConfig.from_dict({**SMALL.to_dict(), "qk_norm": True, "head_dim": 8})
    decoder = Decoder(config)
    loaded = checkpoint.load(checkpoint.save(decoder, tmp_path / "model", family="qwen3"))
    assert loaded.config.family == "qwen3"
    assert same_weights(loaded, decoder)
    with pytest.raises(ConfigError, match="unknown checkpoint family 'bert'"):
        checkpoint.save(decoder, tmp_path / "model", family="bert")


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_configs_translate_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = tiny_models.CONFIGS[name]()
    theirs.save_pretrained(tmp_path / "theirs")
    config = checkpoint.read_config(tmp_path / "theirs")
    family: Family = family_named(config.family)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(family.write_config(config)))
    assert checkpoint.read_config(tmp_path / "ours") == config
    back = AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    skipped = {"architectures", "dtype", "num_hidden_layers", "decoder_sparse_step"}
    skipped |= {"mlp_only_layers", "max_window_layers", "rope_parameters", "_name_or_path"}
    skipped |= {"num_nextn_predict_layers", "pretraining_tp", "transformers_version"}
    for key, value in theirs.to_dict().items():
        if key not in skipped and hasattr(back, key):
            assert getattr(back, key) == value, key
    ours = {k: v for k, v in back.rope_parameters.items() if v is not None}
    for key, value in theirs.rope_parameters.items():
        assert ours[key] == value, key


def test_older_rope_keys(tmp_path: Path) -> None:
    values = family_named("llama").write_config(SMALL)
    for key in ("rope_parameters", "rope_scaling"):
        values.pop(key)
    values |= {"rope_theta": 5e5, "rope_scaling": {**tiny_models.LLAMA3, "type": "llama3"}}
    del values["rope_scaling"]["rope_theta"], values["rope_scaling"]["rope_type"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    rope = checkpoint.read_config(tmp_path).rope
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", 5e5, 8.0)
    assert rope.original_max_position_embeddings == 64
    values["rope_scaling"] = {"type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    rope = checkpoint.read_config(tmp_path).rope
    assert (rope.kind, rope.factor, rope.mscale) == ("yarn", 4.0, 1.0)
    assert rope.original_max_position_embeddings == SMALL.max_position_embeddings


def test_gpt_oss_experts_are_transposed_and_interleaved() -> None:
    stack = torch.arange(2 * 6 * 4, dtype=torch.float32).view(2, 6, 4)  # [E, 2F, D]
    config = ModelConfig.from_dict({**SMALL.to_dict(), "family": "gpt_oss"})
    (piece,) = family_named("gpt_oss").pieces("layers.0.mlp.experts.gate_up_proj", stack, config)
    assert isinstance(piece, Piece)
    stored = piece.view.reshape(piece.shape)  # [E, D, 2F]
    assert torch.equal(stored[:, :, ::2], stack[:, :3].transpose(1, 2))
    assert torch.equal(stored[:, :, 1::2], stack[:, 3:].transpose(1, 2))


def test_a_file_limit_of_the_system(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a file, as a full disk or quota gives."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(CheckpointError, match="no room to save"):
            checkpoint.save(Decoder(SMALL), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
