"""Run each kernel test with every instruction set this machine can execute."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from serval.kernels import jit

FLAGS = {"native": "", "haswell": "avx2", "alderlake": "avx_vnni", "x86-64": "sse2"}


@pytest.fixture(scope="module", params=FLAGS)
def arch(request: pytest.FixtureRequest) -> Iterator[str]:
    """Build for one -march; skipped where the CPU could not run the result."""
    if FLAGS[request.param] not in jit.cpu_identity().split() and request.param != "native":
        pytest.skip(f"this CPU cannot run code built for {request.param}")
    before = os.environ.get("SERVAL_CPU_ARCH")
    os.environ["SERVAL_CPU_ARCH"] = request.param
    jit.reset()
    yield request.param
    if before is None:
        del os.environ["SERVAL_CPU_ARCH"]
    else:
        os.environ["SERVAL_CPU_ARCH"] = before
    jit.reset()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
