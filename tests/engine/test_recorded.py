"""Replayed decode steps write exactly what ordinary ones write, and give way where they must."""

from __future__ import annotations

import copy

import pytest
import torch

from serval import LLM, SamplingParams
from serval.compress.install import install
from serval.compress.scheme import WeightScheme, quantize
from serval.compress.targets import targets
from serval.engine.recorded import MAX_ROWS, RecordedSteps
from serval.engine.request import RequestOutput
from serval.kernels import jit
from serval.models.decoder import Decoder

from .helpers import tiny_decoder

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
PROMPTS = [[5, 6, 7], [8] * 30, [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if jit.load("replay") is None:
        pytest.skip("no compiler")


def engine(decoder: Decoder, **options: object) -> tuple[LLM, RecordedSteps]:
    settings = {"max_sequences": 4, "max_batch_tokens": 64, "block_size": 8, **options}
    llm = LLM(decoder, **settings)  # type: ignore[arg-type]
    recorded = llm.engine.runner.recorded
    assert recorded is not None
    return llm, recorded


def written(outputs: list[RequestOutput]) -> list[object]:
    return [
        (o.outputs[0].token_ids, [[(t, p.logprob) for t, p in e.items()] for e in entries])
        for o in outputs
        for entries in [o.outputs[0].logprobs or []]
    ]


def ordinary(decoder: Decoder, params: object = PARAMS, **options: object) -> list[object]:
    llm, _ = engine(decoder, **options)
    llm.engine.runner.recorded = None
    return written(llm.generate(PROMPTS, params))  # type: ignore[arg-type]


def quantized(name: str, bits: int, group: int | None, scales: str) -> Decoder:
    decoder = copy.deepcopy(tiny_decoder(name))
    scheme = WeightScheme(bits, group, scales=scales)  # type: ignore[arg-type]
    for target in targets(decoder):
        if target.kind == "linear":
            weight = target.module.weight  # type: ignore[union-attr]
            install(decoder, target, quantize(weight.detach(), scheme))
    return decoder


@pytest.mark.parametrize("kv", ["full", "bf16", "int8"])
@pytest.mark.parametrize("name", ["gqa", "qk-norm", "sliding-sinks"])
def test_the_same_bits_as_ordinary_steps(name: str, kv: str) -> None:
    decoder = tiny_decoder(name)
    llm, recorded = engine(decoder, kv=kv)
    assert written(llm.generate(PROMPTS, PARAMS)) == ordinary(decoder, kv=kv)
    assert not recorded.obstacles
    assert recorded.replayed > 15


@pytest.mark.parametrize(
    ("bits", "group", "scales"),
    [(4, None, "float"), (4, 16, "integer"), (4, 16, "float"), (8, None, "float")],
)
def test_quantized_layers_replay(bits: int, group: int | None, scales: str) -> None:
    decoder = quantized("qk-norm", bits, group, scales)
    llm, recorded = engine(decoder)
    assert written(llm.generate(PROMPTS, PARAMS)) == ordinary(decoder)
    assert recorded.replayed > 15


@pytest.mark.parametrize(
    "kv", ["oscar:residual=32", "kivi:residual=32", "int4:residual=64", "q4_0"]
)
@pytest.mark.parametrize("weights", ["float", "quantized"])
def test_low_bit_caches_replay_between_full_windows(weights: str, kv: str) -> None:
    """Steps that fill a window go the ordinary way; quantised weights leave the values' rotation to
    the step."""
    decoder = quantized("qk-norm", 4, 16, "integer") if weights == "quantized" else tiny_decoder()
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, logprobs=2)
    llm, recorded = engine(decoder, kv=kv, block_size=32)
    layout = llm.memory.layouts[0]
    assert written(llm.generate(PROMPTS, params)) == ordinary(decoder, params, kv=kv, block_size=32)
    assert not recorded.obstacles
    fills = sum((n + 89) // layout.residual for n in map(len, PROMPTS))
    assert 90 - 4 - fills <= recorded.replayed <= 88


def test_low_bit_caches_with_first_tokens_kept_go_the_ordinary_way() -> None:
    decoder, kv = tiny_decoder(), "oscar:residual=32,sinks=4"
    llm, recorded = engine(decoder, kv=kv, block_size=32)
    assert written(llm.generate(PROMPTS, PARAMS)) == ordinary(decoder, kv=kv, block_size=32)
    assert recorded.replayed == 0


@pytest.mark.parametrize("name", ["moe", "mla", "shortcut"])
def test_models_that_need_pytorch_go_the_ordinary_way(name: str) -> None:
    decoder = tiny_decoder(name)
    llm, recorded = engine(decoder)
    assert written(llm.generate(PROMPTS, PARAMS)) == ordinary(decoder)
    assert "PyTorch computes" in recorded.obstacles[3]
    assert recorded.replayed == 0


def test_sequences_come_and_go() -> None:
    decoder = tiny_decoder()
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=n, ignore_eos=True, logprobs=2)
        for i, n in enumerate((30, 7, 19))
    ]
    llm, recorded = engine(decoder, max_sequences=2)
    assert written(llm.generate(PROMPTS, params)) == ordinary(decoder, params, max_sequences=2)
    assert set(recorded._steps) == {1, 2}
    assert recorded.replayed > 20


