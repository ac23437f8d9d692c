"""The cache benchmark measures the same attention on both sides, for every registered layout."""

from __future__ import annotations

import pytest
import torch

from serval.bench import kv
from serval.bench.harness import Setup

QUIET = {"note": lambda line: None}


def test_every_layout_answers_like_the_peer() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 32)
    want = kv.contiguous_reader(kv.TINY, q, 100, torch.float32)()
    for name, kind in kv.layouts_for(kv.TINY).items():
        got = kv.paged_reader(kind, kv.TINY, q, 100)()
        tolerance = 1e-5 if name == "full" else 0.1
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    rounded = kv.contiguous_reader(kv.TINY, q, 100, torch.bfloat16)()
    torch.testing.assert_close(rounded.float(), want, atol=0.03, rtol=0.03)


def test_quick_cases_cover_the_registry() -> None:
    cases = kv.collect(Setup(quick=True, **QUIET))
    assert len(cases) == 2 * len(kv.layouts_for(kv.TINY))
    by_name = {case.case: case for case in cases}
    full, int8 = (by_name[f"{name}-tiny-attention-batch4-ctx96"] for name in ("full", "int8"))
    assert full.peer == "torch SDPA float32"
    assert int8.peer == "torch SDPA bfloat16"
    assert full.metrics["bytes_per_token"] == 2 * 2 * 32 * 4
    assert int8.metrics["bytes_per_token"] == 2 * (2 * 32 + 8)
    for case in cases:
        assert case.failed is None
        assert case.ours is not None
        assert case.ratio is not None


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "memory_bytes", lambda: kv.RESERVE)
    cases = kv.collect(Setup(quick=True, only="int8", **QUIET))
    assert [case.case for case in cases] == [
        "int8-tiny-attention-batch1-ctx96",
        "int8-tiny-attention-batch4-ctx96",
    ]
    assert all("does not fit in memory" in str(case.failed) for case in cases)
    assert all(case.ours is None for case in cases)
