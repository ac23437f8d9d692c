"""Bad input, on an app without a model: every answer is a 4xx in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from serval.errors import RequestError
from serval.server.app import create_app
from serval.server.state import AppOptions
from tests.server.scripted import ScriptedBackend

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def backend(tokenizer: Any) -> ScriptedBackend:
    return ScriptedBackend(tokenizer, ["Good", " day"])


@pytest.fixture
def client(backend: ScriptedBackend) -> TestClient:
    return TestClient(create_app(backend), raise_server_exceptions=False)


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {**HELLO, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        (CHAT, {**HELLO, "temperature": "hot"}, "temperature", "number"),
        (CHAT, {**HELLO, "temperature": -1}, "temperature", "greater than or equal to 0"),
        (CHAT, {**HELLO, "n": 0}, "n", "greater than or equal to 1"),
        (CHAT, {**HELLO, "n": 1.5}, "n", "integer"),
        (CHAT, {**HELLO, "stop": ["a"] * 17}, "stop", "16"),
        (CHAT, {**HELLO, "stop": ""}, "stop", "at least 1"),
        (CHAT, {**HELLO, "top_logprobs": 3}, "top_logprobs", "logprobs"),
        (CHAT, {**HELLO, "logit_bias": {"cat": 1}}, "logit_bias", "'cat'"),
        (CHAT, {**HELLO, "logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
        (CHAT, {**HELLO, "tool_choice": "required"}, "tool_choice", "needs tools"),
        (CHAT, {**HELLO, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (CHAT, {**HELLO, "max_tokens": 1000}, "max_tokens", "context"),
        (CHAT, {**HELLO, "max_tokens": 5, "min_tokens": 6}, "min_tokens", "more than"),
        (CHAT, {**HELLO, "response_format": {"type": "xml"}}, "response_format", "json_object"),
        (CHAT, {**HELLO, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "t"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages", "role"),
        (CHAT, {"messages": "hello"}, "messages", "list"),
        (COMPLETE, {}, "prompt", "required"),
        (COMPLETE, {"prompt": ""}, "prompt", "empty"),
        (COMPLETE, {"prompt": []}, "prompt", "at least 1"),
        (COMPLETE, {"prompt": [1, "a"]}, "prompt", "integer"),
        (COMPLETE, {"prompt": [99999]}, "prompt", "vocabulary"),
        (COMPLETE, {"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        (COMPLETE, {"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        (COMPLETE, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        (COMPLETE, {"prompt": "a", "logprobs": 21}, "logprobs", "20"),
        (COMPLETE, {"prompt": "a" * 4000}, None, "context"),
        (COMPLETE, {"prompt": "a", "n": 128, "stream": False, "max_tokens": 0}, "max_tokens", "1"),
        ("/tokenize", {}, "prompt", "either"),
        ("/tokenize", {"prompt": "a", "structured_outputs": {}}, "structured_outputs", "unknown"),
        (CHAT, {**HELLO, "tool_choice": {"type": "x"}}, "tool_choice", "function"),
        (CHAT, {**HELLO, "stream_options": {"usage": True}}, "stream_options", "unknown field"),
        (CHAT, {**HELLO, "str": 1}, "str", "unknown field 'str'"),
        ("/detokenize", {"tokens": [99999]}, "tokens", "vocabulary"),
    ],
)
def test_bad_fields_are_named(
    client: TestClient, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(client.post(path, json=body), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": 100000000000000000000000}',
        b'{"prompt": "a\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "model": "\\ud800"}',
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETE, "/tokenize", "/detokenize"])
def test_malformed_bodies(client: TestClient, path: str, raw: bytes) -> None:
    response = client.post(path, content=raw, headers={"content-type": "application/json"})
    error_of(response, 400)


def test_lone_surrogates_inside_free_form_fields(client: TestClient) -> None:
    body = (
        '{"messages": [{"role": "user", "content": "x", "extra": "\\ud800"}], "tools": '
        '[{"type": "function", "function": {"name": "f", "parameters": {"a": "\\ud800"}}}]}'
    )
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400)


def test_unknown_model(client: TestClient) -> None:
    for response in (
        client.post(CHAT, json={**HELLO, "model": "gpt-9"}),
        client.post(COMPLETE, json={"prompt": "a", "model": "gpt-9"}),
        client.get("/v1/models/gpt-9"),
    ):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert "'serval'" in error["message"]


def test_unknown_route_and_method(client: TestClient) -> None:
    assert "/openapi.json" in error_of(client.get("/v2/anything"), 404)["message"]
    response = client.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_wrong_content_type(client: TestClient) -> None:
    response = client.post(CHAT, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    error_of(response, 400)


def test_images_are_refused(client: TestClient) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:..."}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert "text only" in error_of(client.post(CHAT, json=body), 400)["message"]


def test_template_errors_are_the_clients(tokenizer: Any) -> None:
    options = AppOptions(chat_template="{{ raise_exception('roles must alternate') }}")
    app = create_app(ScriptedBackend(tokenizer, ["a"]), options)
    error = error_of(TestClient(app).post(CHAT, json=HELLO), 400)
    assert "roles must alternate" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_engine_refusals_are_400(
    client: TestClient, backend: ScriptedBackend, stream: bool
) -> None:
    backend.refusal = RequestError("the schema is wrong")
    error = error_of(client.post(CHAT, json={**HELLO, "stream": stream}), 400)
    assert error["message"] == "the schema is wrong"


def test_unexpected_failures_are_500_without_details(
    client: TestClient, backend: ScriptedBackend
) -> None:
    backend.failure = ZeroDivisionError("secret detail")
    error = error_of(client.post(CHAT, json=HELLO), 500)
    assert "secret" not in error["message"]
    text = client.post(CHAT, json={**HELLO, "stream": True}).text
    assert '"error"' in text
    assert "secret" not in text
    assert text.endswith("data: [DONE]\n\n")


def test_api_key(tokenizer: Any) -> None:
    options = AppOptions(api_keys=("first", "second"))
    client = TestClient(create_app(ScriptedBackend(tokenizer, ["a"]), options))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
        response = client.post(CHAT, json=HELLO, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        error_of(client.get("/v1/models", headers=headers), 401)
        error_of(client.post("/tokenize", json={"prompt": "a"}, headers=headers), 401)
    for key in options.api_keys:
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post(CHAT, json=HELLO, headers=headers).status_code == 200
    for path in ("/", "/health", "/metrics", "/stats", "/openapi.json"):
        assert client.get(path).status_code == 200


def test_body_limit(tokenizer: Any) -> None:
    options = AppOptions(max_body_bytes=2000)
    client = TestClient(create_app(ScriptedBackend(tokenizer, ["a"]), options))
    big = {"prompt": "a" * 3000}
    assert error_of(client.post(COMPLETE, json=big), 413)["code"] == "body_too_large"

    def chunks() -> Any:
        yield json.dumps(big).encode()

    headers = {"content-type": "application/json"}
    error_of(client.post(COMPLETE, content=chunks(), headers=headers), 413)


def test_queue_limit(tokenizer: Any) -> None:
    app = create_app(ScriptedBackend(tokenizer, ["a"]), AppOptions(max_in_flight=4))
    client = TestClient(app)
    error = error_of(client.post(CHAT, json={**HELLO, "n": 5}), 400)
    assert "at most 4" in error["message"]
    with app.state.serval.admission.admit(3):
        response = client.post(CHAT, json={**HELLO, "n": 2})
        assert error_of(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"] == "1"
        assert client.post(CHAT, json=HELLO).status_code == 200
    app.state.serval.admission.draining = True
    error_of(client.post(CHAT, json=HELLO), 503)
    error_of(client.get("/health"), 503)


def test_request_token_limit(tokenizer: Any, backend: ScriptedBackend) -> None:
    client = TestClient(create_app(backend, AppOptions(max_tokens=20)))
    assert (
        "at most 20"
        in error_of(client.post(CHAT, json={**HELLO, "max_tokens": 21}), 400)["message"]
    )
    client.post(CHAT, json=HELLO)
    assert backend.seen[-1]["max_tokens"] == 20
