"""Tokens as bytes, templates, and long texts off the event loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serval.server.app import create_app
from serval.server.protocol import ChatMessage, Tool
from serval.server.state import AppOptions
from serval.server.text import TextCodec
from tests.server.scripted import ScriptedBackend


@pytest.fixture(scope="module")
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40).filter(lambda t: "<|" not in t))
def test_bytes_of_tokens_join_to_the_text(codec: TextCodec, text: str) -> None:
    ids = asyncio.run(codec.encode(text, special_tokens=False, param="prompt"))
    assert b"".join(map(codec.token_bytes, ids)) == text.encode()


def test_special_tokens_have_their_text(codec: TextCodec, tokenizer: Any) -> None:
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert codec.token_bytes(token) == b"<|im_end|>"


def test_roundtrip_over_http(tokenizer: Any) -> None:
    client = TestClient(create_app(ScriptedBackend(tokenizer, ["a"])))
    text = "The serval jumps. 猫 🐈"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    tokens = client.post("/tokenize", json=chat).json()["tokens"]
    shown = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert shown == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_what_a_template_sees(tokenizer: Any) -> None:
    source = (
        "{{ tools[0]['function']['name'] }}|"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %};{% endfor %}"
    )
    codec = TextCodec(tokenizer, source)
    calls = [{"function": {"name": "f", "arguments": '{"city": "Köln"}'}}]
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    tool = Tool.model_validate({"type": "function", "function": {"name": "f"}})
    parsed = [ChatMessage.model_validate(m) for m in messages]
    prompt, _ = asyncio.run(codec.encode_chat(parsed, [tool]))
    assert prompt == "f|system:rules;user:a\nb;assistant:Köln;tool:sunny;"


def test_no_template_says_what_to_do(tokenizer: Any) -> None:
    app = create_app(ScriptedBackend(tokenizer, ["a"]))
    app.state.serval.codec.chat_template = None
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    response = TestClient(app).post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "--chat-template" in response.json()["error"]["message"]


def test_templates_cannot_leave_their_sandbox(tokenizer: Any) -> None:
    options = AppOptions(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    client = TestClient(create_app(ScriptedBackend(tokenizer, ["a"]), options))
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 400


def test_long_prompts_do_not_block_the_loop(codec: TextCodec) -> None:
    text = "The serval is a wild cat of Africa. " * 20_000

    async def longest_pause() -> float:
        worst, done = 0.0, False

        async def watch() -> None:
            nonlocal worst
            while not done:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst = max(worst, time.perf_counter() - before)

        watcher = asyncio.create_task(watch())
        began = time.perf_counter()
        await codec.encode(text, special_tokens=False, param="prompt")
        took = time.perf_counter() - began
        done = True
        await watcher
        return worst / took

    assert asyncio.run(longest_pause()) < 0.7
