"""The Triton attention kernels against the reference, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from serval.kernels.attention import reference
from serval.kernels.cache_write.reference import quantize_rows
from serval.kernels.latent_attention import reference as latent_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # context lengths, queries of each sequence
    "decode": ([1, 70, 33], [1, 1, 1]),
    "decode-parts": ([1500, 40], [1, 1]),
    "prefill": ([40, 9], [40, 9]),
    "mixed": ([50, 60, 20], [7, 1, 0]),
}


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
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
    assert run.stdout.count(".") >= 12, run.stdout


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The Triton module."""
    return importlib.import_module("serval.kernels.attention.gpu")


def paging(case: str, page: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    lens, counts = CASES[case]
    width = max(-(-length // page) for length in lens)
    blocks = len(lens) * width + 1
    tables = torch.randperm(blocks)[: len(lens) * width].view(len(lens), width).int()
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return tables, torch.tensor(lens).int(), starts, blocks, sum(counts)


@needs_triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("window", "sinks", "dims"), [(None, False, (16, 16)), (20, True, (24, 40))]
)
def test_paged_attention(
    gpu: ModuleType, case: str, window: int | None, sinks: bool, dims: tuple[int, int]
) -> None:
    tables, lens, starts, blocks, tokens = paging(case, 16)
    q = torch.randn(tokens, 6, dims[0])
    k, v = torch.randn(blocks, 2, 16, dims[0]), torch.randn(blocks, 2, 16, dims[1])
    rest = (tables, lens, starts, 0.2, window, torch.randn(6) if sinks else None)

    def on(*values: Tensor | float | None) -> list:
        return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in values]

    torch.testing.assert_close(
        gpu.paged_attention(*on(q, k, v, *rest)).cpu(),
        reference.paged_attention(q, k, v, *rest),
        rtol=1e-4,
        atol=1e-5,
    )
    (kq, ks), (vq, vs) = quantize_rows(k), quantize_rows(v)
    scales = dict(zip(("key_scales", "value_scales"), on(ks, vs), strict=True))
    torch.testing.assert_close(
        gpu.paged_attention(*on(q, kq, vq, *rest), **scales).cpu(),
        reference.paged_attention_int8(q, kq, vq, ks, vs, *rest),
        rtol=1e-4,
        atol=1e-5,
    )


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_paged_latent_attention(gpu: ModuleType, case: str) -> None:
    tables, lens, starts, blocks, tokens = paging(case, 16)
    q, q_rope = torch.randn(tokens, 5, 48), torch.randn(tokens, 5, 8)
    inputs = (q, q_rope, torch.randn(blocks, 16, 56), tables, lens, starts)
    torch.testing.assert_close(
        gpu.paged_latent_attention(*(x.to(DEVICE) for x in inputs), 0.15).cpu(),
        latent_reference.paged_latent_attention(*inputs, 0.15),
        rtol=1e-4,
        atol=1e-5,
    )
