"""The machine a benchmark ran on: processor, threads, memory, and its measured roofs."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe_machine(quick: bool = False) -> dict[str, Any]:
    """Facts and measured roofs; quick: without the measured ones."""
    import torch

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS if flag in _cpu_flags()],
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    if not quick:
        from serval.kernels import bandwidth

        facts["read_gb_per_s"] = round(bandwidth.read_bandwidth(), 1)
        facts["float32_gflop_per_s"] = round(bandwidth.matmul_roof(), 1)
    return facts


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model", "CPU implementer")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes(key: str = "MemAvailable") -> int:
    """A line of /proc/meminfo in bytes; raises KeyError when it has no such line."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    raise KeyError(key)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def cpu_has(flag: str) -> bool:
    """Whether /proc/cpuinfo lists this instruction set."""
    return flag in _cpu_flags()
