"""Decode attention of one layer at the Llama-3.1-8B shape, per cache layout, against torch's scaled
dot-product attention, and caches of few bits against 16 bits and llama.cpp.

Every case reads `context` random tokens per sequence as stored by its contestant, and MORE further
ones: a layout that keeps its last tokens exact then holds half a window of them. A measured unit is
one step of one token per sequence: its key and value are stored and attended to, with all that the
layout does online (rotation). Layers are taken in turn, as many as make each contestant's data
larger than any cache of the processor, so that every step reads memory.

Peers: torch SDPA on contiguous keys and values, float32 for `full` and bfloat16 for smaller
layouts, with the query heads of a key-value head as rows of one product; ggml's flash attention,
as llama.cpp calls it, with f16 and q4_0 keys and values; and for few bits our own `fp16` layout.
Floor: the layout's bytes, read once, at the read bandwidth measured just before and after (the
larger); for few bits also the share of the 8-bit dot products that registers alone would do.

Then `oscar` against `full` end to end: decoding at the Llama-3.2-1B shape, see kv_engine.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serval.bench import kv_engine
from serval.bench.ggml_attention import GGML_BYTES, ggml_reader
from serval.bench.harness import Case, Contestant, Outcome, Sample, Setup, compare, paired_rounds
from serval.bench.machine import memory_bytes
from serval.cache.layouts import layout_class
from serval.cache.layouts.base import CacheView, Layout
from serval.kernels.bandwidth import int4_roof, measure_read_bandwidth
from serval.models.attention import AttentionSpec

LLAMA_8B = AttentionSpec("gqa", 32, 8, 128, 128)
TINY = AttentionSpec("gqa", 4, 2, 32, 32)
BLOCK = 32
CHUNK = 4096  # tokens stored at a time
MORE = 64  # tokens beyond the context
COLD = 256 << 20  # bytes of each contestant's layers together
SECONDS = 0.1  # of one contestant's share of a round
RESERVE = 2**30  # bytes of memory left to others
EXACT = "full"  # compared with float32, the others with bfloat16

LAYOUTS = {  # by the word that case names begin with
    "full": "full",
    "bf16": "bf16",
    "fp16": "fp16",
    "int8": "int8",
    "oscar": "oscar",
    "oscar-int4": "oscar:bits=4",
    "kivi": "kivi",
    "int2": "int2",
    "int4": "int4",
}
FEW_BITS = ("oscar", "oscar-int4", "kivi", "int2", "int4")
PEERS = {"fp16": "fp16", "llama.cpp-f16": "f16", "llama.cpp-q4_0": "q4_0"}  # of "oscar"

Read = Callable[[], Tensor]


@dataclass
class Work:
    """What is measured: `batch` sequences of `context` tokens of a layer `spec`."""

    spec: AttentionSpec
    batch: int
    context: int
    quick: bool

    @property
    def tokens(self) -> int:
        """Of one sequence, the measured one included."""
        return self.context + MORE

    def layers(self, per_token: float) -> int:
        """Layers that together are too large for the processor's caches."""
        return 1 if self.quick else max(1, round(COLD / (per_token * self.batch * self.tokens)))

    def bytes_read(self, kind: type[Layout]) -> float:
        """By one step in one layer."""
        packed = kind.in_blocks(self.tokens)
        width = self.spec.num_key_value_heads * (self.spec.head_dim + self.spec.v_head_dim)
        stored = packed * kind.bytes_per_token(self.spec, torch.float32)
        return self.batch * (stored + 4 * width * (self.tokens - packed))


def collect(setup: Setup) -> list[Case]:
    """All cases: each layout, batch 1 and 4, contexts of 8K, 32K and 128K tokens; then decoding of
    a whole model at 32K."""
    spec, shape, rounds = LLAMA_8B, "llama-8b", 5
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    if setup.quick:
        spec, shape, contexts, rounds = TINY, "tiny", (128,), 1
    cases: list[Case] = []
    for context in contexts:
        for batch in (1, 4):
            work, end = Work(spec, batch, context, setup.quick), f"batch{batch}-ctx{context}"
            names = {word: f"{word}-{shape}-attention-{end}" for word in LAYOUTS}
            names |= {
                f"oscar-against-{peer}": f"oscar-against-{peer}-{shape}-{end}" for peer in PEERS
            }
            wanted = {word: name for word, name in names.items() if setup.wants(name)}
            for dtype in (torch.float32, torch.bfloat16):
                exact = dtype == torch.float32
                group = {w: name for w, name in wanted.items() if (w == EXACT) == exact}
                if group:
                    setup.note(", ".join(group.values()))
                    cases += _measure(setup, group, dtype, work, rounds)
    return cases + kv_engine.collect(setup)