def test_tables_grow_beyond_what_was_recorded() -> None:
    decoder = tiny_decoder()
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, logprobs=0)
    llm, recorded = engine(decoder, block_size=2)  # 64 blocks hold 128 tokens
    assert written(llm.generate(PROMPTS, params)) == ordinary(decoder, params, block_size=2)
    assert recorded.replayed > 130


def test_rotary_tables_made_longer_by_another_engine() -> None:
    decoder = copy.deepcopy(tiny_decoder())
    llm, recorded = engine(decoder, prefix_caching=False)
    before = written(llm.generate(PROMPTS, PARAMS))
    other, _ = engine(decoder, kv="streaming:sinks=2,recent=6", max_model_len=5000)
    other.generate([[1, 2, 3]], PARAMS)
    junk = [torch.full_like(x, 7.7) for x in decoder.rotary(torch.device("cpu")) for _ in range(50)]
    replayed = recorded.replayed
    assert written(llm.generate(PROMPTS, PARAMS)) == before
    assert recorded.replayed > replayed
    assert len(junk) == 100


@pytest.mark.parametrize("kv", ["full", "kivi:residual=32"])
def test_an_engine_with_rotated_values_leaves_others_as_they_are(kv: str) -> None:
    decoder = copy.deepcopy(tiny_decoder())
    llm, _ = engine(decoder, kv=kv, block_size=32)
    long = [list(range(20, 90))]
    before = written(llm.generate(long, PARAMS))
    rotating, _ = engine(decoder, kv="oscar:residual=32", block_size=32)
    assert written(llm.generate(long, PARAMS)) == before
    assert llm.stats().prefix_hit_tokens > 0
    fresh = copy.deepcopy(tiny_decoder())
    alone, _ = engine(fresh, kv="oscar:residual=32", block_size=32)
    assert fresh.attention_modules[0].values_rotated
    for ours, wanted in zip(rotating.generate(long, PARAMS), alone.generate(long, PARAMS)):
        assert ours.outputs[0].token_ids == wanted.outputs[0].token_ids


def test_changed_weights_are_seen() -> None:
    decoder = copy.deepcopy(tiny_decoder())
    llm, recorded = engine(decoder, prefix_caching=False)
    before = written(llm.generate(PROMPTS, PARAMS))
    block = decoder.layers[0]
    with torch.no_grad():
        block.mlp.down_proj.weight.mul_(-1)  # type: ignore[union-attr] in place
    in_place = written(llm.generate(PROMPTS, PARAMS))
    assert in_place == ordinary(decoder)
    weight = block.self_attn.o_proj.weight  # type: ignore[union-attr]
    weight.data = -weight.data  # other memory, the same parameter
    moved = written(llm.generate(PROMPTS, PARAMS))
    assert moved == ordinary(decoder)
    block.mlp.up_proj.weight = torch.nn.Parameter(  # type: ignore[union-attr] another parameter
        torch.randn(64, 48) * 0.2
    )
    replaced = written(llm.generate(PROMPTS, PARAMS))
    assert replaced == ordinary(decoder)
    decoder.layers[1].mlp = copy.deepcopy(block.mlp)  # another module
    other = written(llm.generate(PROMPTS, PARAMS))
    assert other == ordinary(decoder)
    assert len({str(x) for x in (before, in_place, moved, replaced, other)}) == 5
    assert recorded.replayed > 80


def test_hooks_are_called() -> None:
    decoder = copy.deepcopy(tiny_decoder())
    llm, recorded = engine(decoder)
    llm.generate(PROMPTS[:1], PARAMS)
    assert recorded.replayed > 15
    before, seen = recorded.replayed, []
    hook = decoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    llm.generate(PROMPTS[:1], PARAMS)
    assert len(seen) >= 24
    assert recorded.replayed == before
    hook.remove()
    llm.generate(PROMPTS[:1], PARAMS)
    assert recorded.replayed > before


def test_large_batches_and_other_layouts_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    many = [[n + 1] for n in range(MAX_ROWS + 2)]
    llm, recorded = engine(decoder, max_sequences=len(many))
    llm.generate(many, PARAMS)
    assert MAX_ROWS + 2 not in recorded._steps
    llm, recorded = engine(decoder)
    monkeypatch.setattr(type(llm.memory.layouts[0]), "recordable", False)
    llm, recorded = engine(decoder)
    llm.generate(PROMPTS, PARAMS)
    assert recorded.replayed == 0
    assert not recorded._steps
