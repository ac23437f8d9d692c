"""All registries in one table: what can be switched on, by the name the command line takes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from serval.registry import Entry

# seam -> (import path of its registry, how it is chosen)
SEAMS = {
    "checkpoint family": ("serval.models.checkpoint:FAMILIES", "config.json model_type"),
    "initializer": ("serval.models.initialize:INITIALIZERS", "recipe initializer"),
    "cache layout": ("serval.cache.layouts:LAYOUTS", "serve --kv"),
    "data source": ("serval.data.sources:SOURCES", "recipe data.source"),
    "optimizer": ("serval.optim:OPTIMIZERS", "recipe optimizer.name"),
    "schedule": ("serval.optim:SCHEDULES", "recipe schedule.name"),
    "weights": ("serval.compress:COMPRESSORS", "compress --weights"),
    "quantised format": ("serval.models.checkpoint:QUANTIZERS", "config.json quantization_config"),
    "benchmark": ("serval.bench:BENCHES", "bench NAME"),
}


def registries() -> dict[str, Mapping[str, Entry]]:
    """Every seam's registry by the seam's name."""
    return {seam: Entry(path, "").load() for seam, (path, _) in SEAMS.items()}


def print_methods() -> None:
    table = Table("seam", "name", "what it does", "paper", "chosen by")
    for seam, registry in registries().items():
        for i, (name, entry) in enumerate(registry.items()):
            first = i == 0
            chosen = SEAMS[seam][1] if first else ""
            table.add_row(seam if first else "", name, entry.summary, entry.paper, chosen)
        table.add_section()
    Console().print(table)
