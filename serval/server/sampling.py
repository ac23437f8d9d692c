"""From request fields to the engine's sampling parameters."""

from __future__ import annotations

from typing import Any

from serval.server.errors import bad_request
from serval.server.protocol import (
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
)
from serval.server.text import TextCodec


def sampling_fields(request: Generation, codec: TextCodec, max_tokens: int) -> dict[str, Any]:
    """Fields of `SamplingParams` that `request` sets; those it leaves out keep their defaults.

    Raises APIError 400 for a logit bias or stop token outside the vocabulary, and for two output
    constraints at once.
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens}
    for name in (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    ):
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if fields.get("top_k", 0) < 0:
        fields["top_k"] = 0  # vLLM's -1: all tokens
    if fields.get("top_p") == 0:  # OpenAI allows 0: only the most likely token is left
        del fields["top_p"]
        fields["top_k"] = 1
    if request.stop is not None:
        fields["stop"] = [request.stop] if isinstance(request.stop, str) else list(request.stop)
    if request.stop_token_ids is not None:
        for token in request.stop_token_ids:
            codec.check_id(token, "stop_token_ids")
        fields["stop_token_ids"] = list(request.stop_token_ids)
    if request.logit_bias:
        fields["logit_bias"] = _logit_bias(request.logit_bias, codec)
    if request.min_tokens is not None and request.min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens is {request.min_tokens}, more than the {max_tokens} tokens allowed",
            "min_tokens",
        )
    fields.update(_constraint(request))
    return fields


def _logit_bias(bias: dict[str, float], codec: TextCodec) -> dict[int, float]:
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise bad_request(f"logit_bias: keys are token ids, got {key!r}", "logit_bias")
        codec.check_id(int(key), "logit_bias")
        found[int(key)] = float(value)
    return found


def _constraint(request: Generation) -> dict[str, Any]:
    """At most one of json_schema, regex and choice."""
    chosen: list[dict[str, Any]] = []
    form = request.response_format
    if isinstance(form, JsonObjectFormat):
        chosen.append({"json_schema": {"type": "object"}})
    elif isinstance(form, JsonSchemaFormat):
        chosen.append({"json_schema": form.json_schema.schema_ or {"type": "object"}})
    structured = request.structured_outputs
    if structured is not None:
        if structured.json_schema is not None:
            chosen.append({"json_schema": structured.json_schema})
        if structured.regex is not None:
            chosen.append({"regex": structured.regex})
        if structured.choice is not None:
            chosen.append({"choice": structured.choice})
    if len(chosen) > 1:
        raise bad_request(
            "give one output constraint: response_format or one field of structured_outputs",
            "response_format",
        )
    return chosen[0] if chosen else {}
