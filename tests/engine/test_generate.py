"""What the engine writes equals the plain greedy loop, however the work is scheduled."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from serval import LLM, SamplingParams
from serval.engine.request import RequestOutput
from serval.errors import CacheError, ConfigError, DataError, RequestError
from serval.models.batch import PackedBatch

from .helpers import CONFIGS, VOCAB, byte_tokenizer, greedy, tiny_decoder, tiny_llm

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(280) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def drained(llm: LLM) -> None:
    llm.memory.manager.check_integrity()
    assert llm.memory.manager.used_blocks == 0
    assert not llm.engine.requests
    assert llm.engine.idle


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_the_plain_loop(name: str) -> None:
    batch = prompts(5)
    want = [greedy(tiny_decoder(name), prompt, 12) for prompt in batch]
    plain = tiny_llm(name)
    assert ids(plain.generate(batch, GREEDY)) == want
    assert ids(plain.generate(batch, GREEDY)) == want  # now from the prefix cache
    assert plain.stats().prefix_hit_tokens > 0
    drained(plain)
    tokens = plain.memory.manager.capacity_tokens
    bytes_for = plain.memory.block_bytes * 9  # one sequence of 52 tokens, hardly more
    assert tokens > 72
    for options in (
        {"prefix_caching": False},
        {"max_batch_tokens": 8, "max_sequences": 3},
        {"max_batch_tokens": 7, "max_sequences": 7, "block_size": 5},
        {"cache_bytes": bytes_for, "max_model_len": 56},
        {"cache_bytes": bytes_for, "max_model_len": 56, "prefix_caching": False},
    ):
        llm = tiny_llm(name, **options)
        assert ids(llm.generate(batch, GREEDY)) == want, options
        if "cache_bytes" in options:
            assert llm.stats().preemptions > 0
        drained(llm)


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 17])
def test_chunk_sizes(chunk: int) -> None:
    batch = prompts(4, seed=3)
    want = [greedy(tiny_decoder(), prompt, 12) for prompt in batch]
    llm = tiny_llm(max_batch_tokens=chunk, max_sequences=min(chunk, 8))
    assert ids(llm.generate(batch, GREEDY)) == want
    drained(llm)


def test_int8_cache_stays_close() -> None:
    batch = prompts(4, seed=4)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    exact, coded = tiny_llm().generate(batch, params), tiny_llm(kv="int8").generate(batch, params)
    mixed = tiny_llm(kv=["full", "int8"]).generate(batch, params)
    for other in (coded, mixed):
        for a, b in zip(exact, other, strict=True):
            first = [next(iter(o.outputs[0].logprobs[0].values())).logprob for o in (a, b)]
            assert first[0] == pytest.approx(first[1], abs=0.3)


@pytest.mark.parametrize("kv", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["sliding-sinks", "mla"])
def test_16_bit_caches_write_the_same_however_the_work_is_scheduled(name: str, kv: str) -> None:
    """Chunked, from the prefix cache, preempted and computed again: what was stored decides."""
    batch = prompts(5)
    plain = tiny_llm(name, kv=kv)
    want = ids(plain.generate(batch, GREEDY))
    assert ids(plain.generate(batch, GREEDY)) == want
    assert plain.stats().prefix_hit_tokens > 0
    drained(plain)
    small = {"cache_bytes": plain.memory.block_bytes * 9, "max_model_len": 56}
    for options in ({"max_batch_tokens": 7, "max_sequences": 7, "block_size": 5}, small):
        llm = tiny_llm(name, kv=kv, **options)
        assert ids(llm.generate(batch, GREEDY)) == want, options
        assert "cache_bytes" not in options or llm.stats().preemptions > 0
        drained(llm)
    half = plain.memory.block_bytes * 2 == tiny_llm(name).memory.block_bytes
    assert half


def test_samples_fork_from_one_prompt() -> None:
    llm = tiny_llm()
    prompt = prompts(1, longest=30)[0] * 2
    params = SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate([prompt], params)
    texts = [tuple(o.token_ids) for o in output.outputs]
    assert [o.index for o in output.outputs] == list(range(5))
    assert len(set(texts)) > 1
    assert llm.stats().prompt_tokens == len(prompt)  # computed once
    drained(llm)
    greedy_params = SamplingParams(n=3, temperature=0, max_tokens=10, ignore_eos=True)
    (same,) = llm.generate([prompt], greedy_params)
    want = greedy(tiny_decoder(), prompt, 10)
    assert [o.token_ids for o in same.outputs] == [want] * 3
    small = tiny_llm(cache_bytes=llm.memory.block_bytes * 9, max_model_len=72)
    (again,) = small.generate([prompt], params)
    assert [tuple(o.token_ids) for o in again.outputs] == texts
    drained(small)


def test_seed_decides_whatever_else_runs() -> None:
    prompt = prompts(1)[0]
    params = SamplingParams(
        temperature=1.0, top_p=0.95, top_k=100, seed=11, max_tokens=16, ignore_eos=True
    )
    alone = ids(tiny_llm().generate([prompt], params))[0]
    crowd = [SamplingParams(temperature=1.3, max_tokens=9, ignore_eos=True)] * 6
    for options in (
        {},
        {"max_batch_tokens": 9, "max_sequences": 9},
        {"cache_bytes": tiny_llm().memory.block_bytes * 9, "max_model_len": 60},
        {"seed": 99, "prefix_caching": False},
    ):
        llm = tiny_llm(**options)
        outputs = llm.generate([*prompts(6, seed=5), prompt], [*crowd, params])
        assert ids(outputs)[-1] == alone, options
    other = SamplingParams(**{**params.__dict__, "seed": 12})
    assert ids(tiny_llm().generate([prompt], other))[0] != alone


def test_engine_seed_reproduces_unseeded_requests() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    runs = [ids(tiny_llm(seed=seed).generate(prompts(3), params)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    tiny_llm().generate([[1, 2]], SamplingParams(max_tokens=4))
    assert torch.equal(torch.rand(3), want)


def test_context_limit_ends_the_text() -> None:
    llm = tiny_llm(max_model_len=20)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([[1] * 13], params)
    assert len(output.outputs[0].token_ids) == 7
    assert output.outputs[0].finish_reason == "length"
    (last,) = llm.generate([[1] * 19], params)
    assert len(last.outputs[0].token_ids) == 1
    drained(llm)


def test_logprobs_are_the_models() -> None:
    prompt = prompts(1, seed=8, longest=50)[0] + [5, 6, 7]
    params = SamplingParams(
        temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    for options in ({}, {"max_batch_tokens": 5, "max_sequences": 2}):
        llm = tiny_llm(**options)
        llm.generate([prompt], GREEDY)  # a prefix that must not be skipped
        (output,) = llm.generate([prompt], params)
        tokens = prompt + output.outputs[0].token_ids
        decoder = tiny_decoder()
        with torch.inference_mode():
            batch = PackedBatch.from_lengths([len(tokens)])
            want = decoder.logits(decoder(torch.tensor(tokens), batch)).log_softmax(-1)
        entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
        assert entries[0] is None
        assert len(entries) == len(tokens)
        for position, entry in enumerate(entries[1:], start=1):
            row = want[position - 1]
            top = 2 if position < len(prompt) else 3
            assert next(iter(entry)) == tokens[position]
            assert set(row.topk(top).indices.tolist()) <= set(entry)
            for token, found in entry.items():
                assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert found.rank == int((row > row[token]).sum()) + 1
                assert found.text == byte_tokenizer().decode([token])


def test_scoring_without_generating() -> None:
    llm = tiny_llm(max_model_len=32)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = llm.generate([[3] * 32], params)
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason == "length"
    assert len(output.prompt_logprobs) == 32
    drained(llm)


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([1] * 256, {}, "256 tokens"),
        ([1, VOCAB], {}, "vocabulary"),
        ([1, -1], {}, "vocabulary"),
        ([1], {"n": 9}, "max_sequences"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    ],
)
def test_bad_requests_leave_nothing_behind(prompt, params, match) -> None:
    llm = tiny_llm()
    with pytest.raises(RequestError, match=match):
        llm.generate([[1, 2], prompt] if not isinstance(prompt, str) else prompt,
                     SamplingParams(**params))  # fmt: skip
    drained(llm)
    assert llm.stats().steps == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 1.5), ("temperature", -1), ("temperature", float("nan")), ("top_k", -1),
        ("top_p", 0), ("top_p", 1.1), ("min_p", 2), ("repetition_penalty", 5e-324),
        ("max_tokens", -1), ("min_tokens", 200), ("seed", "x"), ("seed", True),
        ("stop", ["", "a"]), ("stop", 3),
        ("stop_token_ids", [-1]), ("logprobs", -1), ("logit_bias", [1]),
        ("logit_bias", {1: float("inf")}), ("logit_bias", {"a": 1}), ("choice", []),
        ("json_schema", "{"), ("regex", 3), ("presence_penalty", None),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_the_smallest_numbers_are_nearly_greedy(field: str) -> None:
    llm = tiny_llm()
    greedy = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=6))[0]
    tiny = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, **{field: 5e-324}))[0]
    assert tiny.outputs[0].token_ids == greedy.outputs[0].token_ids


def test_bad_engine_options() -> None:
    decoder = tiny_decoder()
    with pytest.raises(ConfigError, match="max_model_len is 300"):
        LLM(decoder, max_model_len=300)
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        LLM(decoder, max_batch_tokens=4, max_sequences=5)
    with pytest.raises(CacheError, match="bytes are needed"):
        LLM(decoder, cache_bytes=1000)
    with pytest.raises(ConfigError, match="block_size"):
        LLM(decoder, block_size=0)
    with pytest.raises(RequestError, match="no tokenizer"):
        LLM(decoder).generate("text")
    with pytest.raises(RequestError, match="2 sampling parameters for 1"):
        LLM(decoder).generate([[1]], [GREEDY, GREEDY])


@pytest.mark.parametrize("prompts", [None, 3, {"a": 1}, [1, "a"], [[1, 2.5]], [None]])
def test_what_is_no_prompt_is_refused(prompts: object) -> None:
    with pytest.raises(RequestError, match=r"a list of (token ids|prompts), got"):
        tiny_llm().generate(prompts)  # type: ignore[arg-type]


def test_the_decoder_returns_the_rows_whose_logits_are_wanted() -> None:
    decoder, tokens = tiny_decoder(), torch.arange(1, 8)
    every = decoder(tokens, PackedBatch.from_lengths([4, 3]))
    batch = PackedBatch.from_lengths([4, 3])
    batch.logits_rows = torch.tensor([3, 6])
    torch.testing.assert_close(decoder(tokens, batch), every[[3, 6]])
    assert decoder(tokens, batch, pre_norm=True).shape == every.shape


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    """Whatever class its config names; a broken one is told of."""
    byte_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    config.write_text(json.dumps(values))
    llm = LLM(tiny_decoder(), tokenizer=tmp_path)
    assert type(llm.tokenizer).__name__ == type(byte_tokenizer()).__name__
    assert llm.encode("the cat") == byte_tokenizer()("the cat")["input_ids"]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        LLM(tiny_decoder(), tokenizer=tmp_path)


def test_chat_uses_the_template() -> None:
    llm = tiny_llm()
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "[user] hi\n[assistant] "
    assert output.prompt_token_ids == byte_tokenizer()(output.prompt)["input_ids"]
    assert len(llm.chat([messages, messages], GREEDY)) == 2
    with pytest.raises(RequestError, match="chat template"):
        LLM(tiny_decoder()).chat(messages)
    with pytest.raises(RequestError, match="dict with a role"):
        llm.chat([{"role": "user", "content": "a"}, "not a message"], GREEDY)


def test_a_failing_model_cancels_everything_and_goes_on(monkeypatch) -> None:
    llm = tiny_llm()
    llm.engine.add_request([1, 2, 3], GREEDY)
    llm.engine.step()
    monkeypatch.setattr(llm.engine.runner, "run", lambda work: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate([[4, 5]], GREEDY)
    drained(llm)
    monkeypatch.undo()
    assert ids(llm.generate([[4, 5]], GREEDY)) == [greedy(tiny_decoder(), [4, 5], 12)]


def test_nan_logits_end_one_request_only(monkeypatch) -> None:
    llm = tiny_llm()
    run = llm.engine.runner.run

    def poisoned(work):
        logits = run(work).clone()
        logits[0] = float("nan")
        return logits

    monkeypatch.setattr(llm.engine.runner, "run", poisoned)
    outputs = llm.generate([[1, 2], [3, 4]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert outputs[0].outputs[0].finish_reason == "abort"
    assert "not finite" in outputs[0].outputs[0].stop_reason
    drained(llm)
