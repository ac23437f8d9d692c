"""The two places parts of a decoder can come from: a checkpoint on disk, or the decoder itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from serval.compress.blockwise import Part, PartReport, Samples
from serval.compress.install import empty_module, installed, place
from serval.compress.storage import Storage
from serval.compress.targets import Target, forget, replace, targets
from serval.compress.workspace import Workspace
from serval.models.checkpoint.reading import OpenCheckpoint
from serval.models.checkpoint.writing import part_tensors
from serval.models.config import ModelConfig
from serval.models.decoder import Decoder
from serval.models.layers import Linear

Finished = Callable[[Part, PartReport], None]


class MemoryStore:
    """A decoder with its weights in memory, changed in place. dtype: of what stays in float."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self.decoder, self.dtype = decoder, dtype

    def load(self, path: str, dtype: torch.dtype | None = None) -> None:
        if dtype is not None:
            self.decoder.get_submodule(path).to(dtype)

    def finish(self, part: Part, done: PartReport, samples: Samples) -> None:
        for path in part.paths:
            self.decoder.get_submodule(path).to(self.dtype)

    def resume(self, part: Part) -> None:
        return None


class CheckpointStore:
    """A checkpoint on disk, whose finished parts go to a workspace.

    The decoder of `opened` must be on the meta device; a part of it has storage only while it is
    worked on. Afterwards its quantised modules are there, without values. finished: is told of
    each part, those of an earlier run included.
    """

    def __init__(
        self,
        opened: OpenCheckpoint,
        workspace: Workspace,
        dtype: torch.dtype,
        finished: Finished | None = None,
    ) -> None:
        self.opened, self.workspace, self.dtype = opened, workspace, dtype
        self.finished = finished
        self.decoder = opened.decoder
        self.targets = list(targets(self.decoder))

    def load(self, path: str, dtype: torch.dtype | None = None) -> None:
        if path == "lm_head" and self.opened.tied:
            self.opened.fill("embed_tokens", dtype)
            assert isinstance(self.decoder.lm_head, nn.Linear)
            self.decoder.lm_head.weight = self.decoder.embed_tokens.weight
            forget(self.decoder.embed_tokens)
        else:
            self.opened.fill(path, dtype)

    def finish(self, part: Part, done: PartReport, samples: Samples) -> None:
        family = self.opened.family
        tensors = [
            tensor
            for path in part.paths
            for tensor in part_tensors(self.decoder, family, self.dtype, path)
        ]
        linears, tables = installed(self.decoder)
        names = {name for t in self._targets_in(part) for name in t.checkpoint_modules()}
        storages = {name: s for name, s in {**linears, **tables}.items() if name in names}
        self.workspace.add(part, tensors, done, storages, samples)
        self._empty(part, storages)
        if self.finished is not None:
            self.finished(part, done)

    def resume(self, part: Part) -> tuple[PartReport, Samples | None] | None:
        report = self.workspace.report(part)
        if report is None:
            return None
        self._empty(part, self.workspace.storages(part))
        if self.finished is not None:
            self.finished(part, report)
        last = next(reversed(self.workspace.parts)) == part.name
        return report, self.workspace.samples() if last else None

    def _targets_in(self, part: Part) -> list[Target]:
        return [
            target
            for target in self.targets
            if any(target.path == p or target.path.startswith(f"{p}.") for p in part.paths)
        ]

    def _empty(self, part: Part, storages: dict[str, Storage]) -> None:
        for target in self._targets_in(part):
            names = target.checkpoint_modules()
            if names[0] in storages:
                place(self.decoder, target, empty_module(target, [storages[n] for n in names]))
        for path in part.paths:
            forget(self.decoder.get_submodule(path))


def untie(decoder: Decoder, config: ModelConfig) -> None:
    """Give `decoder`, whose config says it is tied, `config` and an output head of its own: a copy
    of its table, or on the meta device one without values."""
    if decoder.lm_head is None and not config.tie_word_embeddings:
        table = decoder.embed_tokens.weight
        head = Linear(table.shape[1], table.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
        replace(decoder, "lm_head", head)
    decoder.config = config
