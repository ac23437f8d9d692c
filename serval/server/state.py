"""What the routes share: the engine, the model's name, counters and limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serval.server.backend import Backend
from serval.server.errors import APIError
from serval.server.limits import Admission
from serval.server.metrics import Metrics
from serval.server.text import TextCodec


@dataclass(frozen=True)
class AppOptions:
    """Options of the HTTP side; `serve.ServeOptions` adds those of engine and process.

    Args:
        model_names: names that requests may call the model by; answers use the first.
        adapters: names of the LoRA adapters, which are models of their own to clients.
        api_keys: any of these opens the API; none leaves it open.
        max_in_flight: sequences (prompts times n) accepted, running or waiting; more get 429.
        max_body_bytes: larger request bodies get 413.
        max_tokens: most tokens one answer may have; None: as many as the context holds.
        chat_template: Jinja source that replaces the tokenizer's chat template.
    """

    model_names: Sequence[str] = ("serval",)
    adapters: Sequence[str] = ()
    api_keys: Sequence[str] = ()
    max_in_flight: int = 256
    max_body_bytes: int = 8 * 2**20
    max_tokens: int | None = None
    chat_template: str | None = None
    body_timeout: float = 60.0


@dataclass
class State:
    """One per app; routes find it at `request.app.state.serval`."""

    backend: Backend
    options: AppOptions
    codec: TextCodec
    admission: Admission
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.options.model_names[0]

    @property
    def max_model_len(self) -> int:
        return self.backend.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raise APIError 404 unless `name` is this server's model or an adapter, or left out."""
        names = [*self.options.model_names, *self.options.adapters]
        if name is not None and name not in names:
            known = ", ".join(repr(n) for n in names)
            raise APIError(
                404,
                f"the model {name!r} does not exist here; this server has {known}",
                param="model",
                code="model_not_found",
            )

    def resolve(self, name: str | None) -> tuple[str, str | None]:
        """(the name that answers carry, the adapter to use) for the model a request names."""
        if name is not None and name in self.options.adapters:
            return name, name
        return self.model, None

    def stats(self) -> dict[str, Any]:
        """The engine's numbers plus what the page shows."""
        return {
            **self.backend.stats(),
            "in_flight": self.admission.in_flight,
            "draining": self.admission.draining,
            "model": self.model,
            "max_model_len": self.max_model_len,
        }
