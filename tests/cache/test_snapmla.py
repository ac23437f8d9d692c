"""The SnapMLA layout: prompts in the model's precision, decode steps in FP8, any cut of a text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serval.cache.layouts import layout_class
from serval.cache.memory import PagedMemory, cache_bytes_per_token
from serval.errors import CacheError
from serval.kernels.snapmla import reference
from serval.models.attention import AttentionSpec
from serval.models.memory import CausalMemory

SPEC = AttentionSpec("mla", 4, 1, 24, 16, kv_lora_rank=32, qk_rope_head_dim=8)
DEEPSEEK = AttentionSpec("mla", 128, 1, 192, 128, kv_lora_rank=512, qk_rope_head_dim=64)
LENGTHS = (90, 21)
SCALE = 0.2


class Layer:
    """One latent attention layer's random inputs, for two sequences."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = [(4, 16), (4, 8), (32,), (8,)]  # q_nope, q_rope, latent, k_rope
        self.tensors = [[torch.randn(n, *shape) for n in LENGTHS] for shape in shapes]
        for k_rope in self.tensors[3]:
            k_rope[:, :2] *= 50
        for q_rope in self.tensors[1]:
            q_rope[..., :2] *= 0.02
        self.kv_b = torch.randn(4, 32, 32) * 0.2

    def exact(self, n: int) -> Tensor:
        mine = [x[n] for x in self.tensors]
        return CausalMemory([0, LENGTHS[n]]).attend_latent(0, *mine, self.kv_b, SCALE)

    def run(self, schedule: list[tuple[int, int]], kv: str, block: int = 8) -> list[Tensor]:
        """The outputs of each sequence, when step i computes schedule[i][n] tokens of it."""
        memory = memory_of(kv, block)
        caches = [memory.manager.create() for _ in LENGTHS]
        done = [0, 0]
        parts: list[list[Tensor]] = [[], []]
        for counts in schedule:
            live = [n for n in range(2) if counts[n]]
            for n in live:
                memory.manager.append(caches[n], counts[n])
            memory.batch([caches[n] for n in live], [counts[n] for n in live])
            rows = [
                torch.cat([x[n][done[n] : done[n] + counts[n]] for n in live]) for x in self.tensors
            ]
            out = memory.attend_latent(0, *rows, self.kv_b, SCALE)
            for n, part in zip(live, out.split([counts[n] for n in live]), strict=True):
                parts[n].append(part)
                done[n] += counts[n]
        assert tuple(done) == LENGTHS
        return [torch.cat(found) for found in parts]


