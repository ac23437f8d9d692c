"""The Triton SnapMLA kernels against the reference, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from serval.kernels.snapmla import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CASES = {  # lengths, queries, page, heads, (C, R)
    "decode": ([1, 70, 33], [1, 1, 1], 16, 5, (32, 8)),
    "parts": ([1100, 40], [1, 1], 64, 4, (48, 16)),
    "mtp": ([90, 60, 20], [4, 2, 0], 32, 20, (64, 16)),
    "chunk": ([40, 9], [40, 9], 7, 4, (32, 2)),
}
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="no GPU; test_in_the_interpreter runs this in a process of its own",
)


def test_in_the_interpreter() -> None:
    """Triton decides when it is imported whether to interpret, so this needs a fresh process."""
    pytest.importorskip("triton", reason="Triton is not installed (extra: gpu)")
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("the tests of this file run directly")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert run.stdout.count(".") >= 9, run.stdout


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The Triton module."""
    return importlib.import_module("serval.kernels.snapmla.gpu")


def on(*values: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in values]


def empty(blocks: int, page: int, dims: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(blocks, page, dims[0], dtype=torch.uint8),
        torch.zeros(blocks, page),
        torch.zeros(blocks, page, dims[1], dtype=torch.bfloat16),
    )


@needs_triton
@pytest.mark.parametrize("rope8", [False, True])
@pytest.mark.parametrize("dims", [(64, 16), (48, 6)])
def test_storing_is_bitwise_that_of_the_reference(
    gpu: ModuleType, dims: tuple[int, int], rope8: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, dims[0]) * torch.logspace(-20, 20, 60)[:, None]
    x[5] = 0
    k = 100 * torch.randn(60, dims[1])
    slots = torch.randperm(64)[:60]
    slots[7] = -1
    want = empty(4, 16, dims)
    got = on(*empty(4, 16, dims))
    reference.write(x, k, slots, *want, rope8)
    gpu.write(*on(x, k, slots), *got, rope8)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu(), b)


@needs_triton
@pytest.mark.parametrize(("case", "rope8"), [*((case, False) for case in CASES), ("decode", True)])
def test_attention(gpu: ModuleType, case: str, rope8: bool) -> None:
    torch.manual_seed(0)
    lengths, queries, page, heads, dims = CASES[case]
    width = max(-(-length // page) for length in lengths)
    blocks = len(lengths) * width + 1
    tables = torch.randperm(blocks)[: len(lengths) * width].view(len(lengths), width).int()
    caches = empty(blocks, page, dims)
    for table, length in zip(tables, lengths, strict=True):
        place = torch.arange(length)
        slots = table[place // page].long() * page + place % page
        latent = torch.randn(length, dims[0]) * torch.randn(length, 1).exp()
        reference.write(latent, 10 * torch.randn(length, dims[1]), slots, *caches)
    tokens = sum(queries)
    q, q_rope = (
        0.3 * torch.randn(tokens, heads, dims[0]),
        0.05 * torch.randn(tokens, heads, dims[1]),
    )
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    inputs = (q, q_rope, *caches, tables, torch.tensor(lengths).int(), starts)
    want, want_lse = reference.paged_attention(*inputs, 0.1, rope8)
    got, lse = gpu.paged_attention(*on(*inputs), 0.1, rope8)
    error = float((got.cpu() - want).norm() / want.norm())
    # on the CPU only codes on the edge may differ; tensor cores add FP8 products in fewer bits
    assert error < (2e-3 if DEVICE == "cpu" else 2e-2)
    tolerance = 1e-5 if DEVICE == "cpu" else 2e-2
    torch.testing.assert_close(lse.cpu(), want_lse, atol=tolerance, rtol=tolerance)
