"""Errors that speak to the user: what was given, what was expected, what to do."""

from __future__ import annotations


class ServalError(Exception):
    """Base of every error that is meant for the user; the command line prints it in one line."""


class ConfigError(ServalError):
    """A configuration, recipe or option is wrong; the message names its key."""


class CheckpointError(ServalError):
    """A checkpoint is missing, malformed or does not fit; the message names its tensor or file."""


class DataError(ServalError):
    """Training or evaluation data is missing, empty or malformed."""


class CacheError(ServalError):
    """The KV cache cannot hold what was asked of it."""


class RequestError(ServalError):
    """A generation request is invalid; the server answers 400 with this text."""


class EngineStoppedError(ServalError):
    """The engine's thread has ended; nothing can be generated until the process starts anew."""


class MissingExtraError(ServalError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'serval-llm[{extra}]'")
