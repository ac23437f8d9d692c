"""The WISCA benchmark: arms that differ in what they say, paired seeds, resumption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serval.bench import wisca
from serval.bench.harness import Setup
from serval.models.decoder import Decoder
from serval.optim import OptimizerOptions, build


def test_models_differ_in_key_heads_only() -> None:
    gqa, mha = (wisca.model(wisca.FULL, name) for name in ("gqa", "mha"))
    assert gqa.num_attention_heads == 4 * (gqa.num_key_value_heads or 0)
    assert mha.num_attention_heads == mha.num_key_value_heads
    gqa.num_key_value_heads = mha.num_key_value_heads
    assert gqa == mha


def test_the_control_divides_rates_by_the_rescaling() -> None:
    torch.manual_seed(0)
    decoder = Decoder(wisca.model(wisca.QUICK, "gqa"))
    factors = wisca.rescaling(decoder)
    part = {name.split(".")[-2]: factor for name, factor in factors.items()}
    assert part.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert part["q_proj"] == pytest.approx(0.5, rel=0.05)
    assert part["v_proj"] == pytest.approx(2.0, rel=0.05)
    assert part["q_proj"] * part["k_proj"] == pytest.approx(1.0, rel=1e-5)
    optimizer = build("adamw", decoder, OptimizerOptions(lr=1e-3))
    wisca.divide_rates(optimizer, factors)
    named = {p: name for name, p in decoder.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        assert [named[p] for p in group["params"]] == group["names"]
        seen |= dict.fromkeys(group["names"], group["base_lr"])
    assert seen.keys() == set(named.values())
    for name, lr in seen.items():
        assert lr == pytest.approx(1e-3 / factors.get(name, 1.0))
    optimizer.set_multiplier(0.5)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.5 * seen[group["names"][0]])


def test_it_runs_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    monkeypatch.setattr(wisca, "EVERY", 2)
    words = [[(i * 7 + j) % 500 for j in range(64)] for i in range(14)]
    rows = [(torch.tensor(row), [64], None) for row in words]
    made: list[int] = []

    def make(size: wisca.Size) -> wisca.Text:
        made.append(1)
        return wisca.Text(rows[:12], rows[12:])  # type: ignore[arg-type]

    monkeypatch.setattr(wisca, "make_text", make)
    setup = Setup(quick=True, note=lambda line: None, only="gqa")
    first = wisca.collect(setup)
    assert [case.case for case in first] == [f"{arm}-gqa" for arm in wisca.ARMS]
    losses = {case.case: case.metrics["validation_loss"] for case in first}
    assert len(set(losses.values())) >= 3
    # a jump at the start is a change of rates, but for AdamW's epsilon
    assert losses["rates-gqa"] == pytest.approx(losses["init-gqa"], abs=1e-4)
    assert abs(losses["init-gqa"] - losses["none-gqa"]) > 1e-3
    again = wisca.collect(setup)
    assert [case.metrics for case in again] == [case.metrics for case in first]
    assert len(made) == 1
