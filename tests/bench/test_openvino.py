"""The OpenVINO model of the peer holds the model that transformers runs, and the peer runs it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serval.bench.harness import MissingPeerError
from serval.bench.openvino_model import FILE, build, scheme_of, write
from serval.bench.openvino_peer import OpenVinoEngine, new_tokens
from serval.bench.peers import hub_config
from serval.bench.shapes import TINY
from serval.compress.scheme import QuantizedWeight, quantize

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def hub_model() -> tuple[torch.nn.Module, dict[str, QuantizedWeight]]:
    """A float model whose weights are exactly those of the int4 model, and these."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    values = hub_config(TINY)
    values.initializer_range = 0.1  # large enough for attention to matter
    model = LlamaForCausalLM._from_config(values, attn_implementation="sdpa", dtype=torch.float32)
    made = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scheme = scheme_of(name, parameter.shape[1])
                made[name] = quantize(parameter, scheme, torch.float16)
                parameter.copy_(made[name].dequantize())
    return model.eval(), made


def test_logits_equal_transformers() -> None:
    openvino = pytest.importorskip("openvino")
    model, made = hub_model()
    compiled = openvino.compile_model(build(TINY, lambda name, shape: made[name]), "CPU", EXACT)
    request = compiled.create_infer_request()
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    for start, stop in ((0, 20), (20, 24)):  # the second call reads the first one's cache
        place = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        values = {
            "input_ids": tokens[:, start:stop],
            "attention_mask": np.ones((2, stop), np.int64),
            "position_ids": place.copy(),
            "beam_idx": np.arange(2, dtype=np.int32),
        }
        logits = request.infer(values)["logits"]
        difference = np.abs(logits - expected[:, start:stop]).max()
        assert difference < 2e-2 * np.abs(expected).max()  # its cache is not float32


def test_the_pipeline_makes_the_models_tokens(tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    model, made = hub_model()
    write(TINY, lambda name, shape: made[name], tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / FILE).exists()
    engine = OpenVinoEngine("tiny", 1, str(tmp_path / "model"), **EXACT)
    engine.open(2, 64, keep_prompts=False)
    prompts = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 33))
    handles = engine.start(prompts, 4)
    while engine.pipeline.has_non_finished_requests():
        engine.pipeline.step()
    for prompt, handle in zip(prompts, handles, strict=True):
        tokens, logits = torch.from_numpy(prompt), None
        for token in new_tokens(handle):
            with torch.no_grad():
                logits = model(tokens[None]).logits[0, -1]
            assert logits[token] > logits.max() - 0.05 * logits.abs().max()  # ties may turn
            tokens = torch.cat([tokens, torch.tensor([token])])
        assert len(tokens) == 37


def test_the_peer_decodes_behind_kept_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino_genai")
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    engine = OpenVinoEngine("tiny", 1)
    engine.fill(8, 200, 8)  # more tokens than a call takes
    for _ in range(2):
        assert engine.decode(4)[0] > 0
    assert engine.prefill(2, 33)[0] > 0
    assert engine.weight_bytes() > TINY.vocab_size * TINY.hidden_size


def test_a_missing_package_is_a_missing_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("openvino"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPeerError, match=r"openvino-genai .*serval-llm\[bench\]"):
        OpenVinoEngine("tiny", 1)
