"""Low-bit layouts: what is attended to, what is stored, and what comes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from serval import kernels
from serval.cache.layouts import layout_class
from serval.cache.memory import PagedMemory, cache_budget, cache_bytes_per_token
from serval.errors import CacheError
from serval.kernels import jit
from serval.kernels.oscar import reference
from serval.models.attention import AttentionSpec
from serval.models.memory import CausalMemory

GQA = AttentionSpec("gqa", 4, 2, 32, 32)
NAMES = ["oscar", "oscar:bits=4", "oscar:zero=min", "oscar:norms=false", "oscar:rotate=false",
         "oscar:sinks=3", "kivi", "kivi:sinks=40", "int2", "int4", "q4_0",
         "int2:rotate=true"]  # fmt: skip
R = 64


def short(kv: str, residual: int = R) -> str:
    """The layout with a short window."""
    return f"{kv}{',' if ':' in kv else ':'}residual={residual}"


def memory_for(kv: str, spec: AttentionSpec = GQA, blocks: int = 40, **options) -> PagedMemory:
    options = {"block_size": 32, "max_sequences": 4, "max_model_len": 64, **options}
    size = cache_budget(
        [spec], kv, torch.float32, blocks=blocks, block_size=options["block_size"],
        sequences=options["max_sequences"],
    )  # fmt: skip
    return PagedMemory([spec], kv, cache_bytes=size, **options)


@pytest.fixture(scope="module", params=["reference", "compiled"])
def tolerance(request: pytest.FixtureRequest) -> Iterator[float]:
    """Relative error allowed to outputs; compiled kernels round queries and weights to 8 bits."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setenv("SERVAL_KERNELS", "reference")
        jit.reset()
        yield 1e-4 if request.param == "reference" else 0.06
    jit.reset()


