"""The real `openai` client against the real engine."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from tests.server.live import LiveServer

MESSAGES: Any = [{"role": "user", "content": "Which cat jumps the highest?"}]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 12


def test_seed_decides_the_text(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=24, seed=seed, temperature=1.0
        )
        return answer.choices[0].message.content

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_stream_equals_whole(client: openai.OpenAI) -> None:
    arguments: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 40,
        "seed": 5,
        "n": 3,
        "temperature": 1.5,
    }
    whole = client.chat.completions.create(**arguments)
    texts, reasons, usage = [""] * 3, [""] * 3, None
    stream = client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat_logprobs(client: openai.OpenAI) -> None:
    arguments: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 10,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 4,
    }
    choice = client.chat.completions.create(**arguments).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    streamed = []
    for chunk in client.chat.completions.create(**arguments, stream=True):
        for part in chunk.choices:
            streamed += (part.logprobs.content or []) if part.logprobs else []
    assert [e.token for e in streamed] == [e.token for e in entries]
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-4
    text = b"".join(bytes(e.bytes or []) for e in entries).decode("utf-8", "replace")
    assert choice.message.content is not None
    assert text.startswith(choice.message.content)


def test_completion_shapes(client: openai.OpenAI) -> None:
    for prompt, count in (
        ("The serval", 1),
        (["The serval", "def mean"], 2),
        ([1, 2, 3], 1),
        ([[1, 2, 3], [4, 5]], 2),
    ):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, n=2)
        assert [c.index for c in answer.choices] == list(range(2 * count))


def test_many_prompts_keep_their_order(client: openai.OpenAI) -> None:
    prompts = [f"cat {i}" for i in range(9)]
    batch = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0)
    singles = [
        client.completions.create(model="tiny", prompt=p, max_tokens=6, temperature=0)
        for p in prompts
    ]
    assert [c.text for c in batch.choices] == [s.choices[0].text for s in singles]
    texts = [""] * 9
    for chunk in client.completions.create(
        model="tiny", prompt=prompts, max_tokens=6, temperature=0, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in batch.choices]


def test_echo_and_prompt_logprobs(client: openai.OpenAI) -> None:
    text = "The serval jumps"
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=3, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith(text)
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens).startswith(text)
    assert answer.usage is not None
    assert len(found.tokens) == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        if offset < len(text):
            assert text[offset:].startswith(token)


def test_stop_strings_and_bias(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="cat", max_tokens=30, temperature=0)
    text = free.choices[0].text
    stop = text[5:7]
    answer = client.completions.create(
        model="tiny", prompt="cat", max_tokens=30, temperature=0, stop=[stop, "never"]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    biased = client.completions.create(
        model="tiny", prompt="cat", max_tokens=5, logit_bias={"70": 100}, logprobs=0
    )
    assert biased.choices[0].logprobs is not None
    assert len(set(biased.choices[0].logprobs.tokens or [])) == 1


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"cat": {"enum": ["serval", "lynx"]}, "legs": {"enum": [4]}},
        "required": ["cat", "legs"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=120,
        temperature=1.0,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["legs"] == 4
    for extra, allowed in (
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
        ({"structured_outputs": {"regex": "(a|b)c"}}, ("ac", "bc")),
    ):
        chosen = client.completions.create(
            model="tiny", prompt="cat?", max_tokens=9, extra_body=extra
        )
        assert chosen.choices[0].text in allowed


def test_demanded_tool_call(client: openai.OpenAI) -> None:
    size = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tools: Any = [{"type": "function", "function": {"name": "jump", "parameters": size}}]
    size["additionalProperties"] = False
    for choice in ("required", {"type": "function", "function": {"name": "jump"}}):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=tools, tool_choice=choice, max_tokens=150
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "jump"
        assert json.loads(call.function.arguments)["n"] in (1, 2)


def test_cached_tokens(client: openai.OpenAI) -> None:
    prompt = "The serval is a wild cat of Africa. " * 8
    counts = []
    for _ in range(2):
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        counts.append(usage.prompt_tokens_details.cached_tokens or 0)
    assert counts[1] >= 32


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.completions.create(model="tiny", prompt="cat " * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="constraint"):
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )


@pytest.mark.anyio
async def test_async_client(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=200, stream=True
        )
        async for _ in stream:
            break
        await stream.close()
    server.check_integrity()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
