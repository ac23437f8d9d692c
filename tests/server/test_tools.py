"""Tool calls are found however the text is cut, and text that is none stays content."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serval.errors import RequestError
from serval.server.app import create_app
from serval.server.tools import ToolParser, forced_call_schema
from tests.server.scripted import ScriptedBackend

WEATHER = '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}'
HERMES = f"<tool_call>\n{WEATHER}\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": {"city": "Köln"}}'


def parse(text: str, cuts: list[int]) -> tuple[str, list[tuple[str, Any]]]:
    parser = ToolParser(["weather"])
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    content, calls = "", []
    for start, end in pairwise(edges):
        more, found = parser.push(text[start:end])
        content, calls = content + more, calls + found
    more, found = parser.finish()
    return content + more, [(c.name, json.loads(c.arguments)) for c in calls + found]


CALL = ("weather", {"city": "Köln", "days": 2})
CASES = [
    ("plain text", "plain text", []),
    (HERMES, "", [CALL]),
    (f"Let me look.\n{HERMES}", "Let me look.\n", [CALL]),
    (f"{HERMES}\n{HERMES}", "", [CALL, CALL]),
    (f"a < b {HERMES} done", "a < b  done", [CALL]),
    (f"<tool_call>\n{WEATHER}", "", [CALL]),
    ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ("<tool_call>{", "<tool_call>{", []),
    ("<tool", "<tool", []),
    ("", "", []),
    (LLAMA, "", [("weather", {"city": "Köln"})]),
    (f"<|python_tag|>{LLAMA}", "", [("weather", {"city": "Köln"})]),
    (f"{LLAMA}; {LLAMA}", "", [("weather", {"city": "Köln"})] * 2),
    (f"[{LLAMA}, {LLAMA}]", "", [("weather", {"city": "Köln"})] * 2),
    ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ("[1, 2]", "[1, 2]", []),
    ("{" * 5000, "{" * 5000, []),
    (f"  {LLAMA}", "", [("weather", {"city": "Köln"})]),
]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_whole_texts(text: str, content: str, calls: list[Any]) -> None:
    assert parse(text, []) == (content, calls)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CASES[:10] + CASES[10:-2]), st.lists(st.integers(0, 120), max_size=12))
def test_cuts_change_nothing(case: tuple[str, str, list[Any]], cuts: list[int]) -> None:
    text, content, calls = case
    assert parse(text, cuts) == (content, calls)


def test_forced_schema() -> None:
    def tool(name: str) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}

    one = forced_call_schema([tool("a"), tool("b")], "b")
    assert one["properties"]["name"] == {"const": "b"}
    assert len(forced_call_schema([tool("a"), tool("b")], None)["anyOf"]) == 2


def test_definitions_move_to_the_root() -> None:
    def tool(name: str, legs: int) -> dict[str, Any]:
        parameters = {
            "properties": {"c": {"$ref": "#/$defs/Cat"}},
            "$defs": {"Cat": {"enum": [legs]}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    schema = forced_call_schema([tool("a", 4), tool("b", 4)], None)
    assert schema["$defs"] == {"Cat": {"enum": [4]}}
    assert "$defs" not in schema["anyOf"][0]["properties"]["arguments"]
    with pytest.raises(RequestError, match="Cat"):
        forced_call_schema([tool("a", 4), tool("b", 3)], None)


def test_json_that_is_no_call_is_not_held_back() -> None:
    parser = ToolParser(["weather"])
    assert parser.push('{"ans') == ('{"ans', [])
    assert parser.push('wer": [1') == ('wer": [1', [])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
BODY = {"messages": [{"role": "user", "content": "Weather?"}]}


@pytest.fixture
def client(tokenizer: Any) -> TestClient:
    pieces = ["I'll look. ", "<tool_", "call>\n" + WEATHER[:20], WEATHER[20:], "\n</tool_call>", ""]
    return TestClient(create_app(ScriptedBackend(tokenizer, pieces)))


def test_answer_with_calls(client: TestClient) -> None:
    choice = client.post("/v1/chat/completions", json={**BODY, "tools": TOOLS}).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I'll look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln", "days": 2}


@pytest.mark.parametrize("extra", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_the_text_is_untouched(client: TestClient, extra: dict[str, Any]) -> None:
    choice = client.post("/v1/chat/completions", json={**BODY, **extra}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "<tool_call>" in choice["message"]["content"]
    assert "tool_calls" not in choice["message"]


def test_streamed_calls(client: TestClient) -> None:
    body = {**BODY, "tools": TOOLS, "stream": True}
    content, calls, reasons = "", [], []
    for line in client.post("/v1/chat/completions", json=body).text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            content += choice["delta"].get("content") or ""
            calls += choice["delta"].get("tool_calls", [])
            reasons.append(choice["finish_reason"])
    assert content.strip() == "I'll look."
    assert [call["index"] for call in calls] == [0]
    assert json.loads(calls[0]["function"]["arguments"])["days"] == 2
    assert reasons[-1] == "tool_calls"


def test_demanded_call_constrains_the_output(tokenizer: Any) -> None:
    backend = ScriptedBackend(tokenizer, [LLAMA.replace("parameters", "arguments")])
    client = TestClient(create_app(backend))
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        body = {**BODY, "tools": TOOLS, "tool_choice": choice}
        answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert answer["message"]["tool_calls"][0]["function"]["name"] == "weather"
        assert backend.seen[-1]["json_schema"]["properties"]["name"] == {"const": "weather"}
    wrong = {"type": "function", "function": {"name": "nothing"}}
    body = {**BODY, "tools": TOOLS, "tool_choice": wrong}
    assert client.post("/v1/chat/completions", json=body).status_code == 400
