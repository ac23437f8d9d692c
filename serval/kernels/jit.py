"""Build a kernel folder's `cpu.cpp` on first use and load it through ctypes.

The library's file name is a hash of the source and the headers, the compiler and its version, the
flags and the CPU, so a cache directory may be shared between machines and versions. Environment:

- `SERVAL_CACHE_DIR`: where built kernels are kept (default `~/.cache/serval/kernels`).
- `SERVAL_CPU_ARCH`: value of `-march` instead of `native`, for example `haswell` or `x86-64`.
- `SERVAL_KERNELS=reference`: build nothing, use the PyTorch references.
- `CXX`: the compiler (default `g++`, then `clang++`, then `c++`).

Libraries link against `libgomp.so.1` by name: PyTorch has loaded its own copy under that name by
then, so both share one OpenMP runtime and one pool of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from serval.kernels.replay import Recorder

ROOM = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fvisibility=hidden",
)
CTYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}

Function = Callable[..., int]

_lock = threading.RLock()
_libraries: dict[tuple[str, str], ctypes.CDLL | None] = {}
_kernels: list[Kernel] = []
_warned = False


class _Thread(threading.local):
    recorder: Recorder | None = None


_thread = _Thread()


class BuildError(Exception):
    """The compiler is missing or failed; the text says which and how."""


@functools.cache
def cpu_identity() -> str:
    """Model and feature flags of this machine's CPU."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        wanted = ("model name", "flags", "Features", "CPU part")
        first = next(iter(lines.read().split("\n\n")), "")
        found = [line for line in first.splitlines() if line.startswith(wanted)]
        if found:
            return "\n".join(found)
    return f"{platform.machine()} {platform.processor()}"


@functools.cache
def _compiler(requested: str | None, search: str | None) -> tuple[str, str]:
    """Path and version line of the compiler on `search` (PATH); raises BuildError when there is
    none."""
    names = [requested] if requested else ["g++", "clang++", "c++"]
    for name in names:
        path = shutil.which(name, path=search)
        if path is None:
            continue
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
            if run.returncode == 0:
                return path, run.stdout.splitlines()[0] if run.stdout else ""
    raise BuildError(f"no working C++ compiler (tried {', '.join(names)}); install g++ or set CXX")


def cache_dir() -> Path:
    """Directory of built libraries; created when missing."""
    named = os.environ.get("SERVAL_CACHE_DIR")
    path = Path(named) if named else Path("~/.cache/serval/kernels").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return _private_dir()


@functools.cache
def _private_dir() -> Path:
    """A directory of this process only, when the usual one cannot be written."""
    return Path(tempfile.mkdtemp(prefix="serval-kernels-"))


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock so that processes which start together compile once."""
    try:
        import fcntl
    except ImportError:  # no such locks here: every process compiles, the rename below stays safe
        yield
        return
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build(folder: str, arch: str) -> Path:
    """Return the shared library of `folder` for `-march=arch`, compiling it unless it is cached."""
    source = ROOM / folder / "cpu.cpp"
    compiler, version = _compiler(os.environ.get("CXX"), os.environ.get("PATH"))
    flags = (*FLAGS, f"-march={arch}", f"-I{ROOM}")
    digest = hashlib.sha256()
    for file in (source, *sorted(ROOM.glob("*.h")), *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    digest.update("\0".join((compiler, version, *flags[:-1], cpu_identity())).encode())
    target = cache_dir() / f"{folder}-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    with _file_lock(target.with_suffix(".lock")):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *flags, str(source), "-o", str(made)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.SubprocessError) as error:
                raise BuildError(f"{compiler} could not be run: {error}") from error
            if run.returncode != 0:
                raise BuildError(f"{compiler} failed on {folder}: {run.stderr.strip()[-600:]}")
            os.replace(made, target)
    return target


def arch() -> str:
    """The `-march` in force."""
    return os.environ.get("SERVAL_CPU_ARCH") or "native"


def load(folder: str) -> ctypes.CDLL | None:
    """The library of `folder`, or None when the references have to serve (said once, as a
    warning)."""
    global _warned
    key = (folder, arch())
    with _lock:
        if key not in _libraries:
            _libraries[key] = None
            if os.environ.get("SERVAL_KERNELS") != "reference":
                try:
                    _libraries[key] = ctypes.CDLL(str(build(folder, key[1])))
                except (BuildError, OSError) as error:
                    if not _warned:
                        _warned = True
                        warnings.warn(
                            f"Serval's C++ kernels are not available ({error}); the slower PyTorch "
                            "references are used instead. Results are the same.",
                            RuntimeWarning,
                            stacklevel=2,
                        )
        return _libraries[key]


class Kernel:
    """One C function of a folder's library, resolved on first use.

    `signature` has a letter per argument: p pointer, l int64, i int32, f float. Functions return an
    int32 status.
    """

    def __init__(self, folder: str, name: str, signature: str) -> None:
        self.folder, self.name, self.signature = folder, name, signature
        self._resolved = False
        self._function: Function | None = None
        _kernels.append(self)

    def get(self) -> Function | None:
        """The C function, or None when the reference has to serve. Ask for each call: while a
        recording runs, another function is returned."""
        if not self._resolved:
            library = load(self.folder)
            if library is not None:
                function = library[self.name]
                function.argtypes = [CTYPES[letter] for letter in self.signature.replace(" ", "")]
                function.restype = ctypes.c_int32
                self._function = function
            self._resolved = True
        recorder = _thread.recorder
        if recorder is not None and self._function is not None:
            return recorder.watch(self, self._function)
        return self._function

    def packed(self) -> int | None:
        """Address of the form that takes its arguments from a list of 64-bit fields (`PACKED` in
        simd.h); None when the function has none."""
        library = load(self.folder)
        function = None if library is None else getattr(library, f"{self.name}_packed", None)
        return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def reset() -> None:
    """Forget resolved functions and failures, so that changed environment variables take effect."""
    global _warned
    with _lock:
        for kernel in _kernels:
            kernel._resolved, kernel._function = False, None
        _libraries.clear()
        _warned = False


def build_all() -> list[Path]:
    """Compile every kernel now, as many at a time as there are cores; returns the libraries."""
    folders = sorted(path.parent.name for path in ROOM.glob("*/cpu.cpp"))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda folder: build(folder, arch()), folders))


def prepare() -> None:
    """Build what is missing, unless the references are to serve. A library that cannot be built is
    told of by the first kernel that needs it."""
    if os.environ.get("SERVAL_KERNELS") != "reference":
        with contextlib.suppress(BuildError, OSError):
            build_all()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """While inside, kernels that this thread calls are written down (see `kernels.replay`)."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def keep(memory: Any) -> None:
    """Say that a kernel was handed the address of `memory`, which no tensor holds: a recording of
    the call keeps it alive."""
    if _thread.recorder is not None:
        _thread.recorder.kept.append(memory)


# -- custom ops ------------------------------------------------------------------------------------

_library = torch.library.Library("serval", "DEF")


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register `serval::<name>` with one implementation for every device and a shape function."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"serval::{name}", fake, lib=_library)


def plain(*tensors: Tensor) -> bool:
    """Whether an op may skip PyTorch's dispatcher (about 10 us): ordinary tensors, nobody tracing
    or watching."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return False
    watchers = 0 if _thread.recorder is None else 1  # a recorder watches, and wants plain calls
    return (
        torch._C._len_torch_dispatch_stack() == watchers
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def differentiating(*tensors: Tensor) -> bool:
    """Whether autograd has to record an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
