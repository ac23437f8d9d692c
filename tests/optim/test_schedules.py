from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval.errors import ConfigError
from serval.optim.schedules import SCHEDULES, Constant, Cosine, WarmupStableDecay


def test_wsd_values() -> None:
    schedule = WarmupStableDecay(total_steps=10, warmup_steps=4, decay_steps=3, final=0.1)
    values = [schedule.multiplier(step) for step in range(10)]
    assert values[:7] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert values[7:] == pytest.approx([0.1 + 0.9 * 3 / 4, 0.1 + 0.9 * 2 / 4, 0.1 + 0.9 / 4])


def test_cosine_values() -> None:
    schedule = Cosine(total_steps=12, warmup_steps=1, final=0.2)
    assert schedule.multiplier(0) == 1.0
    assert schedule.multiplier(1) == 1.0
    assert schedule.multiplier(6) == pytest.approx(0.6)
    assert schedule.multiplier(11) == pytest.approx(0.2)


def test_constant_values() -> None:
    schedule = Constant(total_steps=5, warmup_steps=2)
    assert [schedule.multiplier(step) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_phases_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="exceed the 10 steps"):
        WarmupStableDecay(10, warmup_steps=6, decay_steps=5)


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    warmup=st.integers(0, 10),
    decay=st.integers(0, 10),
    stable=st.integers(1, 20),
    final=st.floats(0, 1),
)
def test_multipliers_stay_in_range_and_never_rise_after_warmup(
    name: str, warmup: int, decay: int, stable: int, final: float
) -> None:
    total = warmup + decay + stable
    schedule = SCHEDULES[name].load()(total, warmup, decay, final)
    values = [schedule.multiplier(step) for step in range(total)]
    assert all(0 < value <= 1 or final == 0 for value in values)
    assert all(0 <= value <= 1 for value in values)
    after = values[warmup:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))
