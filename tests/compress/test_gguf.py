"""Exported GGUF files hold the checkpoint's numbers, and llama.cpp computes the same with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from serval import LLM, SamplingParams
from serval.compress import gguf_file
from serval.compress.gguf_file import export
from serval.compress.gguf_tokenizer import SPLITS
from serval.errors import CheckpointError, ConfigError, ServalError
from serval.models import checkpoint
from serval.models.batch import PackedBatch
from tests.compress.toy import decoder, moe_decoder

TINY = Path(__file__).resolve().parents[2] / "assets/serval-tiny"
PROMPT = "def read_json(path):\n    "

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module", params=["f16", "q8_0", "q4_0"])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> gguf_file.Exported:
    return export(TINY, tmp_path_factory.mktemp("gguf") / "tiny.gguf", request.param)


def test_values_are_those_the_package_rounds_to(exported: gguf_file.Exported) -> None:
    stored = load_file(TINY / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(exported.path).tensors}
    assert len(tensors) == exported.tensors == len(stored)
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.attn_q.weight": "model.layers.3.self_attn.q_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.5.attn_k_norm.weight": "model.layers.5.self_attn.k_norm.weight",
    }
    for name, hub in pairs.items():
        tensor, exact = tensors[name], stored[hub].float().numpy()
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        again = gguf.quants.quantize(exact, tensor.tensor_type)
        assert np.array_equal(got, gguf.quants.dequantize(again, tensor.tensor_type)), name
        step = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.006, "Q4_0": 0.09}[tensor.tensor_type.name]
        assert np.abs(got - exact).max() <= step * np.abs(exact).max(), name
    kinds = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == kinds[exported.kind]
    table = "Q8_0" if exported.kind == "q4_0" else kinds[exported.kind]
    assert tensors["token_embd.weight"].tensor_type.name == table


def test_llama_cpp_generates_the_same_text(exported: gguf_file.Exported) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(exported.path), n_ctx=256, verbose=False, n_threads=1)
    tokens = theirs.tokenize(PROMPT.encode(), add_bos=False)
    llm = LLM(TINY)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    for text in (PROMPT, "It's 1234 items;\n\n\tdone  \u00fcber na\u00efve (x2)"):
        assert theirs.tokenize(text.encode(), add_bos=False) == llm.tokenizer.encode(text)
    ours = llm.generate(PROMPT, params)[0].outputs[0].text
    answer = theirs.create_completion(tokens, max_tokens=24, temperature=0.0)
    text = answer["choices"][0]["text"]
    if exported.kind == "q4_0":  # four bits change words
        assert text
    else:
        assert text == ours
    assert "<|im_start|>" in theirs.metadata["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"family": "llama", "qkv_bias": True, "output_bias": True, "mlp_bias": True}, "f32"),
        ({"family": "llama", "tie_word_embeddings": True}, "f16"),
        ({"family": "qwen2", "qkv_bias": True}, "f32"),
        ({"family": "qwen3", "qk_norm": True, "head_dim": 32}, "f32"),
    ],
)
def test_logits_of_other_families(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    pytest.importorskip("llama_cpp")
    from serval.bench.peers import LlamaCppEngine

    model = decoder(intermediate_size=96, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    checkpoint.save(model, tmp_path / "model")
    path = gguf_file.write_gguf(
        tmp_path / "model.gguf",
        model.config,
        lambda name, shape: load_file(tmp_path / "model/model.safetensors")[name].float().numpy(),
        kind,
    )
    engine = LlamaCppEngine("tiny", "F32", threads=1, path=str(path))
    engine.config = model.config
    tokens = torch.arange(30)
    engine.open(1, 64)
    engine.prompt(0, tokens.tolist())
    with torch.no_grad():
        expected = model.logits(model(tokens, PackedBatch.from_lengths([30])))[-1].numpy()
    assert np.abs(engine.logits(-1) - expected).max() < 4e-3 * np.abs(expected).max()
    engine.close_context()


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoint.save(moe_decoder(), tmp_path / "moe")
    with pytest.raises(ConfigError, match="'qwen3_moe' cannot be exported"):
        export(tmp_path / "moe", tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=r"GGUF type is 'q3_k'; expected one of: f32, f16"):
        export(TINY, tmp_path / "x.gguf", "q3_k")
    checkpoint.save(decoder(), tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        export(tmp_path / "bare", tmp_path / "x.gguf")
    checkpoint.save(decoder(), tmp_path / "odd", tokenizer_dir=TINY)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (tmp_path / "odd/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="splits text by a pattern"):
        export(tmp_path / "odd", tmp_path / "x.gguf")
    values = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**values, "quantization_config": {}}))
    with pytest.raises(ConfigError, match="is quantised; export the float checkpoint"):
        export(tmp_path / "odd", tmp_path / "x.gguf")
    (tmp_path / "there.gguf").write_text("")
    with pytest.raises(ConfigError, match="exists; choose another file"):
        export(TINY, tmp_path / "there.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ServalError, match=r"pip install 'serval-llm\[gguf\]'"):
        export(TINY, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


def test_splits_are_the_tokenizers_of_their_names() -> None:
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert SPLITS[pattern] == "llama-bpe"
