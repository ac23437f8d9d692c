"""The roofs: what they count, and how threads add up."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest

from serval.kernels import bandwidth


@pytest.mark.parametrize("kind", ["_FMA", "_INT8", "_INT4"])
def test_every_thread_keeps_its_own_best_time(kind: str) -> None:
    function = getattr(bandwidth, kind).get()
    if function is None:
        pytest.skip("needs a compiler")
    seconds = (ctypes.c_float * 3)(-1, -1, -1)
    operations = function(1000, 5, ctypes.addressof(seconds), 3)
    if operations:
        assert any(0 < value < 1 for value in seconds)
        assert all(value > 0 for value in seconds)  # infinite for a thread that there is none of
    assert operations in (0, *(2**i for i in range(1, 8)))


def test_the_roof_is_the_sum_of_what_threads_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def probe(rounds: int, repeats: int, seconds: int, threads: int) -> int:
        asked.append((rounds, repeats, threads))
        values = (ctypes.c_float * threads).from_address(seconds)
        values[0], values[1], values[2] = 1e-3, 2e-3, math.inf
        return 32

    monkeypatch.setattr(bandwidth, "_FMA", SimpleNamespace(get=lambda: probe))
    bandwidth._compute.cache_clear()
    found = bandwidth.float32_roof(3)
    (rounds, _, threads) = asked[0]
    assert threads == 3
    assert found == pytest.approx(rounds * 12 * 32 * 1500 / 1e9, rel=1e-4)
    assert bandwidth.float32_roof(3) == found
    assert len(asked) == 1  # kept
    bandwidth._compute.cache_clear()


def test_without_a_compiler_there_is_no_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_INT8", SimpleNamespace(get=lambda: None))
    bandwidth._compute.cache_clear()
    assert bandwidth.int8_roof(1) == 0.0
    bandwidth._compute.cache_clear()
