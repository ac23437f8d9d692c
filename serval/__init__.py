"""Serval: an efficiency stack for long-context language models.

One decoder, one KV cache, one engine, one trainer. The names below load on first use, so that
``import serval`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "serval.engine.llm",
    "SamplingParams": "serval.engine.request",
    "Decoder": "serval.models.decoder",
    "ModelConfig": "serval.models.config",
}

__all__ = ["LLM", "Decoder", "ModelConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'serval' has no attribute {name!r}")
