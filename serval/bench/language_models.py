"""What decode and prefill share: the engines, their workers, which is compared with which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from serval.bench.harness import Contestant, Outcome, Sample
from serval.bench.shapes import head_parameters, key_value_elements, linear_parameters
from serval.bench.worker import Worker, WorkerPool
from serval.cache.layouts import LAYOUTS
from serval.models.attention import AttentionSpec
from serval.models.config import ModelConfig
from serval.registry import resolve

GIB = 2**30


@dataclass(frozen=True)
class EngineSpec:
    """An engine of a benchmark.

    label: in reports. worker: workers are shared by the engines that name the same one. target,
    arguments: see `Worker`. weight_bytes, cache_bytes: per weight and per cached number, for the
    estimate of its memory. cache: what its `use` is called with, if it has one.
    """

    label: str
    worker: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    weight_bytes: float = 4.0
    cache_bytes: float = 4.0
    cache: str | None = None
    most_tokens: int | None = None

    def takes(self, batch: int, context: int) -> bool:
        """Whether cases of this size are measured with it."""
        return self.most_tokens is None or batch * context <= self.most_tokens

    def estimate(self, config: ModelConfig, batch: int, length: int) -> int:
        """Bytes it will occupy, generously."""
        weights = self.weight_bytes * (linear_parameters(config) + head_parameters(config))
        cache = 1.4 * self.cache_bytes * key_value_elements(config) * batch * length
        return int(weights + cache) + GIB


def serval(label: str, **arguments: Any) -> EngineSpec:
    """One of ours; arguments as `ours.ServalEngine`."""
    cache = cache_bytes_per_number(arguments.get("kv", "full"))
    weights = {None: 4.0, "int8": 1.1}.get(arguments.get("weights"), 0.8)  # int8 tables included
    name, target = f"serval {label}", "serval.bench.ours:ServalEngine"
    return EngineSpec(name, name, target, arguments, weights, cache)


def cache_bytes_per_number(kv: str) -> float:
    """Bytes that cache layout `kv` takes for each number of a key or value of 64, scales
    included."""
    spec = AttentionSpec("gqa", num_heads=1, num_key_value_heads=1, head_dim=64, v_head_dim=64)
    layout = resolve(LAYOUTS, kv, "cache layout")
    return layout.bytes_per_token(spec, torch.float32) / (spec.head_dim + spec.v_head_dim)


def transformers(cache: str) -> EngineSpec:
    return EngineSpec(
        f"transformers float32, {cache} cache",
        "transformers",
        "serval.bench.peers:TransformersEngine",
        cache=cache,
    )


def llama_cpp(kind: str, threads: int) -> EngineSpec:
    target = "serval.bench.peers:LlamaCppEngine"
    arguments = {"kind": kind, "threads": threads}
    weights = {"F16": 2.0, "Q8_0": 2.2, "Q4_0": 1.3}[kind]  # the mapped file and a repacked copy
    name = f"llama.cpp {kind}"
    return EngineSpec(name, name, target, arguments, weights, 2.0)


def openvino(threads: int) -> EngineSpec:
    """Its caches can be filled by running prompts only, which takes minutes for long ones."""
    target = "serval.bench.openvino_peer:OpenVinoEngine"
    name = "OpenVINO GenAI int4"  # the mapped file, a repacked copy and the head's own copy
    return EngineSpec(name, name, target, {"threads": threads}, 1.8, 1.1, most_tokens=4096)


Engines = dict[str, tuple[EngineSpec, list[EngineSpec]]]  # ours by case word, each with its peers


def for_size(engines: Engines, batch: int, context: int) -> Engines:
    """The same without peers that are not measured at this size."""
    return {
        kind: (ours, [peer for peer in peers if peer.takes(batch, context)])
        for kind, (ours, peers) in engines.items()
    }


@dataclass
class Bench:
    """A pool of engines over one model shape."""

    shape: str
    config: ModelConfig
    pool: WorkerPool
    memory: dict[str, int] = field(default_factory=dict)  # label -> resident bytes when measured
    peaks: dict[str, int] = field(default_factory=dict)  # label -> most resident bytes so far
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def worker(self, spec: EngineSpec, batch: int, length: int) -> Worker:
        """The running worker of `spec`, with room for `batch` sequences of `length` tokens."""
        arguments = {"shape": self.shape, **spec.arguments}
        estimate = spec.estimate(self.config, batch, length)
        name = f"{spec.worker}, {self.shape}"
        return self.pool.get(name, spec.target, arguments, estimate)

    def contestant(
        self,
        spec: EngineSpec,
        batch: int,
        length: int,
        work: Callable[[Worker], Sample],
        prepare: Callable[[Worker], None] | None = None,
    ) -> Contestant:
        """`work` on the worker of `spec`. `prepare` comes first when the worker is new or was last
        prepared for something else."""
        key = (spec.label, batch, length)

        def measure() -> Sample:
            worker = self.worker(spec, batch, length)
            if worker.prepared_for != key:
                if spec.cache is not None:
                    worker.call("use", spec.cache)
                if prepare is not None:
                    prepare(worker)
                worker.prepared_for = key
                self._learn(spec, worker)
            sample = work(worker)
            self.memory[spec.label] = worker.resident_bytes()
            self.peaks[spec.label] = worker.peak_bytes()
            return sample

        return Contestant(spec.label, measure)

    def _learn(self, spec: EngineSpec, worker: Worker) -> None:
        facts = {"weight_bytes": worker.call("weight_bytes")}
        if spec.target.endswith("ServalEngine"):
            facts["cache_bytes_per_token"] = worker.call("cache_bytes_per_token")
        self.facts[spec.label] = facts

    def metrics(self, ours: Outcome, peer: Outcome | None, tokens: int) -> dict[str, Any]:
        """tokens: how many a measured unit makes. Memory is resident memory of the process, when
        measured and at most."""
        metrics: dict[str, Any] = {}
        for prefix, outcome in (("", ours), ("peer_", peer)):
            if outcome is None or not outcome.samples:
                continue
            metrics[prefix + "tokens_per_second"] = tokens / outcome.seconds
            metrics[prefix + "resident_gib"] = self.memory[outcome.name] / GIB
            metrics[prefix + "peak_gib"] = self.peaks[outcome.name] / GIB
        return metrics
