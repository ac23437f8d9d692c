"""The AFA-LoRA benchmark: honest splits, one start for all methods, a floor that holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from serval.adapt.lora import adapters
from serval.bench import afa_lora
from serval.bench.afa_lora import ADAPTERS, Size, Toy, fit_layer, linear_floor, prepare
from serval.bench.harness import MissingPeerError, Setup
from serval.bench.training_runs import Text
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Decoder:
    """A tiny model and random rows instead of serval-tiny and the headers."""
    torch.manual_seed(0)
    decoder = Decoder(
        ModelConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    )
    rows: Any = [((torch.arange(64) * (i % 5 + 3)) % 96, [64], None) for i in range(20)]
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    monkeypatch.setattr(afa_lora, "headers", list)
    text = Text(rows[:16], rows[16:18], rows[18:])
    monkeypatch.setattr(afa_lora, "make_text", lambda *_: text)
    monkeypatch.setattr(afa_lora.checkpoint, "load", lambda *_, **__: copy.deepcopy(decoder))
    return decoder


def test_splits_hold_windows_of_different_files() -> None:
    texts = [" ".join(str(i * 1000 + j) for j in range(60)) for i in range(200)]

    def tokenize(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    size = Size(row_tokens=16, pool=400, validation_rows=50, test_rows=50)
    text = afa_lora.make_text(tokenize, texts, size)
    rows = {"train": text.training, "validation": text.validation, "test": text.test}
    files = {part: {int(r[0][0]) // 1000 for r in found} for part, found in rows.items()}
    assert [len(found) for found in rows.values()] == [400, 50, 50]
    assert all(len(r[0]) == 16 for found in rows.values() for r in found)
    assert not files["train"] & files["validation"]
    assert not files["train"] & files["test"]
    assert not files["validation"] & files["test"]
    assert 8 <= len(files["test"]) <= 32  # a tenth of 200, drawn 50 times


def test_every_method_starts_at_the_model_and_trains_what_it_says(small: Decoder) -> None:
    pytest.importorskip("peft")
    tokens, batch = torch.arange(20), PackedBatch.from_lengths([20])
    with torch.no_grad():
        start = small.logits(small(tokens, batch))
    counts = {}
    for method in (*ADAPTERS, "full"):
        decoder, _ = prepare(copy.deepcopy(small), method, 4, 10)
        with torch.no_grad():
            found = decoder.logits(decoder(tokens, batch))
        torch.testing.assert_close(found, start, rtol=0, atol=2e-6 if method == "dora" else 0)
        counts[method] = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert counts["lora"] == counts["rslora"] == counts["afa-lora"]
    outputs = sum(m.out_features for m in adapters(_lora(small)).values())
    assert counts["dora"] == counts["lora"] + outputs  # one magnitude per output
    assert counts["full"] == sum(p.numel() for p in small.parameters())


def _lora(decoder: Decoder) -> Decoder:
    return prepare(copy.deepcopy(decoder), "lora", 4, 10)[0]


def test_dora_without_peft_says_what_to_install(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingPeerError, match=r"serval-llm\[adapt\]"):
        prepare(small, "dora", 4, 10)


def test_the_floor_is_the_best_linear_map_and_only_a_non_linear_layer_gets_below() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, generator=generator)
    b = torch.randn(8, 3, generator=generator)
    x = torch.randn(200_000, 8, generator=generator)
    y = (x @ a.T).relu() @ b.T
    best = torch.linalg.lstsq(x, y).solution
    left = float((x @ best - y).square().sum() / y.square().sum())
    assert linear_floor(a, b) == pytest.approx(left, abs=5e-3)
    toy = Toy(width=8, rank=2, steps=400, batch=64)
    found = {method: fit_layer(toy, method, 0) for method in afa_lora.TOYS}
    assert found["non-linear"]["left"] < 1e-3
    for method in ("lora", "afa-lora"):
        assert found[method]["left"] == pytest.approx(found[method]["floor"], rel=0.05)


@pytest.mark.usefixtures("small")
def test_it_runs_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    setup = Setup(quick=True, note=lambda line: None)
    first = afa_lora.collect(setup)
    names = [f"expressiveness-{method}" for method in afa_lora.TOYS]
    names += ["untuned", "full", *(f"{method}-r2" for method in ADAPTERS)]
    assert [case.case for case in first] == names
    losses = {case.case: case.metrics.get("test_loss") for case in first[3:]}
    assert all(losses[name] < losses["untuned"] for name in losses if name != "untuned")
    assert len(set(losses.values())) == len(losses)
    by_name = {case.case: case.metrics for case in first}
    assert by_name["lora-r2"]["gap_closed"] == 0
    assert by_name["afa-lora-r2"]["better"] in ("0/2", "1/2", "2/2")
    monkeypatch.setattr(afa_lora, "adapt", None)
    monkeypatch.setattr(afa_lora, "fit_layer", None)
    again = afa_lora.collect(setup)
    assert [case.metrics for case in again] == [case.metrics for case in first]
