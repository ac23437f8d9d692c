"""The cache under a policy against plain bookkeeping: lists of entries, deleted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from serval.cache.budgeted import BudgetedMemory
from serval.cache.manager import SequenceCache
from serval.cache.memory import PagedMemory, cache_bytes_per_token
from serval.cache.policies import POLICIES, make_policy
from serval.cache.policies.base import Policy
from serval.cache.policies.baselines import Local
from serval.errors import CacheError
from serval.models.attention import AttentionSpec
from serval.models.memory import CausalMemory, materialise_latent

GQA = AttentionSpec("gqa", 4, 2, 16, 16)
MLA = AttentionSpec("mla", 4, 1, 24, 16, kv_lora_rank=32, qk_rope_head_dim=8)
WINDOW = 12
BLOCK = 8
SCALE = 0.25
SPECS = [GQA, GQA, AttentionSpec("gqa", 4, 2, 16, 16, window=WINDOW)]


def memory_for(
    specs: list[AttentionSpec], policy: str, kv: str = "full", tokens: int = 400, block: int = BLOCK
) -> BudgetedMemory:
    size = cache_bytes_per_token(specs, kv, torch.float32) * tokens
    return BudgetedMemory(
        specs,
        kv,
        policy=make_policy(policy),
        cache_bytes=int(size),
        max_model_len=160,
        block_size=block,
    )


class Reference:
    """One layer's entries as a list [(position, k, v)], from which entries are really deleted."""

    def __init__(self, policy: Policy, window: int | None, rate: float, floor: float) -> None:
        self.policy, self.window, self.rate, self.floor = policy, window, rate, floor
        self.entries: list[tuple[int, Tensor, Tensor]] = []
        self.slot = 0

    def start(self, chosen: list[int], k: Tensor, v: Tensor) -> None:
        self.entries = [(n, k[n], v[n]) for n in chosen]
        self.slot = 0 if self.window else self.policy.first_to_drop(len(chosen))

    def step(self, position: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention of q [H, D] after the token at `position` came."""
        total = position + 1
        too_many = len(self.entries) >= max(self.rate * total, self.floor)
        oldest = self.entries[self.slot][0]
        if too_many or (self.window is not None and oldest < total - self.window):
            del self.entries[self.slot]
        self.entries.append((position, k, v))
        keys = torch.stack([entry[1] for entry in self.entries]).repeat_interleave(2, 1)
        values = torch.stack([entry[2] for entry in self.entries]).repeat_interleave(2, 1)
        scores = torch.einsum("hd,nhd->hn", q, keys) * SCALE
        if self.window is not None:
            age = position - torch.tensor([entry[0] for entry in self.entries])
            scores = scores.masked_fill(age >= self.window, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None]], dim=1)
        weights = scores.softmax(-1)[:, : len(self.entries)]
        return torch.einsum("hn,nhd->hd", weights, values)


def attend(memory, layer, q, k, v, sinks):
    window = SPECS[layer].window
    return memory.attend(layer, q, k, v, SCALE, window=window, sinks=sinks)


def prefill(memory, cache: SequenceCache, tensors, sinks, chunks: list[int]) -> list[Tensor]:
    """Run a prompt in chunks and settle it; returns the outputs per layer."""
    memory.manager.begin(cache, sum(chunks))
    outputs: list[list[Tensor]] = [[] for _ in tensors]
    for count in chunks:
        memory.manager.append(cache, count)
        memory.batch([cache], [count])
        rows = slice(cache.num_tokens - count, cache.num_tokens)
        for layer, (q, k, v) in enumerate(tensors):
            outputs[layer].append(attend(memory, layer, q[rows], k[rows], v[rows], sinks))
        memory.manager.check_integrity()
    memory.settle(cache)
    memory.manager.check_integrity()
    return [torch.cat(parts) for parts in outputs]


def random_tensors(length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    shapes = ((4, 16), (2, 16), (2, 16))
    return [tuple(2 * torch.randn(length, *shape) for shape in shapes) for _ in SPECS]  # type: ignore[misc]


def importance_of(
    q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None, queries: int = 0
) -> Tensor:
    """From the full matrix; of the last `queries` only (0: all)."""
    n = q.shape[0]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    scores = scores.double() * SCALE
    age = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (age < 0) if window is None else (age < 0) | (age >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(-1, n, 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[:, -queries:, :n].mean(0).sum(0)


@pytest.mark.parametrize(
    "policy",
    [
        *(f"{name}:keep=0.3,least=4" for name in POLICIES),
        "prefixkv:keep=0.3,least=4,queries=49",  # the last chunk and a part of the one before
        "uniform:keep=0.3,least=4,queries=7",
    ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_prompt_is_exact_and_decoding_sees_what_plain_lists_hold(policy, sinks) -> None:
    torch.manual_seed(1)
    length, steps = 90, 45
    tensors = random_tensors(length + steps)
    sink = torch.randn(4) if sinks else None
    memory = memory_for(SPECS, policy)
    cache = memory.manager.create()
    outputs = prefill(memory, cache, tensors, sink, [40, 3, 47])
    prompt = [tuple(x[:length] for x in layer) for layer in tensors]
    chosen_by = memory.policy
    assert isinstance(chosen_by, Policy)
    windows = [spec.window for spec in SPECS]
    exact = []
    for spec, (q, k, v), out in zip(SPECS, prompt, outputs, strict=True):
        want = CausalMemory([0, length]).attend(0, q, k, v, SCALE, window=spec.window, sinks=sink)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        if chosen_by.scorer.reads_attention:
            exact.append(importance_of(q, k, spec.window, sink, chosen_by.queries))
        else:
            exact.append(torch.arange(length, dtype=torch.float64))
    kept = chosen_by.allocate(torch.stack(exact), windows)
    assert sum(kept) == round(0.3 * 3 * length)
    assert [length - gone for gone in cache.evicted] == kept
    assert cache.retention is not None
    references = []
    for layer, window in enumerate(windows):
        share = kept[layer] / sum(kept) * 3
        reference = Reference(chosen_by, window, 0.3 * share, share * max(4, chosen_by.start + 2))
        chosen = chosen_by.select(exact[layer], kept[layer], window).tolist()
        reference.start(chosen, *prompt[layer][1:])
        references.append(reference)
    other, theirs = memory.manager.create(), random_tensors(70 + steps)
    prefill(memory, other, theirs, sink, [70])  # a neighbour whose blocks must not mix
    for position in range(length, length + steps):
        for each in (cache, other):
            memory.manager.append(each, 1)
        memory.batch([cache, other], [1, 1])
        memory.manager.check_integrity()
        at = other.num_tokens - 1
        for layer, reference in enumerate(references):
            mine, else_ = (x[layer] for x in (tensors, theirs))
            rows = [torch.stack([a[position], b[at]]) for a, b in zip(mine, else_, strict=True)]
            got = attend(memory, layer, *rows, sink)[0]
            want = reference.step(position, *(x[position] for x in tensors[layer]), sink)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            entries = memory.manager.entries(cache, layer)
            assert entries == len(reference.entries)
            if windows[layer] is None:
                share = reference.rate * (position + 1)
                assert abs(entries - share) <= 1
            else:
                assert entries <= WINDOW
    memory.manager.free(cache)
    memory.manager.free(other)
    memory.manager.check_integrity()
    assert memory.manager.used_blocks == 0


def test_entries_before_the_slot_are_never_touched() -> None:
    torch.manual_seed(2)
    memory = memory_for([GQA, GQA], "prefixkv:keep=0.5,least=0,distance=6")
    cache = memory.manager.create()
    tensors = random_tensors(160)[:2]
    prefill(memory, cache, tensors, None, [60])
    layout = memory.layouts[0]
    size = memory.block_size

    def rows(layer: int, count: int) -> Tensor:
        place = np.arange(count)
        at = torch.from_numpy(cache.tables[layer].ids[place // size].astype(np.int64))
        keys = layout.storage[0][0]
        return keys[at, :, torch.from_numpy(place % size)].clone()

    entries = [memory.manager.entries(cache, layer) for layer in range(2)]
    before = [rows(layer, entries[layer] - 6) for layer in range(2)]
    for position in range(60, 130):
        memory.manager.append(cache, 1)
        memory.batch([cache], [1])
        for layer, (q, k, v) in enumerate(tensors):
            at = slice(position, position + 1)
            memory.attend(layer, q[at], k[at], v[at], SCALE)
    for layer in range(2):
        assert torch.equal(before[layer], rows(layer, entries[layer] - 6))


def test_forks_write_into_their_own_copies() -> None:
    torch.manual_seed(3)
    memory = memory_for(SPECS, "prefixkv:keep=0.4,least=0")
    cache = memory.manager.create()
    tensors = random_tensors(60)
    prefill(memory, cache, tensors, None, [60])
    alone = memory.manager.create()
    prefill(memory, alone, tensors, None, [25, 35])
    child = memory.manager.fork(cache)
    futures = [random_tensors(30) for _ in range(2)]
    shared = memory.manager.used_blocks
    for step in range(30):
        for each in (cache, child, alone):
            memory.manager.append(each, 1)
        memory.batch([cache, child, alone], [1, 1, 1])
        memory.manager.check_integrity()
        for layer in range(3):
            # the parent and the lone sequence continue alike, the child otherwise
            rows = [torch.stack([futures[n][layer][i][step] for n in (0, 1, 0)]) for i in range(3)]
            got = attend(memory, layer, *rows, None)
            torch.testing.assert_close(got[0], got[2], atol=1e-6, rtol=1e-6)
            assert not torch.allclose(got[0], got[1], atol=1e-3)
    assert memory.manager.used_blocks > shared
    for each in (cache, child, alone):
        memory.manager.free(each)
    assert memory.manager.used_blocks == 0


def test_gathered_survivors_equal_masking_in_the_next_step() -> None:
    torch.manual_seed(4)
    length = 50
    memory = memory_for([GQA, GQA], "prefixkv:keep=0.3,least=0")
    cache = memory.manager.create()
    tensors = random_tensors(length + 1)[:2]
    prefill(memory, cache, tensors, None, [length])
    memory.manager.append(cache, 1)
    memory.batch([cache], [1])
    for layer, (q, k, v) in enumerate(tensors):
        last = slice(length, length + 1)
        got = memory.attend(layer, q[last], k[last], v[last], SCALE)[0]
        importance = importance_of(q[:length], k[:length], None, None)
        assert cache.placed == [-1, -1]  # nothing is dropped in this step
        chosen = memory.policy.select(importance, length - cache.evicted[layer], None)
        masked = torch.full((length + 1,), float("-inf"))
        masked[chosen] = 0
        masked[length] = 0
        scores = torch.einsum("hd,nhd->hn", q[length], k.repeat_interleave(2, 1)) * SCALE
        weights = (scores + masked).softmax(-1)
        want = torch.einsum("hn,nhd->hd", weights, v.repeat_interleave(2, 1))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kv", ["full", "bf16", "snapmla"])
def test_latents_are_ranked_by_all_query_heads_and_moved(kv) -> None:
    torch.manual_seed(5)
    length = 60
    shapes = [(4, 16), (4, 8), (32,), (8,)]  # q_nope, q_rope, latent, k_rope
    tensors = [torch.randn(length + 1, *shape) for shape in shapes]
    kv_b = torch.randn(4, 32, 32) * 0.2
    memory = memory_for([MLA, MLA], "prefixkv:keep=0.4,least=0", kv)
    cache = memory.manager.create()
    memory.manager.begin(cache, length)
    for rows in (slice(0, 33), slice(33, length)):
        memory.manager.append(cache, rows.stop - rows.start)
        memory.batch([cache], [rows.stop - rows.start])
        for layer in range(2):
            memory.attend_latent(layer, *(x[rows] for x in tensors), kv_b, SCALE)
    importance = cache.staging.importance.clone()
    q, k, v = materialise_latent(*tensors, kv_b)
    want = importance_of(q[:length], k[:length], None, None)
    torch.testing.assert_close(importance[0].double(), want, atol=1e-5, rtol=1e-4)
    memory.settle(cache)
    kept = [length - gone for gone in cache.evicted]
    assert kept == [24, 24]
    chosen = memory.policy.select(importance[0], 24, None)
    memory.manager.append(cache, 1)
    memory.batch([cache], [1])
    got = memory.attend_latent(0, *(x[length:] for x in tensors), kv_b, SCALE)[0]
    seen = torch.cat([chosen, torch.tensor([length])])
    scores = torch.einsum("hd,nhd->hn", q[length], k[seen]) * SCALE
    out = torch.einsum("hn,nhd->hd", scores.softmax(-1), v[seen])
    tolerance = {"full": 1e-5, "bf16": 0.03, "snapmla": 0.1}[kv]
    torch.testing.assert_close(got, out, atol=tolerance, rtol=tolerance)


def test_keeping_everything_changes_no_bit() -> None:
    torch.manual_seed(6)
    tensors = random_tensors(70)
    outputs = []
    size = int(cache_bytes_per_token(SPECS, "full", torch.float32) * 200)
    options = {"cache_bytes": size, "max_model_len": 160, "block_size": BLOCK}
    plain = PagedMemory(SPECS, "full", **options)
    whole = BudgetedMemory(SPECS, "full", policy=make_policy("h2o:keep=1"), **options)
    for memory in (plain, whole):
        cache = memory.manager.create()
        parts = prefill(memory, cache, tensors, None, [30, 20])
        for position in range(50, 70):
            memory.manager.append(cache, 1)
            memory.batch([cache], [1])
            at = slice(position, position + 1)
            for layer, (q, k, v) in enumerate(tensors):
                parts.append(attend(memory, layer, q[at], k[at], v[at], None))
        outputs.append(parts)
        assert not any(cache.evicted)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_steps_of_several_tokens_see_each_other_in_order() -> None:
    """Verification of drafted tokens: nothing is dropped inside such a step."""
    torch.manual_seed(7)
    specs = [GQA]
    tensors = random_tensors(60)[:1]
    results = []
    for counts in ([1] * 4, [4]):
        memory = memory_for(specs, "prefixkv:keep=0.999,least=0")
        cache = memory.manager.create()
        prefill(memory, cache, [tuple(x[:40] for x in tensors[0])], None, [40])
        done, parts = 40, []
        for count in counts:
            memory.manager.append(cache, count)
            memory.batch([cache], [count])
            q, k, v = (x[done : done + count] for x in tensors[0])
            parts.append(memory.attend(0, q, k, v, SCALE))
            done += count
            memory.manager.check_integrity()
        results.append(torch.cat(parts))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_blocks_freed_by_one_layer_serve_another() -> None:
    torch.manual_seed(8)
    memory = memory_for([GQA] * 4, "prefixkv:keep=0.25,least=0", tokens=64)
    assert len({id(group.pool) for group in memory.manager.groups}) == 1
    assert memory.nbytes <= cache_bytes_per_token([GQA] * 4, "full", torch.float32) * 64
    blocks = memory.manager.total_blocks
    cache = memory.manager.create()
    tensors = [tuple(x.clone() for x in random_tensors(120)[0]) for _ in range(4)]
    tensors[0] = (tensors[0][0] * 0, *tensors[0][1:])  # a flat layer
    memory.manager.begin(cache, 120)
    memory.manager.append(cache, 120)
    memory.batch([cache], [120])
    assert memory.staging_bytes > 0
    for layer, (q, k, v) in enumerate(tensors):
        memory.attend(layer, q, k, v, SCALE)
    memory.settle(cache)
    assert memory.staging_bytes == 0
    kept = [120 - gone for gone in cache.evicted]
    assert sum(kept) == 120
    assert kept[0] > max(kept[1:])
    assert memory.manager.used_blocks == sum(-(-count // BLOCK) for count in kept) <= blocks
    memory.manager.check_integrity()


def test_room_is_set_aside_while_a_prompt_is_staged() -> None:
    memory = memory_for([GQA, GQA], "uniform:keep=0.5,least=0", tokens=96)
    manager = memory.manager
    first, second, third = (manager.create() for _ in range(3))
    manager.begin(first, 100)
    manager.append(first, 60)
    manager.check_integrity()
    assert manager.used_blocks == 0
    assert manager.staged_tokens == 100
    assert not manager.can_begin(second, 100)  # more than max_model_len would be staged
    free = manager.total_blocks - sum(first.reserved)
    assert manager.can_begin(third, 4)
    assert not manager.can_append(third, (free // 2 + 1) * BLOCK)
    assert manager.can_append(third, free // 2 * BLOCK)
    with pytest.raises(CacheError, match="grew beyond"):
        manager.append(first, 41)
    with pytest.raises(CacheError, match="nothing to settle"):
        manager.settle(first, [50, 50])
    with pytest.raises(CacheError, match="forked"):
        manager.fork(first)
    manager.reset(first)
    assert manager.staged_tokens == 0
    manager.check_integrity()
    assert manager.can_begin(second, 100)


def test_refusals() -> None:
    with pytest.raises(CacheError, match="'streaming' drops tokens by itself"):
        memory_for([GQA], "prefixkv", "streaming")
    with pytest.raises(CacheError, match=r"keep=0\.9.*bytes are needed"):
        memory_for([GQA, GQA], "prefixkv:keep=0.9", tokens=140)
    memory_for([GQA, GQA], "prefixkv:keep=0.9", tokens=152)
    for option in ("queries=8", "distance=1", "last=20", "recent=0.9"):
        key = option.partition("=")[0]
        with pytest.raises(
            CacheError, match=f"'local' has no option '{key}'; it has: keep, start, least"
        ):
            make_policy(f"local:{option}")
    with pytest.raises(CacheError, match="'local' has no option 'distance'"):
        Local(distance=100)
    with pytest.raises(CacheError, match="'keep' twice"):
        make_policy("prefixkv:keep=0.2,start=2,keep=0.3")
    with pytest.raises(CacheError, match="queries=-1"):
        make_policy("uniform:queries=-1")
    softer = AttentionSpec("gqa", 4, 2, 16, 16, weights="sigmoid")
    with pytest.raises(CacheError, match="sigmoid"):
        memory_for([softer], "prefixkv")
    memory = memory_for([GQA], "prefixkv:keep=0.5,least=0")
    cache = memory.manager.create()
    prefill(memory, cache, random_tensors(40)[:1], None, [40])
    with pytest.raises(CacheError, match="cannot be truncated"):
        memory.manager.truncate(cache, 30)
