"""StreamingLLM: which tokens are seen, at which positions, and in how much memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from serval.cache.layouts import layout_class
from serval.cache.memory import PagedMemory, cache_budget
from serval.errors import CacheError
from serval.evaluate.scorer import Scorer
from serval.kernels.rope.reference import rotate
from serval.models.attention import AttentionSpec
from serval.models.batch import PackedBatch
from serval.models.config import ModelConfig, RopeConfig
from serval.models.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position_embeddings=256,
)
ROPES = {
    "default": RopeConfig(),
    "interleaved": RopeConfig(interleaved=True),
    "partial": RopeConfig(fraction=0.5),
    "yarn": RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64),
}
SCHEDULES = {
    "whole": [70],
    "chunks": [3, 1, 9, 2, 30, 1, 24],
    "decode": [20, *[1] * 50],
    "token by token": [1] * 70,
}


def decoder_with(rope: str = "default", sinks: bool = False) -> Decoder:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, rope=ROPES[rope], attention_sinks=sinks)
    decoder = Decoder(config).eval().requires_grad_(False)
    for layer in decoder.layers:
        if sinks:
            layer.self_attn.sinks.normal_()
        for name in ("q_proj", "k_proj"):  # scores large enough that positions matter
            getattr(layer.self_attn, name).weight.mul_(12)
    return decoder


def memory_of(decoder: Decoder, kv: str, sequences: int = 2) -> PagedMemory:
    specs = decoder.trunk_attention_layers
    size = cache_budget(specs, kv, torch.float32, blocks=20, block_size=8, sequences=sequences)
    return PagedMemory.of(
        decoder, kv, cache_bytes=size, max_model_len=100, block_size=8, max_sequences=sequences
    )


def run(decoder: Decoder, memory: PagedMemory, tokens: Tensor, schedule: list[int]) -> Tensor:
    """Hidden states of one sequence computed in steps of these sizes."""
    cache = memory.manager.create()
    found, at = [], 0
    for count in schedule:
        memory.manager.append(cache, count)
        found.append(decoder(tokens[at : at + count], memory.batch([cache], [count])))
        at += count
    memory.manager.free(cache)
    return torch.cat(found)


class Dense:
    """A memory that follows the paper: keys kept unrotated, the chosen ones rotated to positions
    0, 1, 2 ... within the cache, a query at a time."""

    def __init__(self, decoder: Decoder, sinks: int, recent: int) -> None:
        cos, sin = decoder.rotary(torch.device("cpu"))
        self.cos, self.sin, self.back = cos, sin, -sin
        self.factor = float(cos[0, 0])
        self.interleaved = decoder.config.rope.interleaved
        self.sinks, self.recent = sinks, recent

    def at(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        scale = 1 / self.factor**2 if back else 1.0
        rope = 2 * self.cos.shape[1]
        turned = rotate(x, self.cos, self.back if back else self.sin, positions, self.interleaved)
        return torch.cat([turned[..., :rope] * scale, turned[..., rope:]], -1)

    def attend(self, layer, q, k, v, scale, *, window=None, sinks=None) -> Tensor:
        rows = torch.arange(len(q))
        bare_q, bare_k = self.at(q, rows, back=True), self.at(k, rows, back=True)
        out = []
        for p in range(len(q)):
            chosen = sorted(
                {*range(min(self.sinks, p + 1)), *range(max(0, p - self.recent + 1), p + 1)}
            )
            keys = self.at(bare_k[chosen], torch.arange(len(chosen)))
            query = self.at(bare_q[p : p + 1], torch.tensor([len(chosen) - 1]))[0]
            z = torch.einsum("hd,khd->hk", query, keys.repeat_interleave(2, 1)) * scale
            if sinks is not None:
                z = torch.cat([z, sinks[:, None]], -1)
            weights = z.softmax(-1)[:, : len(chosen)]
            out.append(torch.einsum("hk,khd->hd", weights, v[chosen].repeat_interleave(2, 1)))
        return torch.stack(out)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("rope", "learned"),
    [("default", False), ("default", True), ("interleaved", False), ("partial", True),
     ("yarn", False)],
)  # fmt: skip
def test_equals_dense_attention_on_the_reindexed_subset(
    schedule: str, rope: str, learned: bool
) -> None:
    decoder = decoder_with(rope, learned)
    tokens = torch.randint(50, (70,), generator=torch.Generator().manual_seed(1))
    batch = PackedBatch.from_lengths([70])
    batch.memory = Dense(decoder, 3, 10)
    want = decoder(tokens, batch)
    memory = memory_of(decoder, "streaming:sinks=3,recent=10")
    got = run(decoder, memory, tokens, SCHEDULES[schedule])
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    exact = decoder(tokens, PackedBatch.from_lengths([70]))
    torch.testing.assert_close(got[:13], exact[:13], rtol=1e-4, atol=1e-4)  # sinks + recent
    assert (got[13:] - exact[13:]).abs().max() > 0.01


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_a_sequence_that_fits_is_exact(sinks: int) -> None:
    decoder = decoder_with()
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(2))
    exact = decoder(tokens, PackedBatch.from_lengths([40]))
    memory = memory_of(decoder, f"streaming:sinks={sinks},recent={40 - sinks}")
    got = run(decoder, memory, tokens, [11, 1, 1, 27])
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_sequences_share_a_step_and_states_are_reused() -> None:
    """Prompts and decodes in one step; a state that served a long sequence serves a new one."""
    decoder, kv = decoder_with(), "streaming:sinks=2,recent=6,slack=2"
    memory = memory_of(decoder, kv)
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(3))
    alone = [run(decoder, memory, row, [40]) for row in tokens]
    caches = [memory.manager.create() for _ in range(2)]
    done, found = [0, 0], [[], []]
    for counts in ([9, 1], [1, 1], [1, 20], [7, 1], [1, 1], [21, 16]):
        for cache, count in zip(caches, counts, strict=True):
            memory.manager.append(cache, count)
        step = torch.cat([tokens[n, done[n] : done[n] + c] for n, c in enumerate(counts)])
        parts = decoder(step, memory.batch(caches, counts)).split(list(counts))
        for n, part in enumerate(parts):
            found[n].append(part)
            done[n] += counts[n]
        memory.manager.check_integrity()
    for n in range(2):
        torch.testing.assert_close(torch.cat(found[n]), alone[n], rtol=1e-4, atol=1e-4)


def test_fork_and_truncate() -> None:
    """A fork goes its own way; rewinding within the slack is exact, also back into the range where
    nothing was dropped."""
    decoder = decoder_with()
    memory = memory_of(decoder, "streaming:sinks=2,recent=8,slack=4", sequences=3)
    manager = memory.manager
    tokens = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(4))
    other = torch.cat([tokens[0, :12], tokens[1, 12:]])
    want = [run(decoder, memory, row, [30]) for row in (tokens[0], other)]

    def extend(cache: object, row: Tensor, first: int, counts: list[int]) -> Tensor:
        parts = []
        for count in counts:
            manager.append(cache, count)
            parts.append(decoder(row[first : first + count], memory.batch([cache], [count])))
            first += count
        return torch.cat(parts)

    parent = manager.create()
    extend(parent, tokens[0], 0, [12])
    child = manager.fork(parent)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(extend(child, other, 12, [1, 5, 12]), want[1][12:], **close)
    torch.testing.assert_close(extend(parent, tokens[0], 12, [4]), want[0][12:16], **close)
    manager.truncate(parent, 13)
    torch.testing.assert_close(extend(parent, tokens[0], 13, [1, 3]), want[0][13:17], **close)
    for back in ([1], [3]):
        short = manager.create()
        extend(short, tokens[0], 0, [11])  # one token more than fits
        manager.truncate(short, 9)
        torch.testing.assert_close(extend(short, tokens[0], 9, back), want[0][9 : 9 + back[0]],
                                   **close)  # fmt: skip
        manager.free(short)
    manager.truncate(child, 20)  # further than the slack: what the ring lost is not seen
    assert extend(child, other, 20, [10]).isfinite().all()
    manager.check_integrity()


@pytest.mark.parametrize("steps", ["decode", "chunks"])
@pytest.mark.parametrize(
    ("sinks", "cut", "exact"),
    [
        (2, 29, 29),  # within the slack
        (2, 1, 1),  # every token but a sink is computed anew
        (2, 2, 2),
        (2, 3, 19),  # token 2 is lost; two layers see it through windows of 8 and 8
        (2, 10, 26),
        (2, 24, 40),
        (0, 10, 26),
    ],
)
def test_rewinding_far(sinks: int, cut: int, exact: int, steps: str) -> None:
    """What the ring has lost is missing, for as long as windows reach back to it; tokens that are
    computed anew are not lost, and rewinding again is as exact."""
    decoder = decoder_with()
    memory = memory_of(decoder, f"streaming:sinks={sinks},recent=8,slack=2", sequences=3)
    manager = memory.manager
    tokens = torch.randint(50, (60,), generator=torch.Generator().manual_seed(1))
    want = run(decoder, memory, tokens, [60])
    cache = manager.create()
    manager.append(cache, 30)
    decoder(tokens[:30], memory.batch([cache], [30]))

    def extend(first: int, last: int) -> Tensor:
        counts = [1] * (last - first) if steps == "decode" else [1, 3, last - first - 4]
        parts = []
        for count in counts:
            manager.append(cache, count)
            parts.append(decoder(tokens[first : first + count], memory.batch([cache], [count])))
            first += count
        return torch.cat(parts)

    manager.truncate(cache, cut)
    got = extend(cut, 50)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got[exact - cut :], want[exact:50], **close)
    assert exact == cut or not torch.allclose(got[0], want[cut], **close)
    assert got.isfinite().all()
    manager.truncate(cache, 48)
    torch.testing.assert_close(extend(48, 60), want[48:], **close)


def test_memory_does_not_grow() -> None:
    decoder, kv = decoder_with(), "streaming:sinks=4,recent=28,slack=0"
    assert layout_class(kv).bytes_per_token(decoder.attention_layers[0], torch.float32) == 0
    memory = memory_of(decoder, kv, sequences=1)
    rows = 2 * 2 * (32 * (16 + 16) + 4 * 16) * 4  # layers, heads
    assert memory.nbytes == rows
    cache = memory.manager.create()
    memory.manager.append(cache, 90)
    assert memory.manager.used_blocks == 0
    decoder(torch.zeros(90, dtype=torch.int64), memory.batch([cache], [90]))
    assert memory.nbytes == rows


@pytest.fixture
def spec() -> AttentionSpec:
    return AttentionSpec("gqa", 4, 2, 16, 16)


def test_refusals(spec: AttentionSpec) -> None:
    kind = layout_class("streaming")
    with pytest.raises(CacheError, match="MLA"):
        kind.check(dataclasses.replace(spec, kind="mla"))
    with pytest.raises(CacheError, match="sliding-window"):
        kind.check(dataclasses.replace(spec, window=8))
    for options in ("recent=0", "sinks=-1", "slack=-2"):
        with pytest.raises(CacheError, match="streaming"):
            layout_class(f"streaming:{options}")


def test_through_the_scorer() -> None:
    """`serval eval --kv streaming`: the same logits in chunks of any size."""
    decoder = decoder_with()
    tokens = torch.randint(50, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    kv = "streaming:sinks=2,recent=12"
    found = [
        torch.cat([rows for _, _, rows in Scorer(decoder, kv, chunk=chunk).logits([tokens])])
        for chunk in (7, 60)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
