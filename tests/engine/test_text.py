"""From tokens to text: characters over several tokens, stop strings, constrained output."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serval import SamplingParams
from serval.engine.constrained import ConstraintCompiler
from serval.engine.detokenizer import Detokenizer, decode_function, find_stop, held_back
from serval.engine.request import Delta
from serval.errors import RequestError

from .helpers import VOCAB, byte_tokenizer, tiny_llm

DECODE = decode_function(byte_tokenizer())


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_pieces_join_to_the_text(text: str) -> None:
    tokens = byte_tokenizer()(text)["input_ids"]
    detokenizer = Detokenizer(DECODE)
    pieces = [detokenizer.add(token) for token in tokens]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join([*pieces, detokenizer.finish()]) == detokenizer.text == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=120))
def test_any_tokens_give_the_text_of_decoding_them_at_once(tokens: list[int]) -> None:
    detokenizer = Detokenizer(DECODE)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join([*pieces, detokenizer.finish()]) == DECODE(tokens)


def test_the_window_stays_small() -> None:
    for tokens in ([5] * 3000, [200] * 3000, byte_tokenizer()("añ€😀" * 500)["input_ids"]):
        detokenizer = Detokenizer(DECODE)
        longest = 0
        for token in tokens:
            detokenizer.add(token)
            longest = max(longest, len(detokenizer._window))
        detokenizer.finish()
        assert detokenizer.text == DECODE(tokens)
        assert longest < 40


def test_unfinished_character_at_the_end() -> None:
    tokens = byte_tokenizer()("ok €")["input_ids"][:-1]
    detokenizer = Detokenizer(DECODE)
    assert "".join(map(detokenizer.add, tokens)) == "ok "
    assert detokenizer.finish() == "\ufffd"


def test_find_stop_and_held_back() -> None:
    assert find_stop("hello world", 0, ["wor", "lo"]) == (3, "lo")
    assert find_stop("abcabc", 4, ["abc"]) == (3, "abc")  # only what ends after the start
    assert find_stop("abc", 0, ["x"]) is None
    assert held_back("hello wo", ["world", "lol"]) == 2
    assert held_back("hello", ["world"]) == 0
    assert held_back("aa", ["aab"]) == 2


def run_with_stops(text: str, stop: list[str], **options) -> tuple[str, list[str], object]:
    """Force `text` through a grammar, with stop strings; returns text, streamed pieces, reason."""
    llm = tiny_llm()
    deltas: list[Delta] = []
    params = SamplingParams(
        temperature=0, choice=[text + "\x00end"], stop=stop, max_tokens=200, **options
    )
    request = llm.engine.add_request([1, 2, 3], params, on_delta=deltas.append)
    while not llm.engine.idle:
        llm.engine.step()
    output = llm.engine.output(request).outputs[0]
    assert "".join(delta.text for delta in deltas) == output.text
    assert deltas[-1].finish_reason == output.finish_reason
    assert llm.memory.manager.used_blocks == 0
    return output.text, [delta.text for delta in deltas], output.stop_reason


@pytest.mark.parametrize("stop", ["there", "er", "the other", "\x00", "re is", "n", "é€"])
def test_stop_strings_across_token_boundaries(stop: str) -> None:
    text = "what is on the other station: there is a test é€ and then"
    got, pieces, reason = run_with_stops(text, [stop, "\x00end"])
    full = text + "\x00end"
    assert got == full[: full.index(stop)]
    assert reason == stop
    assert all(stop not in piece for piece in pieces)
    kept, _, _ = run_with_stops(text, [stop], include_stop_str_in_output=True)
    assert kept == full[: full.index(stop) + len(stop)]


def test_streamed_pieces_hold_back_a_started_stop_string() -> None:
    text, pieces, _ = run_with_stops("abcabd", ["abd"])
    assert text == "abc"
    assert not any(text.startswith("abcab") for text in ["".join(pieces)])
    _, pieces, reason = run_with_stops("abcab", ["abd"])  # it never comes: nothing is lost
    assert "".join(pieces) == "abcab\x00end"
    assert reason is None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_json_schema() -> None:
    llm = tiny_llm()
    params = [
        SamplingParams(json_schema=SCHEMA, seed=seed, temperature=1.0, max_tokens=200)
        for seed in range(8)
    ]
    outputs = llm.generate([[seed, 5, 6] for seed in range(8)], params)
    complete = 0
    for output in outputs:
        if output.outputs[0].finish_reason == "length":
            continue  # a random model may write spaces until the end
        complete += 1
        value = json.loads(output.outputs[0].text)
        assert set(value) == {"name", "age", "tags"}
        assert 0 <= value["age"] <= 120
        assert len(value["name"]) <= 12
        assert set(value["tags"]) <= {"a", "b"}
    assert complete >= 6
    text = json.dumps(SCHEMA)
    again = llm.generate([[0, 5, 6]], SamplingParams(json_schema=text, seed=0, max_tokens=200))
    assert again[0].outputs[0].text == outputs[0].outputs[0].text


def test_regex_choice_grammar_and_samples() -> None:
    llm = tiny_llm()
    common = {"temperature": 1.0, "max_tokens": 60}
    regex = SamplingParams(regex=r"[a-c]{3,6}-\d{4}é", n=4, seed=1, **common)
    choices = ["yes", "no (maybe)", "é+[x]", "a-b", "a b#c&d~e"]
    choice = SamplingParams(choice=choices, n=6, seed=1, **common)
    grammar = SamplingParams(grammar='start: "x" ("y" | "z")+ "!"', n=2, seed=2, **common)
    outputs = llm.generate([[1, 2], [3], [4]], [regex, choice, grammar])
    for output in outputs[0].outputs:
        assert re.fullmatch(r"[a-c]{3,6}-\d{4}é", output.text)
        assert output.finish_reason == "stop"
    assert len({output.text for output in outputs[0].outputs}) > 1
    assert {output.text for output in outputs[1].outputs} <= set(choices)
    for output in outputs[2].outputs:
        assert re.fullmatch(r"x[yz]+!", output.text) or output.finish_reason == "length"
    for text in choices:
        (output,) = llm.generate([[1]], SamplingParams(choice=[text]))
        assert output.outputs[0].text == text


def test_json_object_under_preemption() -> None:
    llm = tiny_llm()
    small = tiny_llm(cache_bytes=llm.memory.block_bytes * 11, max_model_len=88)
    params = [SamplingParams(json_object=True, seed=s, max_tokens=60) for s in range(5)]
    batch = [[s, 1, 2] for s in range(5)]
    want = [o.outputs[0].text for o in llm.generate(batch, params)]
    assert [o.outputs[0].text for o in small.generate(batch, params)] == want
    assert small.stats().preemptions > 0
    assert all(text.startswith("{") for text in want)


def test_min_tokens_yields_to_a_finished_grammar() -> None:
    (output,) = tiny_llm().generate([[1]], SamplingParams(choice=["no"], min_tokens=50))
    assert output.outputs[0].text == "no"


def deep_schema(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "(unclosed"},
        {"grammar": "start: missing_rule"},
        {"json_schema": {"type": "no-such-type"}},
        {"json_schema": {"type": "object", "properties": 3}},
        {"json_schema": {"$ref": "file:///etc/passwd"}},
        {"json_schema": {"type": {1, 2}}},
        {"json_schema": deep_schema(3000)},
        {"regex": "(" * 50_000 + ")" * 50_000},
        {"choice": ["\ud800"]},
    ],
)
def test_invalid_grammars_are_refused(options: dict) -> None:
    llm = tiny_llm()
    with pytest.raises(RequestError, match="constraint is invalid"):
        llm.generate([[1]], SamplingParams(**options))
    assert not llm.engine.requests


@pytest.mark.parametrize(
    ("regex", "why"), [("(unclosed", "unclosed group"), ("(?=x)a", "look-around.*not supported")]
)
def test_an_invalid_regex_is_told_why(regex: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        tiny_llm().generate([[1]], SamplingParams(regex=regex))
    assert "\n" not in str(caught.value)


def test_hostile_text_is_refused() -> None:
    with pytest.raises(RequestError, match="json_schema is not valid JSON"):
        SamplingParams(json_schema="[" * 100_000)
    with pytest.raises(RequestError, match="cannot be tokenised"):
        tiny_llm().generate("\ud800")


def test_constraints_need_a_fast_tokenizer() -> None:
    with pytest.raises(RequestError, match="fast tokenizer"):
        ConstraintCompiler(object(), 10, [0]).compile(SamplingParams(regex="a"))
