"""The engines that decode and prefill measure do the work they are timed for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serval.bench import decode, prefill
from serval.bench.harness import Case, Setup
from serval.bench.language_models import llama_cpp, serval
from serval.bench.ours import ServalEngine
from serval.bench.peers import LlamaCppEngine, TransformersEngine
from serval.bench.shapes import LLAMA_1B, attention_flops, head_parameters, linear_parameters


@pytest.fixture(autouse=True)
def _grad_back_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    yield
    torch.set_grad_enabled(True)


def test_the_shape_is_llama_1b() -> None:
    total = linear_parameters(LLAMA_1B) + head_parameters(LLAMA_1B)
    assert total == 1_235_746_816  # meta-llama/Llama-3.2-1B has this many, and 67,584 in norms
    assert attention_flops(LLAMA_1B, 2) == 4 * 32 * 64 * 3 * 16


@pytest.mark.parametrize(
    ("weights", "kv"), [(None, "full"), ("int8", "full"), ("w4a8", "full"), ("w4a8-g128", "int8")]
)
def test_our_engine_decodes_behind_a_full_cache(weights: str | None, kv: str) -> None:
    engine = ServalEngine("tiny", weights, kv)
    engine.fill(2, 40, 8)
    wall, cpu = engine.decode(4)
    assert wall > 0
    assert cpu > 0
    assert engine.llm is not None
    for _ in range(2):  # a round starts again behind the same cache
        requests = list(engine.llm.engine.requests.values())
        assert [r.sequences[0].num_output for r in requests] == [4, 4]
        assert [r.sequences[0].cache.num_tokens for r in requests] == [44, 44]
        assert engine.llm.engine.manager.used_blocks == 4
        engine.decode(4)
    assert engine.prefill(2, 33)[0] > 0
    full = 2 * 2 * 2 * 32 * 4
    assert engine.cache_bytes_per_token() == (full if kv == "full" else full // 4 + 2 * 2 * 2 * 4)
    elements = linear_parameters(engine.config) + head_parameters(engine.config)
    least = {None: 4.0, "int8": 1.0}.get(weights, 0.5)
    assert least * elements <= engine.weight_bytes() < 1.7 * least * elements + 50_000


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_transformers_goes_back_to_its_context_after_a_round(cache: str) -> None:
    engine = TransformersEngine("tiny", cache)
    engine.fill(2, 40, 8)
    before = engine._step(engine._tokens())
    engine._rewind(1)
    engine.decode(4)
    assert int(engine.cache.get_seq_length()) == 40
    assert torch.equal(engine._step(engine._tokens()), before)
    assert engine.prefill(2, 16)[0] > 0


def test_llama_cpp_keeps_its_context_and_its_state_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    engine = LlamaCppEngine("tiny", "Q8_0", threads=1)
    engine.fill(2, 40, 8)
    tokens = [(1, 40, sequence, True) for sequence in range(2)]
    engine.run(tokens)
    before = engine.logits(0).copy()
    assert np.allclose(before, engine.logits(1), atol=1e-3)  # both hold the same prompt
    for sequence in range(2):
        engine.api.llama_memory_seq_rm(engine.memory, sequence, 40, -1)
    engine.decode(4)
    engine.run(tokens)
    assert np.allclose(before, engine.logits(0), atol=1e-4)
    assert len(list(tmp_path.glob("*.state"))) == 1
    engine.close_context()
    assert engine.prefill(2, 16)[0] > 0


@pytest.mark.parametrize("module", [decode, prefill])
def test_quick_benchmarks_run_end_to_end(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of ours and one peer, each in its process; without llama.cpp it is reported missing."""
    chosen = {"int8": (serval("int8", weights="int8"), [llama_cpp("Q8_0", 1)])}
    monkeypatch.setattr(module, "engines", lambda threads: chosen)
    lines: list[str] = []
    cases: list[Case] = module.collect(Setup(quick=True, only="batch8", note=lines.append))
    assert [case.peer for case in cases] == ["llama.cpp Q8_0"]
    case = cases[0]
    assert "batch8-ctx64" in case.case
    assert case.ours is not None
    assert case.failed is None
    assert case.ratio is not None or case.missing is not None
    assert 0 < case.metrics["resident_gib"] <= case.metrics["peak_gib"]
    assert lines
