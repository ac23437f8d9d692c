"""The kernel builder: parallel first use, missing and broken compilers, cache keys, one OpenMP
runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serval import kernels
from serval.kernels import jit

USE = """
import warnings
warnings.simplefilter("always")
import torch
from serval import kernels
x = torch.arange(12.0).view(3, 4)
print(kernels.rms_norm(x, torch.ones(4), 1e-5).sum().item())
print(kernels.swiglu(x, x).sum().item())
"""


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache; resolved kernels are forgotten before and after."""
    monkeypatch.setenv("SERVAL_CACHE_DIR", str(tmp_path / "cache"))
    jit.reset()
    yield tmp_path
    monkeypatch.undo()
    jit.reset()


def start(**environment: str) -> subprocess.Popen[str]:
    paths = [str(Path(kernels.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", USE], env=env, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_processes_that_start_together_build_once_and_agree(tmp_path: Path) -> None:
    compiler = tmp_path / "counting-g++"
    log = tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *cpu.cpp*) echo x >> {log};; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    processes = [start(SERVAL_CACHE_DIR=str(cache), CXX=str(compiler)) for _ in range(3)]
    results = [finish(process) for process in processes]
    assert len({out for out, _ in results}) == 1
    assert all("RuntimeWarning" not in err for _, err in results)
    assert len(list(cache.glob("*.so"))) == 2
    assert log.read_text().count("x") == 2, "each kernel is compiled by one process only"
    assert not list(cache.glob("build-*"))


@pytest.mark.parametrize(
    "script", ["exit 1", "[ $1 = --version ] && exit 0; echo broken >&2; exit 1"]
)
def test_without_a_working_compiler_one_warning_and_the_reference(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    compiler = fresh / "cxx"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    x = torch.randn(3, 8)
    packed = kernels.pack_weight(torch.ones(4, 8).char(), torch.ones(4), bits=8)
    with pytest.warns(RuntimeWarning, match=r"C\+\+ kernels are not available"):
        kernels.rms_norm(x, torch.ones(8), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not again
        kernels.swiglu(x, x)
        kernels.quantized_linear(x, packed)
    assert not list((fresh / "cache").glob("*.so"))


def test_missing_compiler_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(fresh / "nothing"))
    with pytest.raises(jit.BuildError, match="no working C\\+\\+ compiler"):
        jit.build("gated", "native")


def test_reference_can_be_forced(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVAL_KERNELS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.rms_norm(torch.randn(3, 8), torch.ones(8), 1e-5)
    assert not (fresh / "cache").exists()


def test_cache_is_keyed_by_architecture_and_reused(fresh: Path) -> None:
    first = jit.build("gated", "native")
    made = first.stat().st_mtime_ns
    assert jit.build("gated", "native") == first
    assert first.stat().st_mtime_ns == made
    assert jit.build("gated", "x86-64" if os.uname().machine == "x86_64" else "armv8-a") != first


def test_an_unwritable_cache_falls_back_to_a_private_directory(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("SERVAL_CACHE_DIR", str(fresh / "file" / "cache"))
    assert jit.cache_dir().is_dir()
    assert jit.cache_dir() == jit.cache_dir()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """In a process of its own: other packages of this one may have brought a second runtime."""
    script = (
        "import torch; from serval import kernels\n"
        "kernels.swiglu(torch.randn(64, 2048), torch.randn(64, 2048))\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print({line.split()[-1] for line in lines if 'libgomp' in line or 'libomp' in line})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    if any((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        assert run.stdout.count("omp") == run.stdout.count("torch"), run.stdout


def test_custom_ops_trace_and_have_shapes() -> None:
    x, weight = torch.randn(4, 8), torch.rand(8)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.serval.rms_norm, (x, weight, 1e-5), test_utils=utils)
    torch.library.opcheck(torch.ops.serval.add_rms_norm, (x, x, weight, 1e-5), test_utils=utils)
    torch.library.opcheck(torch.ops.serval.swiglu, (x, x), test_utils=utils)
    table, positions = torch.rand(9, 4), torch.tensor([1, 2, 3, 8])
    q = torch.randn(4, 2, 8)
    rotary = (q, q, table, table, positions, False, 1.0)
    torch.library.opcheck(torch.ops.serval.rotary, rotary, test_utils=utils)
    codes, scales = torch.ones(5, 8).char(), torch.ones(5, 2)
    packed = kernels.pack_weight(codes, scales, bits=4, group_size=4)
    quantized = (x, *packed[:3], None, 4, 4, "token", 0.0)
    torch.library.opcheck(torch.ops.serval.quantized_linear, quantized, test_utils=utils)
    cache = torch.randn(2, 2, 4, 8)
    slots = torch.tensor([0, 3, 5, 7])
    torch.library.opcheck(
        torch.ops.serval.write_cache, (q, q, slots, cache, cache.clone()), test_utils=utils
    )
    one = torch.tensor([[0, 1]]).int(), torch.tensor([6]).int(), torch.tensor([0, 4]).int()
    attention = (q, cache, cache.clone(), *one, 0.3, None, None)
    torch.library.opcheck(torch.ops.serval.paged_attention, attention, test_utils=utils)
    with torch.device("meta"):
        empty = torch.empty(4, 8)
        assert kernels.rms_norm(empty, torch.empty(8), 1e-5).shape == (4, 8)
