"""The servers that `bench serve` loads: ours and its peers, each as a user would start it, and the
model they all serve: random weights in a Hugging Face directory, and the same as GGUF."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

from serval.bench.child import leaving_on_sigterm, tied
from serval.bench.harness import MissingPeerError
from serval.bench.peers import INSTALL
from serval.bench.shapes import TINY, cache_directory
from serval.errors import ServalError
from serval.models.config import ModelConfig

SERVED = ModelConfig(  # 82 M parameters
    vocab_size=8192,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=2048,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SERVED_QUICK = dataclasses.replace(TINY, rope=SERVED.rope)

MODELS = {"llama-82m": SERVED, "tiny": SERVED_QUICK}


class ServerError(ServalError):
    """A server under test did not start or did not answer."""


def model_directory(name: str) -> Path:
    """A checkpoint of random weights with a tokenizer trained on the standard library, made on
    first use. Special tokens are never the most likely ones, so every answer has full length."""
    target = cache_directory() / f"serve-{name}"
    if target.exists():
        return target
    import torch

    from serval.data.sources import stdlib
    from serval.data.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer
    from serval.models import checkpoint
    from serval.models.decoder import Decoder

    config = MODELS[name]
    torch.manual_seed(0)
    decoder = Decoder(config)
    tokenizer = train_tokenizer(itertools.islice(stdlib(), 100), config.vocab_size)
    with torch.no_grad():
        for token in SPECIAL_TOKENS:
            decoder.embed_tokens.weight[tokenizer.token_to_id(token)] = 0.0
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / "model"
        save_tokenizer(tokenizer, made, config.max_position_embeddings)
        checkpoint.save(decoder, made)
        shutil.move(made, target)
    return target


def model_gguf(name: str) -> Path:
    """The same model as a float32 GGUF file with its tokenizer."""
    from safetensors.numpy import load_file

    from serval.compress.gguf_file import import_gguf, write_gguf

    try:
        import_gguf()
    except ServalError as error:
        raise MissingPeerError("gguf", "pip install 'serval-llm[bench]'") from error
    directory = model_directory(name)
    target = directory / "model.gguf"
    if not target.exists():
        tensors = load_file(directory / "model.safetensors")
        write_gguf(
            target,
            MODELS[name],
            lambda tensor, shape: tensors[tensor],
            "f32",
            directory,
        )
    return target


def serval_command(model: str, port: int, threads: int) -> list[str]:
    directory = str(model_directory(model))
    return [
        sys.executable,
        "-m",
        "serval.cli",
        "serve",
        directory,
        "--served-model-name",
        directory,
        "--port",
        str(port),
    ]


def transformers_command(model: str, port: int, threads: int) -> list[str]:
    """`transformers serve` as it starts by default: one request at a time, the others wait. With
    `--continuous-batching` transformers 5.17 accepts requests on a CPU and never answers them."""
    launcher = Path(sys.executable).with_name("transformers")
    if not launcher.exists():
        raise MissingPeerError("transformers serve", "pip install 'transformers[serving]'")
    return [
        str(launcher),
        "serve",
        str(model_directory(model)),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--port",
        str(port),
    ]


def llama_cpp_command(model: str, port: int, threads: int) -> list[str]:
    """llama-cpp-python's server: one request at a time, the others wait."""
    for package in ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"):
        if find_spec(package) is None:
            raise MissingPeerError(package, f"{INSTALL} 'llama-cpp-python[server]'")
    return [
        sys.executable,
        "-m",
        "llama_cpp.server",
        "--model",
        str(model_gguf(model)),
        "--port",
        str(port),
        "--n_ctx",
        str(MODELS[model].max_position_embeddings),
        "--n_threads",
        str(threads),
        "--n_threads_batch",
        str(threads),
        "--interrupt_requests",
        "false",
    ]


Command = Callable[[str, int, int], list[str]]


class Server:
    """A server process on a free local port, ready when entered, ended when left: also by SIGTERM,
    and when this process is killed."""

    def __init__(self, command: Command, model: str, threads: int, wait: float = 180.0) -> None:
        self.model = str(model_directory(model))
        self.port = _free_port()
        self._command = command(model, self.port, threads)
        self._threads, self._wait = threads, wait
        self.start_seconds = 0.0

    def __enter__(self) -> Server:
        with ExitStack() as stack:
            stack.enter_context(leaving_on_sigterm())
            self._start(stack)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _start(self, stack: ExitStack) -> None:
        self._log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 closed by the stack
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": str(self._threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        began = time.perf_counter()
        self._process = subprocess.Popen(
            tied(self._command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        stack.callback(self._end)
        self._await_ready()
        self.start_seconds = time.perf_counter() - began

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._wait
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(
                    f"{self._command[:4]} ended with code {self._process.returncode}: {self.log()}"
                )
            if self._answers("/health") or self._answers("/v1/models"):
                return
            time.sleep(0.1)
        raise ServerError(
            f"{self._command[:4]} is not ready after {self._wait:.0f} s: {self.log()}"
        )

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        """The end of what the server printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-600:]

    def cpu_seconds(self) -> float:
        """Processor seconds the server has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        """Largest resident memory of the server so far."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0

    def _end(self) -> None:
        """End the server and what it started: politely, then at once."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
