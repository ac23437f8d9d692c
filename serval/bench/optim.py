"""Optimizer step time: our Muon and MONA against `torch.optim.Muon` on the same parameters.

Two parameter lists: a 100 M Llama, and a mixture of experts whose 64 experts per layer are stacks
[64, m, n], which the peer receives as 2-D slices because it takes nothing else. Every contestant
steps all parameters; what is not a hidden matrix goes to AdamW (fused) on both sides. Peers:
`torch.optim.Muon`, whose iteration is bfloat16, and `torch.optim.Muon float32`, the same source
with that cast replaced.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch

from serval.bench.harness import Case, Contestant, Outcome, Sample, Setup, compare, paired_rounds
from serval.bench.shapes import fill_parameters, random_block
from serval.bench.worker import WorkerPool
from serval.kernels.bandwidth import float32_roof, matmul_roof
from serval.models.config import ModelConfig, MoEConfig
from serval.models.decoder import Decoder
from serval.optim import OptimizerOptions, Role, build, route
from serval.optim.groups import DEFAULT_ROLE_OPTIONS, NamedParameter
from serval.train.cpu import keep_freed_memory

LLAMA_100M = ModelConfig(
    vocab_size=32000,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=2048,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
MOE_64 = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=256,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    moe=MoEConfig(num_experts=64, top_k=8, intermediate_size=256),
)
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
LISTS = {"llama-100m": LLAMA_100M, "moe-64experts": MOE_64}
ORTHOGONALISED = (Role.HIDDEN_MATRIX, Role.EXPERT_STACK)
RATE, DECAY = 1e-4, 0.1
FLOAT32 = "torch.optim.Muon float32"
BFLOAT16 = "torch.optim.Muon"
OURS = {"muon": "float32", "mona": "float32", "mona-lite": "float32", "muon bfloat16": "bfloat16"}


@dataclass
class Work:
    """The parameters of a model of shape `config`."""

    config: ModelConfig

    def decoder(self) -> Decoder:
        """A decoder with weights and gradients of repeated random blocks."""
        torch.manual_seed(0)
        decoder = Decoder(self.config)
        fill_parameters(decoder)
        block = torch.from_numpy(random_block(seed=1))
        for parameter in decoder.parameters():
            count = -(-parameter.numel() // block.numel())
            flat = block.repeat(count)[: parameter.numel()]
            parameter.grad = flat.view(parameter.shape).clone()
        return decoder

    def flops(self) -> float:
        """Operations that our form of the iteration needs for one step (see newton_schulz.py)."""
        with torch.device("meta"):
            routed = route(Decoder(self.config))
        total = 0.0
        for named in routed:
            if named.role not in ORTHOGONALISED:
                continue
            *stack, rows, columns = named.parameter.shape
            for size in named.split_sizes or (rows,):
                short, long = sorted((size, columns))
                square = short == long
                cubes = 20 * short**3 if square else 3 * short**2 * long + 17 * short**3
                total += cubes * (stack[0] if stack else 1)
        return total


@dataclass
class Steps(ABC):
    """An optimizer over a decoder's parameters, in a worker. `step` is what is timed."""

    work: Work
    decoder: Decoder = field(init=False)

    def __post_init__(self) -> None:
        keep_freed_memory()
        self.decoder = self.work.decoder()

    @abstractmethod
    def step(self) -> None:
        """One step of the optimizer."""

    @abstractmethod
    def states(self) -> list[dict[str, Any]]:
        """The state of each parameter."""

    def measure(self, count: int) -> tuple[float, float]:
        """Least wall seconds of one of `count` steps, mean processor seconds."""
        best, cpu = float("inf"), time.process_time()
        for _ in range(count):
            begin = time.perf_counter()
            self.step()
            best = min(best, time.perf_counter() - begin)
        return best, (time.process_time() - cpu) / count

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(
            value.nbytes
            for state in self.states()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


class ServalSteps(Steps):
    """Ours. name: a key of OPTIMIZERS; dtype: of the iteration."""

    def __init__(self, work: Work, name: str, dtype: str) -> None:
        super().__init__(work)
        self.optimizer = build(
            name, self.decoder, OptimizerOptions(lr=RATE, weight_decay=DECAY, ns_dtype=dtype)
        )
        self.step()

    def step(self) -> None:
        self.optimizer.step()

    def states(self) -> list[dict[str, Any]]:
        return [s for each in self.optimizer.optimizers for s in each.state.values()]


def matrices_of(named: NamedParameter) -> list[torch.nn.Parameter]:
    """The 2-D slices of a matrix or stack, sharing its memory and its gradient's."""
    stack, grad = named.parameter.detach(), named.parameter.grad
    assert grad is not None
    if stack.ndim == 2:
        stack, grad = stack[None], grad[None]
    sizes = list(named.split_sizes or (stack.shape[1],))
    found = []
    for weights, grads in zip(stack, grad, strict=True):
        for piece, slope in zip(weights.split(sizes), grads.split(sizes), strict=True):
            parameter = torch.nn.Parameter(piece)
            parameter.grad = slope
            found.append(parameter)
    return found


class TorchSteps(Steps):
    """`torch.optim.Muon` for hidden matrices, slice by slice, `torch.optim.AdamW` for the rest."""

    def __init__(self, work: Work, float32: bool) -> None:
        super().__init__(work)
        if float32:
            use_float32()
        routed = route(self.decoder)
        hidden = [m for n in routed if n.role in ORTHOGONALISED for m in matrices_of(n)]
        rest: dict[float, list[torch.nn.Parameter]] = {}
        for named in routed:
            if named.role not in ORTHOGONALISED:
                own = DEFAULT_ROLE_OPTIONS[named.role].weight_decay
                rest.setdefault(DECAY if own is None else own, []).append(named.parameter)
        groups = [{"params": members, "weight_decay": decay} for decay, members in rest.items()]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True),
        ]
        self.step()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def states(self) -> list[dict[str, Any]]:
        return [state for each in self.optimizers for state in each.state.values()]