class Sequences:
    """Random sequences that pass through a memory in steps, and what should come out."""

    def __init__(self, memory: PagedMemory, count: int = 1, seed: int = 0, tokens: int = 400):
        generator = torch.Generator().manual_seed(seed)
        self.memory, self.spec = memory, GQA
        self.layout = memory.layouts[0]
        self.caches = [memory.manager.create() for _ in range(count)]
        self.q, self.k, self.v = (
            torch.randn(count, tokens, heads, 32, generator=generator) for heads in (4, 2, 2)
        )
        self.k *= torch.rand(count, tokens, 1, 1, generator=generator) * 3  # norms differ
        self.sinks = torch.randn(4, generator=generator)

    def step(self, counts: dict[int, int], sinks: bool = False) -> list[torch.Tensor]:
        """Compute counts[n] more tokens of sequence n; their outputs."""
        for n, count in counts.items():
            self.memory.manager.append(self.caches[n], count)
        caches = [self.caches[n] for n in counts]
        self.memory.batch(caches, list(counts.values()))
        spans = {n: slice(self.caches[n].num_tokens - c, self.caches[n].num_tokens)
                 for n, c in counts.items()}  # fmt: skip
        rows = [torch.cat([x[n, span] for n, span in spans.items()])
                for x in (self.q, self.k, self.v)]  # fmt: skip
        out = self.memory.attend(0, *rows, 0.2, sinks=self.sinks if sinks else None)
        self.memory.manager.check_integrity()
        return list(out.split(list(counts.values())))

    def stored(self, n: int, old: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `old` tokens as the layout should have them."""
        layout = self.layout
        fmt = layout.format(self.spec)
        k, v = self.k[n, :old].clone(), self.v[n, :old].clone()
        first = slice(layout.sinks, layout.sinks + layout.in_blocks(old))
        packed_k, packed_v = k[first], v[first]
        if not len(packed_k):
            return k, v
        if layout.rotate:
            packed_k, packed_v = kernels.hadamard(packed_k), kernels.hadamard(packed_v)
        packed_k, packed_v = reference.dequantize(fmt, *reference.quantize(fmt, packed_k, packed_v))
        if layout.rotate:
            packed_k, packed_v = kernels.hadamard(packed_k), kernels.hadamard(packed_v)
        k[first], v[first] = packed_k, packed_v
        return k, v

    def expected(self, n: int, span: slice, sinks: bool = False) -> torch.Tensor:
        k, v = self.stored(n, span.start)
        k, v = (torch.cat([x, y[n, span]]) for x, y in ((k, self.k), (v, self.v)))
        first = torch.zeros(span.start, 4, 32)
        q = torch.cat([first, self.q[n, span]])
        memory = CausalMemory([0, span.stop])
        return memory.attend(0, q, k, v, 0.2, sinks=self.sinks if sinks else None)[span]

    def check(self, counts: dict[int, int], sinks: bool = False, *, tolerance: float) -> None:
        before = {n: self.caches[n].num_tokens for n in counts}
        for n, out in zip(counts, self.step(counts, sinks), strict=True):
            want = self.expected(n, slice(before[n], before[n] + counts[n]), sinks)
            error = (out - want).norm() / want.norm()
            assert error < tolerance, (n, before[n], counts[n], error)


@pytest.mark.parametrize("kv", NAMES)
@pytest.mark.parametrize("sinks", [False, True])
def test_attends_over_blocks_window_and_new_tokens(kv: str, sinks: bool, tolerance: float) -> None:
    """Prompts, decoding, several rows at once and mixtures, over lengths around the window's."""
    run = Sequences(memory_for(short(kv)), 3)
    run.check({0: 50, 1: 1, 2: R}, sinks, tolerance=tolerance)
    run.check({0: 13, 1: 1, 2: 1}, sinks, tolerance=tolerance)  # R - 1 of sequence 0
    run.check({0: 1, 1: 40, 2: 3}, sinks, tolerance=tolerance)  # R
    run.check({0: 1, 1: 1, 2: 1}, sinks, tolerance=tolerance)  # R + 1
    run.check({1: 1, 2: 5}, sinks, tolerance=tolerance)
    run.check({0: 2 * R - 1, 2: 90}, sinks, tolerance=tolerance)  # 3 R
    for _ in range(3):
        run.check({0: 1, 1: 1, 2: 1}, sinks, tolerance=tolerance)
    run.check({0: 7, 1: 30}, sinks, tolerance=tolerance)


def test_decoding_is_what_the_plain_kernel_computes_over_the_same_numbers(tolerance: float) -> None:
    """Token by token, the window filling and being flushed twice."""
    run = Sequences(memory_for(short("oscar", 32)))
    for _ in range(70):
        run.check({0: 1}, tolerance=tolerance)


def test_long_contexts_are_read_piece_by_piece(monkeypatch, tolerance: float) -> None:
    monkeypatch.setattr("serval.cache.layouts.oscar._EXPANDED", 0)
    run = Sequences(memory_for(short("oscar:sinks=2")))
    for count in (R + 40, 60, 30):
        run.check({0: count}, sinks=True, tolerance=tolerance)


@pytest.mark.parametrize("length", [R - 1, R, R + 1, 2 * R, 2 * R + 17])
@pytest.mark.parametrize("kv", ["oscar", "kivi:sinks=5"])
def test_bookkeeping_is_a_function_of_the_length(kv: str, length: int) -> None:
    kind = layout_class(short(kv))
    tables = []
    for chunks in ([length], [1] * length, [R, length - R] if length > R else [3, length - 3]):
        run = Sequences(memory_for(short(kv)))
        for count in chunks:
            run.step({0: count})
        (cache,) = run.caches
        tables.append(cache.tables[0].count)
        layout = run.layout
        stored = kind.in_blocks(length)
        assert stored == (length - layout.sinks) // R * R
        waiting = length - layout.sinks - stored
        exact = run.k[0, length - waiting : length]
        if layout.rotate:
            exact = kernels.hadamard(exact)
        torch.testing.assert_close(layout.states[0][0][cache.states[0], :waiting], exact)
    assert tables == [kind.in_blocks(length) // 32] * 3


@pytest.mark.parametrize("kv", ["oscar", "oscar:zero=min", "kivi", "int4"])
def test_a_token_is_quantised_once(kv: str) -> None:
    run = Sequences(memory_for(short(kv)))
    run.step({0: R + 5})
    first = run.caches[0].tables[0].ids[: R // 32].tolist()
    before = [tensor[first].clone() for tensor in run.layout.storage[0]]
    for count in (1, 58, 1, 1, R, 2):
        run.step({0: count})
        for old, tensor in zip(before, run.layout.storage[0], strict=True):
            assert torch.equal(tensor[first], old)


@pytest.mark.parametrize("kv", NAMES)
def test_alone_and_in_a_batch_are_the_same(kv: str) -> None:
    plan = [{0: 70, 1: 30, 2: 100}, *[{0: 1, 1: 1, 2: 1}] * 40, {0: 5, 1: 3, 2: 20}, {0: 1, 2: 1}]
    together = Sequences(memory_for(short(kv)), 3)
    outputs = [together.step(counts) for counts in plan]
    for n in range(3):
        alone = Sequences(memory_for(short(kv)), 3)
        for counts, out in zip(plan, outputs, strict=True):
            if n in counts:
                (mine,) = alone.step({n: counts[n]})
                # first tokens are attended to by matrix products, which round by shape
                within = 1e-5 if "sinks" in kv else 0.0
                other = out[list(counts).index(n)]
                torch.testing.assert_close(mine, other, atol=within, rtol=within)


@pytest.mark.parametrize("kv", ["oscar", "oscar:sinks=4", "kivi", "int2"])
@pytest.mark.parametrize("keep", [150, 2 * R + 1, 2 * R, R + 40, R, 10, 4, 2, 0])
def test_truncated_tokens_come_back_from_blocks(kv: str, keep: int, tolerance: float) -> None:
    """What follows attends to the numbers that were stored; tokens that wait again stay as they
    are when they are quantised anew, except for rounding."""
    run = Sequences(memory_for(short(kv)))
    run.step({0: 160})
    k, v = run.stored(0, 160)
    run.memory.manager.truncate(run.caches[0], keep)
    run.memory.manager.check_integrity()
    run.k[0, :keep], run.v[0, :keep] = k[:keep], v[:keep]
    unchanged = run.layout.in_blocks(keep)
    stored = run.stored

    def seen(n: int, old: int):
        found = stored(n, old)  # codes of codes: exact for values of an integer grid, else nearly
        first = slice(run.layout.sinks, run.layout.sinks + unchanged)
        for x, kept in zip(found, (k, v), strict=True):
            x[first] = kept[first]
        return found

    run.stored = seen
    for count in (1, 1, 4, 30, 1):
        run.check({0: count}, tolerance=tolerance)


def test_forked_sequences_go_their_own_ways(tolerance: float) -> None:
    run = Sequences(memory_for(short("oscar")), 2)
    run.step({0: R + 30})
    manager = run.memory.manager
    manager.free(run.caches[1])
    run.caches[1] = manager.fork(run.caches[0])
    for x in (run.k, run.v):
        x[1, : R + 30] = x[0, : R + 30]
    assert manager.used_blocks == R // 32  # shared
    for count in (1, 6, 40, 1):
        run.check({0: count, 1: 1}, tolerance=tolerance)
        run.check({1: count, 0: 1}, tolerance=tolerance)


def test_scaling_a_token_scales_it_and_nothing_else() -> None:
    """Scale equivariance, through the layout: the best single property of OScaR."""
    read = {}
    for kv in ("oscar", "kivi"):
        for factor in (1.0, 0.05):
            run = Sequences(memory_for(short(kv)))
            run.k[0, 17] *= factor
            run.step({0: R})
            layout, table = run.layout, torch.from_numpy(run.caches[0].tables[0].ids)
            read[kv, factor] = kernels.oscar.fetch(layout.format(GQA), layout.storage[0], table, R)[
                0
            ]
    others = torch.arange(R) != 17
    torch.testing.assert_close(read["oscar", 1.0][17] * 0.05, read["oscar", 0.05][17])
    assert torch.equal(read["oscar", 1.0][others], read["oscar", 0.05][others])
    assert not torch.allclose(read["kivi", 1.0][others], read["kivi", 0.05][others])


def test_q4_0_is_that_of_ggml() -> None:
    quants = pytest.importorskip("gguf.quants")
    kind = quants.GGMLQuantizationType.Q4_0
    run = Sequences(memory_for("q4_0"))
    run.step({0: 32})
    table = torch.from_numpy(run.caches[0].tables[0].ids)
    fmt, storage = run.layout.format(GQA), run.layout.storage[0]
    for got, x in zip(kernels.oscar.fetch(fmt, storage, table, 32), (run.k, run.v), strict=True):
        theirs = quants.dequantize(quants.quantize(x[0, :32].flatten(1).numpy(), kind), kind)
        theirs = torch.from_numpy(theirs)
        # scales are 16-bit floats there, integers of 14 bits here: a number half-way between two
        # codes may go to the other one
        close = torch.isclose(got.flatten(1), theirs, atol=2e-2, rtol=1e-2)
        assert close.float().mean() > 0.998
        assert (got.flatten(1) - theirs).abs().max() < 0.2 * x.abs().max()


def test_bytes_of_blocks_and_states() -> None:
    wide = AttentionSpec("gqa", 32, 8, 128, 128)
    assert 16 * 2 * 8 * 128 / (8 * cache_bytes_per_token([wide], "oscar", torch.float32)) > 5.29
    memory = memory_for("oscar", wide, blocks=4, block_size=128, max_model_len=128)
    states = 4 * 128 * 8 * (128 + 128) * 4
    per_token = cache_bytes_per_token([wide], "oscar", torch.float32)
    assert memory.nbytes == pytest.approx(states + 4 * 128 * per_token)
    assert cache_bytes_per_token([wide], "oscar:bits=4", torch.float32) > 1.6 * per_token
    mixed = cache_bytes_per_token([wide], "oscar:value_bits=4", torch.float32)
    assert per_token < mixed < cache_bytes_per_token([wide], "oscar:bits=4", torch.float32)


@pytest.mark.parametrize(
    ("kv", "spec", "options", "match"),
    [
        ("oscar", AttentionSpec("mla", 4, 1, 24, 16, 32, 8), {}, r"'oscar'.*MLA"),
        ("kivi", AttentionSpec("gqa", 4, 2, 32, 32, window=8), {}, r"'kivi'.*sliding windows"),
        ("int4", AttentionSpec("gqa", 4, 2, 36, 36), {}, r"'int4'.*head_dim=36"),
        ("oscar", GQA, {"block_size": 48}, r"block_size=48.*multiple of 32"),
        ("oscar:residual=96", GQA, {"block_size": 64}, r"divides residual=96"),
        ("oscar:residual=40", GQA, {}, r"residual=40.*multiple"),
        ("oscar:bits=3", GQA, {}, r"got bits=3; expected one of 2, 4"),
        ("oscar:value_bits=3", GQA, {}, "value_bits=3; expected one of 0, 2, 4"),
        ("oscar:sinks=-1", GQA, {}, "sinks=-1"),
        ("oscar:zero=half", GQA, {}, "zero='half'"),
        ("kivi:rotate=true", GQA, {}, "no option 'rotate'"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(kv, spec, options, match) -> None:
    with pytest.raises(CacheError, match=match):
        memory_for(kv, spec, **options)


@pytest.mark.parametrize("dim", [8, 40, 80, 96, 192])
def test_head_dims_that_are_no_power_of_two(dim: int) -> None:
    spec = AttentionSpec("gqa", 4, 2, dim, dim)
    memory = memory_for("oscar:bits=4,residual=32", spec)
    torch.manual_seed(0)
    q, k, v = (torch.randn(70, heads, dim) for heads in (4, 2, 2))
    cache, outputs = memory.manager.create(), []
    for a, b in ((0, 60), (60, 69), (69, 70)):
        memory.manager.append(cache, b - a)
        memory.batch([cache], [b - a])
        outputs.append(memory.attend(0, q[a:b], k[a:b], v[a:b], dim**-0.5))
    want = CausalMemory([0, 70]).attend(0, q, k, v, dim**-0.5)
    torch.testing.assert_close(outputs[0], want[:60], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(outputs[1:]), want[60:], atol=0.2, rtol=0.2)
