"""Decode attention of one layer at the Llama-3.1-8B shape, per cache layout, against torch's scaled
dot-product attention.

Every layout of the registry that can hold the layer is measured, reading `context` random tokens
per sequence from its paged storage. The peer reads keys and values that lie contiguously, float32
for `full` and bfloat16 for the smaller layouts, with the query heads of a key-value head as rows
of one product, so that it need not repeat keys. A measured unit is one call. Floor: the layout's
bytes, read once, at the read bandwidth measured just before and after (the larger).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from serval.bench.harness import Case, Contestant, Outcome, Sample, Setup, compare, paired_rounds
from serval.bench.machine import memory_bytes
from serval.cache.layouts import LAYOUTS
from serval.cache.layouts.base import CacheView, Layout
from serval.errors import CacheError
from serval.kernels.bandwidth import measure_read_bandwidth
from serval.models.attention import AttentionSpec
from serval.registry import resolve

LLAMA_8B = AttentionSpec("gqa", 32, 8, 128, 128)
TINY = AttentionSpec("gqa", 4, 2, 32, 32)
BLOCK = 32
CHUNK = 4096  # tokens stored at a time
SECONDS = 0.1  # of one contestant's share of a round
RESERVE = 2**30  # bytes of memory left to others
EXACT = "full"  # compared with float32, the others with bfloat16


def collect(setup: Setup) -> list[Case]:
    """All cases: each layout, batch 1 and 4, contexts of 8K, 32K and 128K tokens."""
    spec, shape, rounds = LLAMA_8B, "llama-8b", 5
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    if setup.quick:
        spec, shape, contexts, rounds = TINY, "tiny", (96,), 1
    kinds = layouts_for(spec)
    cases: list[Case] = []
    for context in contexts:
        for batch in (1, 4):
            names = {kv: f"{kv}-{shape}-attention-batch{batch}-ctx{context}" for kv in kinds}
            wanted = [kv for kv in kinds if setup.wants(names[kv])]
            groups = {
                torch.float32: [kv for kv in wanted if kv == EXACT],
                torch.bfloat16: [kv for kv in wanted if kv != EXACT],
            }
            for dtype, group in groups.items():
                if group:
                    setup.note(", ".join(names[kv] for kv in group))
                    chosen = {kv: kinds[kv] for kv in group}
                    cases += _measure(setup, names, chosen, dtype, spec, batch, context, rounds)
    return cases


def layouts_for(spec: AttentionSpec) -> dict[str, type[Layout]]:
    """The registered layouts that can hold such a layer, by name."""
    found: dict[str, type[Layout]] = {}
    for name in LAYOUTS:
        kind: type[Layout] = resolve(LAYOUTS, name, "cache layout")
        try:
            kind.check(spec)
        except CacheError:
            continue
        found[name] = kind
    return found


def _measure(
    setup: Setup,
    names: dict[str, str],
    kinds: dict[str, type[Layout]],
    dtype: torch.dtype,
    spec: AttentionSpec,
    batch: int,
    context: int,
    rounds: int,
) -> list[Case]:
    """The cases of layouts that share a peer of `dtype`."""
    label = f"torch SDPA {str(dtype).removeprefix('torch.')}"
    tokens = batch * context
    per_token = {kv: kind.bytes_per_token(spec, torch.float32) for kv, kind in kinds.items()}
    width = spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim)
    needed = tokens * (sum(per_token.values()) + width * dtype.itemsize) + RESERVE
    if needed > memory_bytes():
        why = (
            f"does not fit in memory: {needed / 2**30:.1f} GiB are needed, "
            f"{memory_bytes() / 2**30:.1f} GiB are free"
        )
        setup.note(f"  {why}")
        return [Case(names[kv], None, label, failed=why) for kv in kinds]
    torch.manual_seed(0)
    q = torch.randn(batch, spec.num_heads, spec.head_dim)
    readers = {kv: paged_reader(kind, spec, q, context) for kv, kind in kinds.items()}
    readers[label] = contiguous_reader(spec, q, context, dtype)
    before = 0.0 if setup.quick else measure_read_bandwidth(torch.get_num_threads())
    outcomes = paired_rounds(
        [Contestant(name, timed(read)) for name, read in readers.items()], rounds, setup.note
    )
    bandwidth = None
    if not setup.quick:
        bandwidth = max(before, measure_read_bandwidth(torch.get_num_threads()))
    return [
        _case(names[kv], outcomes[kv], outcomes[label], per_token[kv], tokens, bandwidth)
        for kv in kinds
    ]


def _case(
    name: str, ours: Outcome, peer: Outcome, per_token: float, tokens: int, bandwidth: float | None
) -> Case:
    metrics: dict[str, float] = {"bytes_per_token": per_token}
    floor = None
    if bandwidth is not None:
        metrics["read_gb_per_s"] = bandwidth
        floor = per_token * tokens / (bandwidth * 1e9)
    if ours.samples:
        metrics["gb_per_s"] = per_token * tokens / ours.seconds / 1e9
    return compare(name, ours, peer, floor_seconds=floor, metrics=metrics)


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
    """Keys [count, Hkv, D] and values [count, Hkv, Dv] of tokens first..; the same for every
    contestant. Speed does not depend on them, so they repeat, shifted, after each chunk."""
    shift = first // CHUNK * 7 % 1000
    k, v = random_tokens(spec)
    return k[shift : shift + count], v[shift : shift + count]


def paged_reader(
    kind: type[Layout], spec: AttentionSpec, q: Tensor, context: int
) -> Callable[[], Tensor]:
    """Attention of q [N, H, D] over N sequences of `context` tokens stored in the layout."""
    batch, device = q.shape[0], torch.device("cpu")
    width = -(-context // BLOCK)
    layout = kind([spec], batch * width, BLOCK, torch.float32, device)
    tables = torch.arange(batch * width, dtype=torch.int32).view(batch, width)

    def view(first: int, count: int, sequences: slice) -> CacheView:
        chosen = tables[sequences]
        place = torch.arange(first, first + count)
        slots = chosen[:, place // BLOCK].long() * BLOCK + place % BLOCK
        lengths, queries = [first + count] * len(chosen), [count] * len(chosen)
        starts = torch.arange(len(chosen) + 1, dtype=torch.int32) * count
        lens = torch.tensor(lengths, dtype=torch.int32)
        return CacheView(slots.flatten(), chosen, lens, starts, lengths, queries)

    for sequence in range(batch):
        for first in range(0, context, CHUNK):
            count = min(CHUNK, context - first)
            k, v = tokens_at(spec, sequence * context + first, count)
            layout.write(0, view(first, count, slice(sequence, sequence + 1)), k, v)
    last = view(context - 1, 1, slice(None))
    scale = spec.head_dim**-0.5
    return lambda: layout.attend(0, last, q, scale, None, None)


def contiguous_reader(
    spec: AttentionSpec, q: Tensor, context: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """torch's attention of q [N, H, D] over the same tokens, contiguous per head; [N, H, Dv]."""
    batch, heads = q.shape[0], spec.num_key_value_heads
    keys = torch.empty(batch, heads, context, spec.head_dim, dtype=dtype)
    values = torch.empty(batch, heads, context, spec.v_head_dim, dtype=dtype)
    for sequence in range(batch):
        for first in range(0, context, CHUNK):
            count = min(CHUNK, context - first)
            k, v = tokens_at(spec, sequence * context + first, count)
            keys[sequence, :, first : first + count] = k.transpose(0, 1)
            values[sequence, :, first : first + count] = v.transpose(0, 1)
    rows = q.to(dtype).view(batch, heads, -1, spec.head_dim)
    scale = spec.head_dim**-0.5

    def read() -> Tensor:
        with torch.inference_mode():
            return F.scaled_dot_product_attention(rows, keys, values, scale=scale).flatten(1, 2)

    return read
