"""Adapters served beside each other: the right one per request, and nothing shared between them."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serval import LLM, SamplingParams
from serval.adapt.lora import LoraOptions, add_adapters, merge
from serval.adapt.peft_format import save_adapter
from serval.adapt.serving import AdapterBank
from serval.errors import CheckpointError, ConfigError, RequestError
from serval.models.batch import PackedBatch
from serval.models.decoder import Decoder
from tests.adapt.toy import KINDS, adapted, fill, logits, toy_decoder
from tests.engine.helpers import byte_tokenizer, greedy, tiny_decoder

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SHAPES = {
    "first": {"rank": 4, "alpha": 24.0},
    "second": {"rank": 2, "alpha": 16.0, "targets": ("o_proj", "down_proj")},
    "third": {"rank": 7, "alpha": 50.0, "rslora": True},
}


def make_adapters(base: Decoder, directory: Path) -> tuple[dict[str, Path], dict[str, Decoder]]:
    """Adapter directories, and the merged model of each."""
    paths, merged = {}, {}
    for seed, (name, shape) in enumerate(SHAPES.items(), 1):
        decoder = copy.deepcopy(base)
        add_adapters(decoder, LoraOptions(**shape))
        fill(decoder, seed)
        paths[name] = save_adapter(decoder, directory / name)
        merge(decoder)
        merged[name] = decoder
    return paths, merged


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, dict[str, Decoder]]:
    paths, merged = make_adapters(tiny_decoder(), tmp_path_factory.mktemp("adapters"))
    llm = LLM(
        copy.deepcopy(tiny_decoder()),
        tokenizer=byte_tokenizer(),
        lora=paths,
        max_sequences=8,
        max_batch_tokens=24,
        block_size=8,
    )
    return llm, merged


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mixed_batch_gives_each_sequence_its_own_model(kind: str, tmp_path: Path) -> None:
    base = toy_decoder(kind)
    paths, merged = make_adapters(base, tmp_path)
    decoder = copy.deepcopy(base)
    bank = AdapterBank(decoder, paths)
    assert bank.names == list(SHAPES)
    tokens = torch.randint(96, (41,), generator=torch.Generator().manual_seed(5))
    lengths, adapters = [9, 1, 14, 6, 11], [2, 0, 3, 1, 2]
    batch = PackedBatch.from_lengths(lengths)
    batch.adapters = adapters
    with torch.no_grad():
        mixed = decoder(tokens, batch)
        plain = decoder(tokens, PackedBatch.from_lengths(lengths))
        assert torch.equal(plain, base(tokens, PackedBatch.from_lengths(lengths)))
        models = [base, *merged.values()]
        at = 0
        for length, adapter in zip(lengths, adapters, strict=True):
            rows = slice(at, at + length)
            alone = models[adapter](tokens[rows], PackedBatch.from_lengths([length]))
            torch.testing.assert_close(mixed[rows], alone, rtol=0, atol=3e-5)
            if adapter:
                assert (plain[rows] - alone).abs().max() > 1e-2  # the adapters do matter
            at += length


def test_served_text_is_that_of_the_merged_model(served: Any) -> None:
    llm, merged = served
    prompts = ["the cat said", "in the end there", "x", "another one of these"]
    choice = ["first", None, "third", "second"]
    outputs = llm.generate(prompts, GREEDY, lora=choice)
    texts = set()
    for prompt, name, output in zip(prompts, choice, outputs, strict=True):
        model = tiny_decoder() if name is None else merged[name]
        ids = output.outputs[0].token_ids
        assert ids == greedy(model, llm.encode(prompt), 12)
        texts.add(tuple(ids))
    same = llm.generate(prompts[:1] * 4, GREEDY, lora=choice)
    assert len({tuple(o.outputs[0].token_ids) for o in same}) == 4


def test_prefixes_are_not_shared_between_adapters(served: Any) -> None:
    llm, merged = served
    prompt = np.random.default_rng(0).integers(0, 256, 40).tolist()
    for name, found in (("first", 0), ("second", 0), (None, 0), ("first", 32), (None, 32)):
        before = llm.stats().prefix_hit_tokens
        output = llm.generate([prompt], GREEDY, lora=name)[0]
        model = tiny_decoder() if name is None else merged[name]
        assert output.outputs[0].token_ids == greedy(model, prompt, 12)
        assert llm.stats().prefix_hit_tokens - before == found
    several = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    llm.generate([prompt], several, lora="third")
    llm.engine.manager.check_integrity()


def test_a_preempted_sequence_stays_with_its_adapter(tmp_path: Path) -> None:
    paths, merged = make_adapters(tiny_decoder(), tmp_path)
    probe = LLM(tiny_decoder(), tokenizer=None, block_size=8, max_sequences=2, max_batch_tokens=16)
    per_block = probe.memory.nbytes // probe.engine.manager.total_blocks
    llm = LLM(
        copy.deepcopy(tiny_decoder()),
        lora=paths,
        block_size=8,
        max_sequences=4,
        max_batch_tokens=16,
        max_model_len=64,
        cache_bytes=per_block * 10,
    )
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, 12).tolist() for _ in range(4)]
    choice = ["first", "second", None, "third"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, params, lora=choice)
    assert llm.stats().preemptions > 0
    for prompt, name, output in zip(prompts, choice, outputs, strict=True):
        model = tiny_decoder() if name is None else merged[name]
        assert output.outputs[0].token_ids == greedy(model, prompt, 24)


def test_streams_choose_too(served: Any) -> None:
    llm, merged = served

    async def collect() -> list[int]:
        return [t async for d in llm.stream("the cat", GREEDY, lora="second") for t in d.token_ids]

    found = asyncio.run(collect())
    assert found == greedy(merged["second"], llm.encode("the cat"), 12)


def test_names_that_do_not_exist(served: Any, tmp_path: Path) -> None:
    llm, _ = served
    with pytest.raises(RequestError, match=r"no adapter 'other'; this engine has: 'first'"):
        llm.generate(["a"], GREEDY, lora="other")
    with pytest.raises(RequestError, match="2 adapters for 1 prompts"):
        llm.generate(["a"], GREEDY, lora=["first", None])
    with pytest.raises(RequestError, match="this engine has: none"):
        LLM(tiny_decoder(), block_size=8).generate([[1]], GREEDY, lora="first")
    with pytest.raises(CheckpointError, match="no adapter directory"):
        LLM(copy.deepcopy(tiny_decoder()), lora={"x": tmp_path / "none"})
    path = save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"this model's layer is"):
        LLM(copy.deepcopy(tiny_decoder()), lora={"x": path})
    decoder = toy_decoder()
    AdapterBank(decoder, {"x": path})
    with pytest.raises(ConfigError, match="serves adapters already"):
        AdapterBank(decoder, {"x": path})
    batch = PackedBatch.from_lengths([4])
    batch.adapters = [2]
    with pytest.raises(ConfigError, match="adapters 1 to 1"):
        decoder(torch.arange(4), batch)


def test_a_quantised_base_carries_adapters(tmp_path: Path) -> None:
    from serval.compress import CompressOptions, run
    from serval.models import checkpoint

    base = toy_decoder()
    checkpoint.save(base, tmp_path / "base")
    run(CompressOptions(str(tmp_path / "base"), tmp_path / "int8", weights="int8"))
    paths, merged = make_adapters(base, tmp_path)
    decoder = checkpoint.load(tmp_path / "int8")
    AdapterBank(decoder, paths)
    tokens = torch.arange(40) * 7 % 96
    batch = PackedBatch.from_lengths([25, 15])
    batch.adapters = [1, 3]
    with torch.no_grad():
        out = decoder.logits(decoder(tokens, batch))
    for rows, name in ((slice(0, 25), "first"), (slice(25, 40), "third")):
        wanted = logits(merged[name], tokens)[rows]
        error = (out[rows] - wanted).norm() / wanted.norm()
        assert error < 0.05  # int8's own error
        assert (logits(base, tokens)[rows] - wanted).norm() / wanted.norm() > 0.2
