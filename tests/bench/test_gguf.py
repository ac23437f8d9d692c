"""The GGUF files the llama.cpp peer runs hold the model that transformers runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from serval.bench.peers import LlamaCppEngine, hub_config
from serval.bench.random_gguf import random_gguf
from serval.bench.shapes import TINY
from serval.compress.gguf_file import interleave_heads, write_gguf
from serval.models.config import ModelConfig

pytest.importorskip("gguf")

TOLERANCE = {"F32": 2e-3, "F16": 4e-3, "Q8_0": 6e-2}  # llama.cpp's cache is float16


def hub_model(config: ModelConfig) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    values = hub_config(config)
    values.initializer_range = 0.1  # large enough for attention to matter
    model = LlamaForCausalLM._from_config(values, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_logits_equal_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    model = hub_model(config)
    state = model.state_dict()
    path = write_gguf(
        tmp_path / "model.gguf", config, lambda name, shape: state[name].numpy(), kind.lower()
    )
    engine = LlamaCppEngine("tiny", kind, threads=1, path=str(path))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    scale = np.abs(expected).max()
    engine.open(2, 64)
    for sequence in range(2):
        engine.prompt(sequence, tokens[sequence, :39].tolist())
        difference = np.abs(engine.logits(-1) - expected[sequence, 38])
        assert difference.max() / scale < TOLERANCE[kind]
    engine.run([(int(tokens[s, 39]), 39, s, True) for s in range(2)])
    for sequence in range(2):
        difference = np.abs(engine.logits(sequence) - expected[sequence, 39])
        assert difference.max() / scale < TOLERANCE[kind]
    engine.close_context()


def test_interleaving_turns_half_split_rotary_into_pairs() -> None:
    rows = np.arange(8.0).reshape(8, 1)  # two heads of four rows
    assert interleave_heads(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_gguf(tmp_path / "model.gguf", TINY, weights)
    assert list(tmp_path.iterdir()) == []


def test_random_q4_0_files_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    wide = dataclasses.replace(TINY, hidden_size=256, num_attention_heads=8)
    reader = gguf.GGUFReader(random_gguf(wide, "Q4_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    values = gguf.quants.dequantize(table.data, table.tensor_type)
    assert 0.01 < values.std() < 0.03
    pytest.importorskip("llama_cpp")
    engine = LlamaCppEngine("tiny", "Q4_0", threads=1)
    assert engine.prefill(1, 16)[0] > 0
