"""All registries in one table: what can be switched on, by the name the command line takes."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from serval.registry import Entry

GENERATED = "generated task"

# seam -> (import path of its registry, how it is chosen)
SEAMS = {
    "checkpoint family": ("serval.models.checkpoint:FAMILIES", "config.json model_type"),
    "initializer": ("serval.models.initialize:INITIALIZERS", "recipe initializer"),
    "attention weights": (
        "serval.models.variants:ATTENTION_WEIGHTS",
        "recipe model.attention.weights",
    ),
    "attention gate": ("serval.models.variants:ATTENTION_GATES", "recipe model.attention.gate"),
    "cache layout": ("serval.cache.layouts:LAYOUTS", "serve --kv"),
    "cache policy": ("serval.cache.policies:POLICIES", "serve --policy"),
    "data source": ("serval.data.sources:SOURCES", "recipe data.source"),
    "optimizer": ("serval.optim:OPTIMIZERS", "recipe optimizer.name"),
    "trainer callback": ("serval.train.callbacks:CALLBACKS", "recipe callbacks"),
    "schedule": ("serval.optim:SCHEDULES", "recipe schedule.name"),
    "fine-tuning": ("serval.adapt:METHODS", "tune recipe method"),
    "weights": ("serval.compress:RECIPES", "compress --weights"),
    "rotation": ("serval.compress:ROTATIONS", "compress --rotate"),
    "pruning": ("serval.compress:PRUNERS", "prune --method"),
    "quantised format": ("serval.models.checkpoint:QUANTIZERS", "config.json quantization_config"),
    GENERATED: ("serval.data.synthetic:TRAINING_TASKS", "eval --tasks, recipe data.tasks"),
    "benchmark": ("serval.bench:BENCHES", "bench NAME"),
}


def registries() -> dict[str, Mapping[str, Entry]]:
    """Every seam's registry by the seam's name; a generated task is described by its function."""
    found = {seam: Entry(path, "").load() for seam, (path, _) in SEAMS.items()}
    tasks = {}
    for name, task in found[GENERATED].items():
        summary = " ".join((task.make.__doc__ or "").split()).partition(". ")[0].rstrip(".")
        tasks[name] = Entry(f"{task.make.__module__}:{task.make.__name__}", summary)
    return {**found, GENERATED: tasks}


def print_methods() -> None:
    """Print every method. Names and paper ids are never cut: they are what one types."""
    console = Console()
    for seam, registry in registries().items():
        console.print(f"[bold]{seam}[/bold], chosen by {SEAMS[seam][1]}")
        table = Table.grid(padding=(0, 2), pad_edge=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        table.add_column(no_wrap=True)
        for name, entry in registry.items():
            paper = f"arXiv {entry.paper}" if entry.paper else ""
            table.add_row(f"  {name}", entry.summary, paper)
        console.print(table)