def _measure(
    setup: Setup, names: dict[str, str], dtype: torch.dtype, work: Work, rounds: int
) -> list[Case]:
    """The cases of contestants that share a peer of `dtype`; names: by word."""
    label = f"torch SDPA {str(dtype).removeprefix('torch.')}"
    against = [word.removeprefix("oscar-against-") for word in names if "-against-" in word]
    words = [word for word in LAYOUTS if word in names]
    words += [word for word in ("oscar", "fp16") if against and word not in words]
    kinds = {word: layout_class(LAYOUTS[word]) for word in words}
    per_token: dict[str, float] = {
        word: kind.bytes_per_token(work.spec, torch.float32) for word, kind in kinds.items()
    }
    width = work.spec.num_key_value_heads * (work.spec.head_dim + work.spec.v_head_dim)
    per_token[label] = float(width * dtype.itemsize)
    for peer in against:
        if peer != "fp16":
            per_token[peer] = width * GGML_BYTES[PEERS[peer]]
    sizes = [x * work.batch * work.tokens * work.layers(x) for x in per_token.values()]
    needed = sum(sizes) + RESERVE
    if needed > memory_bytes():
        why = (
            f"does not fit in memory: {needed / 2**30:.1f} GiB are needed, "
            f"{memory_bytes() / 2**30:.1f} GiB are free"
        )
        setup.note(f"  {why}")
        return [Case(name, None, label, failed=why) for name in names.values()]
    torch.manual_seed(0)
    q = torch.randn(work.batch, work.spec.num_heads, work.spec.head_dim)
    makers: dict[str, Callable[[], Read]] = {
        word: functools.partial(paged_reader, kind, work, q) for word, kind in kinds.items()
    }
    makers[label] = functools.partial(contiguous_reader, work, q, dtype)
    for peer in against:
        if peer != "fp16":
            fill = functools.partial(tokens_at, work.spec)
            layers = work.layers(per_token[peer])
            makers[peer] = functools.partial(
                ggml_reader, work.spec, q, work.tokens, PEERS[peer], fill, layers
            )
    before = 0.0 if setup.quick else measure_read_bandwidth(torch.get_num_threads())
    outcomes = paired_rounds(
        [Contestant(name, timed(lazily(make))) for name, make in makers.items()], rounds, setup.note
    )
    bandwidth = None
    if not setup.quick:
        bandwidth = max(before, measure_read_bandwidth(torch.get_num_threads()))
    cases = []
    for word, name in names.items():
        ours = "oscar" if "-against-" in word else word
        other = outcomes[word.partition("-against-")[2] or label]
        cases.append(_case(name, ours, kinds[ours], outcomes[ours], other, work, bandwidth))
    return cases


def _case(
    name: str,
    word: str,
    kind: type[Layout],
    ours: Outcome,
    peer: Outcome,
    work: Work,
    bandwidth: float | None,
) -> Case:
    spec, read = work.spec, work.bytes_read(kind)
    metrics: dict[str, float] = {"bytes_per_token": kind.bytes_per_token(spec, torch.float32)}
    floor = None
    if bandwidth is not None:
        metrics["read_gb_per_s"] = bandwidth
        floor = read / (bandwidth * 1e9)
    if ours.samples:
        metrics["gb_per_s"] = read / ours.seconds / 1e9
        if word in FEW_BITS and bandwidth is not None:
            products = spec.num_heads * (spec.head_dim + spec.v_head_dim)
            rate = 2 * products * work.batch * kind.in_blocks(work.tokens) / ours.seconds / 1e9
            metrics["gop_per_s"] = rate
            metrics["fraction_of_integer_roof"] = rate / int4_roof()
    return compare(name, ours, peer, floor_seconds=floor, metrics=metrics)


def lazily(make: Callable[[], Read]) -> Read:
    """Calls what `make` returns; it is made at the first call."""
    made: list[Read] = []

    def read() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return read


def timed(read: Callable[[], object]) -> Callable[[], Sample]:
    """A measurement of `read`, repeated for SECONDS and at least twice; the first call is a
    warm-up."""

    def measure() -> Sample:
        read()
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while count < 2 or time.perf_counter() - wall < SECONDS:
            read()
            count += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall / count, cpu / count)

    return measure


@functools.lru_cache(maxsize=2)
def random_tokens(spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Random keys [CHUNK + 1000, Hkv, D] and values [CHUNK + 1000, Hkv, Dv]."""
    generator = torch.Generator().manual_seed(0)
    count, heads = CHUNK + 1000, spec.num_key_value_heads
    k = torch.randn(count, heads, spec.head_dim, generator=generator)
    return k, torch.randn(count, heads, spec.v_head_dim, generator=generator)


def tokens_at(spec: AttentionSpec, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys [count, Hkv, D] and values [count, Hkv, Dv] of tokens first.., at most CHUNK of them;
    the same for every contestant. Speed does not depend on them, so they repeat, shifted."""
    shift = first // CHUNK * 7 % 1000
    k, v = random_tokens(spec)
    return k[shift : shift + count], v[shift : shift + count]


def paged_reader(kind: type[Layout], work: Work, q: Tensor) -> Read:
    """Steps of q [N, H, D] over N sequences stored in the layout, layer after layer."""
    spec, batch, device = work.spec, work.batch, torch.device("cpu")
    layers = work.layers(kind.bytes_per_token(spec, torch.float32))
    width = -(-work.tokens // BLOCK)
    layout = kind([spec] * layers, batch * width, BLOCK, torch.float32, device, num_states=batch)
    tables = torch.arange(batch * width, dtype=torch.int32).view(batch, width)

    def view(first: int, count: int, chosen: slice) -> CacheView:
        place, table = torch.arange(first, first + count), tables[chosen]
        slots = table[:, place // BLOCK].long() * BLOCK + place % BLOCK
        lengths, queries = [first + count] * len(table), [count] * len(table)
        starts = torch.arange(len(table) + 1, dtype=torch.int32) * count
        lens = torch.tensor(lengths, dtype=torch.int32)
        states = torch.arange(batch, dtype=torch.int32)[chosen]
        return CacheView(slots.flatten(), table, lens, starts, lengths, queries, states)

    write = layout.fill if layout.delayed else layout.write
    past = work.tokens - 1
    for n in range(batch):
        for first in range(0, past, CHUNK):
            count = min(CHUNK, past - first)
            k, v = tokens_at(spec, n * work.context + first, count)
            write(0, view(first, count, slice(n, n + 1)), k, v)
    for tensors in (layout.storage, layout.states):
        for layer in tensors[1:]:
            for copy, original in zip(layer, tensors[0], strict=True):
                copy.copy_(original)
    last, scale, turn = view(past, 1, slice(None)), spec.head_dim**-0.5, Layers(layers)
    new = [tokens_at(spec, n * work.context, CHUNK) for n in range(batch)]
    k, v = (torch.cat([each[i][past % CHUNK][None] for each in new]) for i in range(2))
    return lambda: layout.step(next(turn), last, q, k, v, scale, None, None)


class Layers:
    """Layers in turn."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, -1

    def __next__(self) -> int:
        self.at = (self.at + 1) % self.count
        return self.at


def contiguous_reader(work: Work, q: Tensor, dtype: torch.dtype) -> Read:
    """torch's attention of q [N, H, D] over the same tokens, contiguous per head; [N, H, Dv]."""
    spec, batch, heads = work.spec, work.batch, work.spec.num_key_value_heads
    shape = (batch, heads, work.tokens)
    layers = work.layers(heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize)
    keys = torch.empty(layers, *shape, spec.head_dim, dtype=dtype)
    values = torch.empty(layers, *shape, spec.v_head_dim, dtype=dtype)
    past = work.tokens - 1
    for n in range(batch):
        for first in range(0, past, CHUNK):
            count = min(CHUNK, past - first)
            k, v = tokens_at(spec, n * work.context + first, count)
            keys[:, n, :, first : first + count] = k.transpose(0, 1)
            values[:, n, :, first : first + count] = v.transpose(0, 1)
        k, v = tokens_at(spec, n * work.context, CHUNK)
        keys[:, n, :, past], values[:, n, :, past] = k[past % CHUNK], v[past % CHUNK]
    rows = q.to(dtype).view(batch, heads, -1, spec.head_dim)
    scale, turn = spec.head_dim**-0.5, Layers(layers)

    def read() -> Tensor:
        i = next(turn)
        with torch.inference_mode():
            out = F.scaled_dot_product_attention(rows, keys[i], values[i], scale=scale)
        return out.flatten(1, 2)

    return read
