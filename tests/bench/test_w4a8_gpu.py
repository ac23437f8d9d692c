"""The GPU cases of the w4a8 benchmark."""

from __future__ import annotations

import pytest
import torch

from serval import kernels
from serval.bench import w4a8_gpu
from serval.bench.harness import Setup


@pytest.mark.parametrize("scheme", w4a8_gpu.SCHEMES)
def test_random_weights_multiply(scheme: str) -> None:
    """Each scheme's weight packs, with integer scales proven to fit at the largest shape's K."""
    bits, group, mode, activations = w4a8_gpu.SCHEMES[scheme]
    columns = max(k for _, k in w4a8_gpu.SHAPES.values())
    packed = w4a8_gpu.random_weight(24, columns, bits, group, mode, "cpu")
    assert packed.mode == mode
    out = kernels.quantized_linear(torch.randn(2, columns), packed, activations=activations)
    assert out.isfinite().all()
    assert out.abs().max() > 0


def test_floor_is_the_longer_of_the_two() -> None:
    roofs = w4a8_gpu.Roofs(bandwidth=1e12, int8=1e15, bfloat16=5e14)
    assert roofs.floor(10**9, 1, 1000, 1000, "token") == pytest.approx(1e-3)
    assert roofs.floor(1, 10**6, 1000, 1000, "token") == pytest.approx(2e-3)
    assert roofs.floor(1, 10**6, 1000, 1000, "none") == pytest.approx(4e-3)


def test_weights_in_turn_exceed_the_cache() -> None:
    assert w4a8_gpu.copies(1 << 20) == w4a8_gpu.STREAMED >> 20
    assert w4a8_gpu.copies(1 << 40) == 2


def test_cases_need_a_gpu() -> None:
    setup = Setup(quick=True, only="gpu-w4a8-integer-g128-llama-8b-o-rows8", note=lambda line: None)
    cases = w4a8_gpu.collect_gpu(setup)
    if not torch.cuda.is_available():
        assert cases == []
        assert setup.offered == []
        return
    assert [case.case for case in cases] == [setup.only]
    assert cases[0].ratio is not None
    assert cases[0].ratio > 0
