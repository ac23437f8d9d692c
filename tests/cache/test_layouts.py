"""Layouts store and read back what attention needs; the budget of bytes is honoured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from serval.cache.layouts import LAYOUTS, layout_class
from serval.cache.layouts.base import CacheView
from serval.cache.layouts.full import FullLayout
from serval.cache.memory import (
    PagedMemory,
    cache_budget,
    cache_bytes_per_token,
    cache_state_bytes,
)
from serval.errors import CacheError, ConfigError
from serval.kernels import pages
from serval.models.attention import AttentionSpec
from serval.models.memory import CausalMemory

GQA = AttentionSpec("gqa", 4, 2, 16, 16)
MLA = AttentionSpec("mla", 4, 1, 24, 16, kv_lora_rank=32, qk_rope_head_dim=8)
BLOCK = 8


def spec_for(kv: str) -> AttentionSpec:
    """A layer that the layout can hold."""
    try:
        layout_class(kv).check(GQA)
    except CacheError:
        return MLA
    return GQA


def block_for(kv: str | list[str]) -> int:
    """A block size that the layout can hold."""
    try:
        layout_class(kv if isinstance(kv, str) else kv[0]).check_block_size(BLOCK)
    except CacheError:
        return 32
    return BLOCK


def memory_for(specs: list[AttentionSpec], kv: str | list[str] = "full", tokens: int = 256):
    block = block_for(kv)
    size = cache_budget(
        specs, kv, torch.float32, blocks=tokens // block, block_size=block, sequences=8
    )
    return PagedMemory(specs, kv, cache_bytes=size, max_model_len=tokens, block_size=block)


def views(memory: PagedMemory, caches: list, counts: list[int]) -> list[CacheView]:
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    lengths = [cache.num_tokens for cache in caches]
    made = []
    for group in range(len(memory.manager.groups)):
        tables = [cache.tables[group].ids for cache in caches]
        width = max(map(len, tables))
        packed = torch.zeros(len(caches), width, dtype=torch.int32)
        slots = []
        for n, (table, count) in enumerate(zip(tables, counts, strict=True)):
            packed[n, : len(table)] = torch.from_numpy(table.copy())
            where = np.arange(lengths[n] - count, lengths[n])
            slots.append(table[where // BLOCK].astype(np.int64) * BLOCK + where % BLOCK)
        made.append(
            CacheView(
                torch.from_numpy(np.concatenate(slots)),
                packed,
                torch.tensor(lengths, dtype=torch.int32),
                starts,
                lengths,
                counts,
            )
        )
    return made


def steps(memory: PagedMemory, schedule: list[list[int]], attend) -> list[torch.Tensor]:
    """Run a schedule (tokens per sequence and step); returns the outputs per sequence."""
    caches = [memory.manager.create() for _ in schedule[0]]
    done = [0] * len(caches)
    outputs: list[list[torch.Tensor]] = [[] for _ in caches]
    for counts in schedule:
        for cache, count in zip(caches, counts, strict=True):
            memory.manager.append(cache, count)
        memory.begin(views(memory, caches, counts))
        parts = attend([slice(d, d + c) for d, c in zip(done, counts, strict=True)])
        for n, part in enumerate(parts.split(counts)):
            outputs[n].append(part)
            done[n] += counts[n]
        memory.manager.check_integrity()
    return [torch.cat(parts) for parts in outputs]


SCHEDULES = {
    "whole": [[21, 9]],
    "chunks": [[5, 1], [7, 3], [8, 4], [1, 1]],
    "decode": [[13, 2], *[[1, 1]] * 8],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("kv", "tolerance"), [("full", 1e-5), ("bf16", 0.02), ("fp16", 3e-3), ("int8", 0.05)]
)
def test_gqa_matches_whole_prompt_attention(schedule, window, sinks, kv, tolerance) -> None:
    torch.manual_seed(0)
    plan = SCHEDULES[schedule]
    lengths = [sum(counts[n] for counts in plan) for n in range(2)]
    q = [torch.randn(n, 4, 16) for n in lengths]
    k = [torch.randn(n, 2, 16) for n in lengths]
    v = [torch.randn(n, 2, 16) for n in lengths]
    sink = torch.randn(4) if sinks else None
    memory = memory_for([GQA], kv)

    def attend(parts):
        rows = [torch.cat([x[n][p] for n, p in enumerate(parts)]) for x in (q, k, v)]
        return memory.attend(0, *rows, 0.25, window=window, sinks=sink)

    for n, got in enumerate(steps(memory, plan, attend)):
        want = CausalMemory([0, lengths[n]]).attend(
            0, q[n], k[n], v[n], 0.25, window=window, sinks=sink
        )
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threshold", [None, 0.0, 4.0])
@pytest.mark.parametrize(("kv", "tolerance"), [("full", 1e-4), ("bf16", 0.04), ("fp16", 5e-3)])
def test_mla_matches_whole_prompt_attention(
    schedule, threshold, kv, tolerance, monkeypatch
) -> None:
    if threshold is not None:  # 0: always materialised; 4: a mix in one step
        monkeypatch.setattr(FullLayout, "_materialise_from", staticmethod(lambda *_: threshold))
    torch.manual_seed(0)
    plan = SCHEDULES[schedule]
    lengths = [sum(counts[n] for counts in plan) for n in range(2)]
    shapes = [(4, 16), (4, 8), (32,), (8,)]  # q_nope, q_rope, latent, k_rope
    tensors = [[torch.randn(n, *shape) for n in lengths] for shape in shapes]
    kv_b = torch.randn(4, 32, 32) * 0.2
    memory = memory_for([MLA], kv)

    def attend(parts):
        rows = [torch.cat([x[n][p] for n, p in enumerate(parts)]) for x in tensors]
        return memory.attend_latent(0, *rows, kv_b, 0.2)

    for n, got in enumerate(steps(memory, plan, attend)):
        mine = [x[n] for x in tensors]
        want = CausalMemory([0, lengths[n]]).attend_latent(0, *mine, kv_b, 0.2)
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_layouts_per_layer_have_their_own_tables() -> None:
    memory = memory_for([GQA, GQA, GQA], ["full", "int8", "full"])
    assert [layout.name for layout in memory.layouts] == ["full", "int8"]
    assert len(memory.manager.groups) == 2
    cache = memory.manager.create()
    memory.manager.append(cache, 20)
    assert [table.count for table in cache.tables] == [3, 3]


def test_budget() -> None:
    per_token = cache_bytes_per_token([GQA] * 3, "full", torch.float32)
    assert per_token == 3 * 2 * (16 + 16) * 4
    assert cache_bytes_per_token([GQA], "int8", torch.float32) == 2 * (16 + 16 + 8)
    assert cache_bytes_per_token([MLA], "full", torch.bfloat16) == (32 + 8) * 2
    for kv in ("bf16", "fp16"):
        assert cache_bytes_per_token([GQA, MLA], kv, torch.float32) == 2 * 32 * 2 + 40 * 2
    memory = PagedMemory([GQA], "full", cache_bytes=100_000, max_model_len=64, block_size=BLOCK)
    assert memory.nbytes <= 100_000 < memory.nbytes + memory.block_bytes
    needed = 9 * BLOCK * 256
    with pytest.raises(CacheError, match=f"{needed:,} bytes"):
        PagedMemory([GQA], "full", cache_bytes=needed - 1, max_model_len=65, block_size=BLOCK)
    PagedMemory([GQA], "full", cache_bytes=needed, max_model_len=65, block_size=BLOCK)


@pytest.mark.parametrize("kv", sorted(LAYOUTS))
def test_storage_takes_the_bytes_it_announces(kv: str) -> None:
    specs = [spec_for(kv)] * 2
    memory = memory_for(specs, kv)
    (layout,) = memory.layouts
    blocks = memory.manager.groups[0].pool.num_blocks
    per_token = cache_bytes_per_token(specs, kv, torch.float32)
    stored = sum(tensor.nbytes for tensors in layout.storage for tensor in tensors)
    assert stored == blocks * block_for(kv) * per_token
    states = 8 * cache_state_bytes(specs, kv, torch.float32)
    assert memory.nbytes == layout.nbytes == stored + states
    dtypes = {
        "full": [torch.float32] * 2,
        "bf16": [torch.bfloat16] * 2,
        "fp16": [torch.float16] * 2,
        "int8": [torch.int8, torch.int8, torch.float32, torch.float32],
        "snapmla": [torch.uint8, torch.float32, torch.bfloat16],
    }
    for tensors in layout.storage:
        found = [tensor.dtype for tensor in tensors]
        assert found == dtypes.get(kv, found)


def test_refusals_name_layout_and_feature() -> None:
    with pytest.raises(CacheError, match=r"int8.*MLA"):
        memory_for([MLA], "int8")
    with pytest.raises(CacheError, match=r"snapmla.*'gqa'"):
        memory_for([GQA], "snapmla")
    with pytest.raises(ConfigError, match="int9"):
        memory_for([GQA], "int9")
    with pytest.raises(CacheError, match="2 layouts"):
        memory_for([GQA], ["full", "int8"])
    for kv, text in {
        "oscar:bits=2,bits=4": "kv='oscar:bits=2,bits=4' gives 'bits' twice, 2 and 4",
        "oscar:bits": "cannot read 'bits'",
        "oscar:": "cannot read ''",
        "oscar:bit=2": "has no option 'bit'",
    }.items():
        with pytest.raises(CacheError, match=text):
            layout_class(kv)


@pytest.mark.parametrize("kv", sorted(LAYOUTS))
def test_fork_block_copies_every_layer(kv: str) -> None:
    memory = memory_for([spec_for(kv)] * 2, kv)
    (layout,) = memory.layouts
    for tensors in layout.storage:
        for tensor in tensors:
            tensor[3] = torch.arange(tensor[3].numel()).view_as(tensor[3]) % 100
    layout.fork_block(3, 5)
    for tensors in layout.storage:
        for tensor in tensors:
            assert torch.equal(tensor[3], tensor[5])
            assert not tensor[4].any()


def test_float16_saturates_instead_of_overflowing() -> None:
    memory = memory_for([GQA], "fp16")
    cache = memory.manager.create()
    memory.manager.append(cache, 3)
    memory.begin(views(memory, [cache], [3]))
    k, v = torch.zeros(3, 2, 16), torch.full((3, 2, 16), 1e6)
    out = memory.attend(0, torch.zeros(3, 4, 16), k, v, 0.25)
    assert torch.equal(out, torch.full_like(out, 65504.0))


def test_large_storage_asks_for_huge_pages_and_is_zero() -> None:
    spec = AttentionSpec("gqa", 4, 2, 128, 128)
    memory = memory_for([spec], "full", 8192)
    assert memory.layouts[0].storage[0][0].data_ptr() % 64 == 0
    assert all(not tensor.any() for tensor in memory.layouts[0].storage[0])
    assert min(tensor.nbytes for tensor in memory.layouts[0].storage[0]) >= pages.SMALLEST
    smaps = Path("/proc/self/smaps")
    if smaps.exists() and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        address = memory.layouts[0].storage[0][0].data_ptr() + pages.SMALLEST // 2
        assert "hg" in mapping_flags(smaps.read_text(), address)


def mapping_flags(smaps: str, address: int) -> list[str]:
    """The VmFlags of the mapping that holds an address."""
    inside = False
    for line in smaps.splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head and ":" not in head:
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    return []