def use_float32() -> None:
    """Let `torch.optim.Muon` iterate in float32 for the rest of this process: its own function,
    recompiled with the cast replaced."""
    from torch.optim import _muon

    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count(".bfloat16()") == 1
    # The cast made the copy that the normalisation then overwrites.
    exec(source.replace(".bfloat16()", ".clone()"), vars(_muon))


def collect(setup: Setup) -> list[Case]:
    """Both lists; ours against both peers, MONA and MONA-Lite against our Muon."""
    cases: list[Case] = []
    for name, config in LISTS.items():
        shape = Work(config)
        if setup.quick:
            name, shape = f"{name}-tiny", Work(_tiny(config))
        wanted = [case for case in (f"{kind}-{name}" for kind in OURS) if setup.wants(case)]
        if wanted:
            setup.note(name)
            cases += [case for case in _measure(setup, name, shape) if case.case in wanted]
    return cases


def _tiny(config: ModelConfig) -> ModelConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    moe = None
    if config.moe is not None:
        moe = dataclasses.replace(config.moe, num_experts=8, top_k=2, intermediate_size=32)
    return dataclasses.replace(config, **TINY, **heads, head_dim=16, moe=moe)  # type: ignore[arg-type]


def _measure(setup: Setup, name: str, work: Work) -> list[Case]:
    rounds, steps = (1, 1) if setup.quick else (3, 1)
    facts: dict[str, dict[str, Any]] = {}

    def contestant(label: str, target: str, arguments: dict[str, Any]) -> Contestant:
        def measure() -> Sample:
            worker = pool.get(label, f"serval.bench.optim:{target}", arguments, 3 * 2**30)
            seconds, cpu = worker.call("measure", steps)
            if label not in facts:
                facts[label] = {"state_mib": worker.call("state_bytes") / 2**20}
            return Sample(seconds, cpu)

        return Contestant(label, measure)

    with WorkerPool(torch.get_num_threads()) as pool:
        contestants = [
            contestant(
                f"serval {label}",
                "ServalSteps",
                {"work": work, "name": label.split()[0], "dtype": dtype},
            )
            for label, dtype in OURS.items()
        ]
        for label in (FLOAT32, BFLOAT16):
            arguments = {"work": work, "float32": label == FLOAT32}
            contestants.append(contestant(label, "TorchSteps", arguments))
        outcomes = paired_rounds(contestants, rounds, setup.note)

    flops = work.flops()
    roof = None if setup.quick else flops / (matmul_roof() * 1e9)
    peak = 0.0 if setup.quick else float32_roof()

    def case(label: str, peer: str) -> Case:
        ours, other = outcomes[f"serval {label}"], outcomes[peer]
        metrics = _metrics(ours, other, facts)
        floor = roof if "bfloat16" not in label else None
        if floor is not None and ours.samples and peak:
            metrics["of_multiply_add_peak"] = flops / ours.seconds / (peak * 1e9)
        return compare(f"{label}-{name}", ours, other, floor_seconds=floor, metrics=metrics)

    return [
        case("muon", FLOAT32),
        case("muon", BFLOAT16),
        case("muon bfloat16", BFLOAT16),
        case("mona", "serval muon"),
        case("mona-lite", "serval muon"),
    ]


def _metrics(ours: Outcome, peer: Outcome, facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metrics: dict[str, Any] = dict(facts.get(ours.name, {}))
    return metrics | {f"peer_{key}": value for key, value in facts.get(peer.name, {}).items()}
