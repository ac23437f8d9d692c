"""Tool calls in a model's text, for requests that brought tools.

Two conventions are read:

- Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several allowed,
  text before and between them stays content;
- Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, optionally after
  `<|python_tag|>`, several separated by `;` or in a list; names must be among the request's tools.

Text that only looks like a call, but does not parse, is delivered as content.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from serval.errors import RequestError

OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
_FIRST_KEYS = ('"name"', '"type"', '"id"', '"parameters"', '"arguments"')  # of a Llama-style call


@dataclass
class Call:
    """One tool call; `arguments` is JSON text, as in OpenAI's API."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_dict(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolParser:
    """Splits a growing text into content that may be shown and finished tool calls.

    Feed every piece of text to `push`, then call `finish`; both return (content, calls). Content is
    held back only while it may turn out to be part of a call.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.held = ""
        self.whole = True  # nothing delivered yet: the answer may be one Llama-style JSON call
        self.any_call = False
        self.gap = True  # no text yet since the beginning or the last call: blanks are held back

    def push(self, text: str) -> tuple[str, list[Call]]:
        self.held += text
        if self.whole and self._may_be_llama():
            return "", []
        content, calls = self._scan()
        if content or calls:
            self.whole = False
        self.any_call = self.any_call or bool(calls)
        return content, calls

    def finish(self) -> tuple[str, list[Call]]:
        rest, self.held = self.held, ""
        if self.whole and (calls := self._llama_calls(rest)):
            self.any_call = True
            return "", calls
        if OPEN in rest:  # the closing tag may have been a stop token
            before, _, body = rest.partition(OPEN)
            call = _hermes_call(body)
            if call is not None:
                self.any_call = True
                return before, [call]
        return ("" if self.any_call and not rest.strip() else rest), []

    def _may_be_llama(self) -> bool:
        start = self.held.lstrip()
        if not start or start.startswith((PYTHON_TAG[: len(start)], PYTHON_TAG)):
            return True
        if start[0] == "[":
            start = start[1:].lstrip()
        if start[:1] not in ("", "{"):
            return False
        key = start[1:].lstrip()
        return any(key.startswith(name[: len(key)]) for name in _FIRST_KEYS)

    def _scan(self) -> tuple[str, list[Call]]:
        content: list[str] = []
        calls: list[Call] = []
        while (at := self.held.find(OPEN)) >= 0:
            before = self.held[:at]
            if before.strip() or not self.gap:
                content.append(before)
            self.gap = self.gap and not before.strip()
            self.held = self.held[at:]
            end = self.held.find(CLOSE)
            if end < 0:
                return "".join(content), calls
            end += len(CLOSE)
            call = _hermes_call(self.held[len(OPEN) : end - len(CLOSE)])
            if call is None:
                content.append(self.held[:end])
                self.gap = False
            else:
                calls.append(call)
                self.gap = True
            self.held = self.held[end:]
        cut = len(self.held) - _overlap(self.held, OPEN)
        if self.held[:cut].strip() or not self.gap:
            content.append(self.held[:cut])
            self.gap = self.gap and not self.held[:cut].strip()
            self.held = self.held[cut:]
        return "".join(content), calls

    def _llama_calls(self, text: str) -> list[Call]:
        body = text.strip().removeprefix(PYTHON_TAG).strip()
        if not body or body[0] not in "{[":
            return []
        decoder = json.JSONDecoder()
        found: list[Any] = []
        try:
            while body:
                value, end = decoder.raw_decode(body)
                found.extend(value if isinstance(value, list) else [value])
                body = body[end:].lstrip(" \n\t;")
        except (ValueError, RecursionError):
            return []
        calls = [_call_from(value) for value in found]
        if not calls or any(call is None or call.name not in self.names for call in calls):
            return []
        return [call for call in calls if call is not None]


def _hermes_call(body: str) -> Call | None:
    try:
        value, _ = json.JSONDecoder().raw_decode(body.strip())
    except (ValueError, RecursionError):
        return None
    return _call_from(value)


def _call_from(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` are a proper beginning of `marker`."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


def forced_call_schema(tools: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """JSON schema of `{"name": ..., "arguments": ...}` for one tool, or any of them.

    `tools` are OpenAI tool objects; `name` picks one of them. Used with constrained decoding when a
    request demands a call. Raises RequestError when their definitions collide.
    """
    variants = []
    shared: dict[str, dict[str, Any]] = {}  # references point to the schema's root
    for tool in tools:
        function = tool["function"]
        if name is not None and function["name"] != name:
            continue
        parameters = dict(function.get("parameters") or {"type": "object"})
        for key in ("$defs", "definitions"):
            for label, definition in (parameters.pop(key, None) or {}).items():
                if shared.setdefault(key, {}).setdefault(label, definition) != definition:
                    raise RequestError(
                        f"two tools define {key}/{label} differently; rename one of the two"
                    )
        variants.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    whole = variants[0] if len(variants) == 1 else {"anyOf": variants}
    return {**whole, **shared}
