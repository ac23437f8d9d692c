"""The w4a8 benchmark's cases, and its peer: ggml's product must compute what it is compared for."""

from __future__ import annotations

import pytest
import torch

from serval.bench import ggml, w4a8
from serval.bench.harness import MissingPeerError, Setup


def test_q4_0_blocks() -> None:
    """d = peak / -8, so the largest value of a block is code 0, exactly -8 d."""
    weight = torch.randn(3, 64)
    weight[1, :32] = 0
    stored = torch.from_numpy(ggml.quantize_q4_0(weight)).view(3, 2, ggml.BLOCK_BYTES)
    d = stored[..., :2].contiguous().view(torch.float16).float()
    nibbles = torch.cat([stored[..., 2:] & 15, stored[..., 2:] >> 4], dim=-1)
    restored = d * (nibbles.float() - 8)
    blocks = weight.view(3, 2, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 8
    assert bool(((restored - blocks).abs() <= step * 1.01 + 1e-6).all())
    assert bool((restored[1, 0] == 0).all())


def test_ggml_product_agrees_with_the_weight() -> None:
    weight, x = torch.randn(64, 256), torch.randn(5, 256)
    try:
        product = ggml.Product(ggml.quantize_q4_0(weight), 5, 1, copies=2)
    except MissingPeerError:
        pytest.skip("llama-cpp-python is not installed")
    try:
        product.set_input(x)
        product.run(1)
        expected = x @ weight.T
        error = (product.output(1) - expected).norm() / expected.norm()
        assert float(error) < 0.15  # four-bit rounding of both operands' blocks
    finally:
        product.close()


def test_cases_of_a_scheme() -> None:
    quiet = Setup(quick=True, only="w4a8-integer-g128-tiny-rows1", note=lambda line: None)
    cases = w4a8.collect(quiet)
    assert [case.peer for case in cases][:2] == ["w4a8-channel", w4a8.FLOAT]
    assert all(case.ours is not None and case.ours > 0 for case in cases)
    assert cases[0].ratio is not None