def memory_of(kv: str, block: int, tokens: int = 512) -> PagedMemory:
    blocks = -(-tokens // block)
    size = int(cache_bytes_per_token([SPEC], kv, torch.float32)) * blocks * block
    return PagedMemory([SPEC], kv, cache_bytes=size, max_model_len=tokens, block_size=block)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


WHOLE = [LENGTHS]
CHUNKS = [(30, 0), (31, 21), (29, 0)]
DECODE = [(70, 9), *[(1, 1)] * 12, *[(1, 0)] * 8]
VERIFY = [(41, 0), (4, 12), *[(3, 3)] * 3, (36, 0)]


@pytest.mark.parametrize("block", [4, 32, 64, 192])
@pytest.mark.parametrize("schedule", [WHOLE, CHUNKS, DECODE, VERIFY])
def test_close_to_exact_attention(schedule: list[tuple[int, int]], block: int) -> None:
    layer = Layer()
    for n, got in enumerate(layer.run(schedule, "snapmla", block)):
        assert relative(got, layer.exact(n)) < 0.08


def test_block_size_does_not_change_a_result() -> None:
    layer = Layer()
    want = layer.run(DECODE, "snapmla", 64)
    for block in (1, 7, 32, 256):
        for got, expected in zip(layer.run(DECODE, "snapmla", block), want, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_a_prompt_does_not_depend_on_its_chunks() -> None:
    """Nor on being reused: later chunks read what the codes stand for, as the first did."""
    layer = Layer()
    for kv in ("snapmla", "snapmla:fp8_queries=0"):
        whole, cut = layer.run(WHOLE, kv), layer.run(CHUNKS, kv)
        for got, want in zip(cut, whole, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    tokens = layer.run(DECODE, "snapmla:fp8_queries=0")
    for got, want in zip(tokens, whole, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_several_queries_answer_as_one_by_one() -> None:
    layer = Layer()
    by_one = layer.run(DECODE, "snapmla")
    by_four = layer.run([(70, 9), *[(4, 4)] * 3, (8, 0)], "snapmla")
    for got, want in zip(by_four, by_one, strict=True):
        assert relative(got, want) < 2e-3


def test_a_mixed_step_equals_separate_steps() -> None:
    layer = Layer()
    mixed = layer.run([(40, 8), (1, 12), (49, 1)], "snapmla")
    apart = layer.run([(40, 0), (0, 8), (1, 0), (0, 12), (49, 0), (0, 1)], "snapmla")
    for got, want in zip(mixed, apart, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_rotary_keys_in_fp8_lose_where_they_are_large() -> None:
    """Larger keys and smaller queries of one dim: the same attention, another quantisation."""
    layer = Layer()
    for k_rope in layer.tensors[3]:
        k_rope[:, 0] *= 5000
    for q_rope in layer.tensors[1]:
        q_rope[..., 0] /= 5000
    errors = {
        kv: relative(layer.run(DECODE, kv)[0], layer.exact(0))
        for kv in ("snapmla", "snapmla:config=a", "snapmla:config=b")
    }
    assert errors["snapmla:config=a"] > 3 * errors["snapmla"]
    assert errors["snapmla"] < 0.08


def test_configurations_store_what_they_say() -> None:
    x, k = torch.randn(20, 32), 100 * torch.randn(20, 8)
    for config in ("snapmla", "a", "b"):
        memory = memory_of(f"snapmla:config={config}", 8)
        cache = memory.manager.create()
        memory.manager.append(cache, 20)
        memory.batch([cache], [20])
        q = torch.zeros(20, 4, 16), torch.zeros(20, 4, 8)
        memory.attend_latent(0, *q, x, k, torch.zeros(4, 32, 32), 1.0)
        storage = memory.layouts[0].storage[0]
        table = torch.from_numpy(cache.tables[0].ids.copy())
        keys = reference.gather(*storage, table, 20)
        if config == "b":
            want = reference.quantize_by(x, k, torch.ones(20))
        else:
            want = reference.quantize(x, k, rope8=config == "a")
        for got, expected in zip((keys.codes, keys.scales, keys.rope), want, strict=True):
            assert torch.equal(got, expected)


def stored_keys(kv: str, block: int, cuts: list[int], x: Tensor, k: Tensor) -> reference.Keys:
    """What a sequence written in steps of `cuts` tokens has in its blocks; another one shares its
    steps."""
    memory = memory_of(kv, block)
    other, cache = memory.manager.create(), memory.manager.create()
    done = 0
    for count in cuts:
        rows = slice(done, done + count)
        memory.manager.append(other, 2)
        memory.manager.append(cache, count)
        memory.batch([other, cache], [2, count])
        latent, rope = (torch.cat([9 * y[:2], y[rows]]) for y in (x, k))
        q = torch.zeros(count + 2, 4, 16), torch.zeros(count + 2, 4, 8)
        memory.attend_latent(0, *q, latent, rope, torch.zeros(4, 32, 32), 1.0)
        done += count
    table = torch.from_numpy(cache.tables[0].ids.copy())
    return reference.gather(*memory.layouts[0].storage[0], table, done)


@pytest.mark.parametrize("config", ["c", "d"])
@pytest.mark.parametrize("block", [8, 64, 96])
def test_shared_scales_are_those_of_the_tokens_so_far(config: str, block: int) -> None:
    """However a text is cut, and whatever else runs."""
    x, k = torch.randn(150, 32) * torch.randn(150, 1).exp(), torch.randn(150, 8)
    x[:3] = 0  # says nothing about a scale
    largest = x.abs().amax(-1)
    if config == "c":
        so_far = largest.cummax(0).values
    else:
        so_far = torch.cat([part.cummax(0).values for part in largest.split(64)])
    want = reference.quantize_by(x[3:], k[3:], reference.scale_of(so_far[3:]))
    for cuts in ([150], [60, 1, 1, 1, 1, 1, 85], [3, 97, 50]):
        keys = stored_keys(f"snapmla:config={config}", block, cuts, x, k)
        for got, expected in zip((keys.codes, keys.scales, keys.rope), want, strict=True):
            assert torch.equal(got[3:], expected)
        assert not keys.codes[:3].any()
        torch.testing.assert_close(keys.dequantize()[:3, 32:], k[:3], atol=0, rtol=4e-3)


def test_bytes_per_token() -> None:
    assert cache_bytes_per_token([SPEC], "snapmla", torch.float32) == 32 + 4 + 2 * 8
    assert cache_bytes_per_token([DEEPSEEK], "snapmla", torch.bfloat16) == 644
    assert cache_bytes_per_token([DEEPSEEK], "full", torch.bfloat16) == 1152
    assert memory_of("snapmla", 64).nbytes == 512 * 52


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        ("snapmla:config=e", "snapmla, a, b, c, d"),
        ("snapmla:fp8_queries=-1", "0 or more"),
        ("snapmla:bits=4", "config, fp8_queries"),
    ],
)
def test_bad_options_are_refused(kv: str, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        layout_class(kv)
