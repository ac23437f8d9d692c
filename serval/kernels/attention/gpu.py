"""Paged attention for GPUs (Triton)."""

from __future__ import annotations

from typing import Any


def available() -> bool:
    """Whether Triton can be imported."""
    return False


def paged_attention(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError
