"""The quickstart's steps, in order; each prints what it does and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.text import Text

from serval.engine.llm import LLM
from serval.errors import ServalError
from serval.evaluate import EvalOptions, Evaluator
from serval.evaluate.progress import progress_bar
from serval.evaluate.report import write_bytes, write_json
from serval.evaluate.shipped import shipped_model
from serval.models import checkpoint
from serval.quickstart import measures, page
from serval.quickstart.page import Completion
from serval.quickstart.serving import complete, serving
from serval.quickstart.variants import (
    BATCHES,
    VARIANTS,
    Outcome,
    Variant,
    add_speeds,
    make_checkpoint,
    make_engine,
    measure,
)

ASSET = "assets/serval-tiny"
PROMPT = 'def read_json(path):\n    """Read a JSON file and return its contents."""\n'


@dataclass
class QuickstartOptions:
    """model: checkpoint directory (None: the shipped one). out: where everything is written. The
    rest sets how much is measured; the defaults take about two minutes on two cores."""

    model: str | Path | None = None
    out: str | Path = "quickstart-out"
    tasks: Sequence[str] = ("needle", "key_value")
    lengths: Sequence[int] | None = None
    samples: int = 2
    text_tokens: int = 8192
    speed_prompt: int = 256
    speed_output: int = 48
    serve: bool = True
    variants: Sequence[Variant] = VARIANTS


def run(options: QuickstartOptions | None = None, console: Console | None = None) -> list[Outcome]:
    """Evaluate, compress, evaluate again, report, serve. Raises ServalError when a step fails."""
    options = options or QuickstartOptions()
    console = console or Console()
    start = perf_counter()
    model, out = find_model(options.model), Path(options.out)
    outcomes = _measure_all(options, model, out, console)
    console.print(measures.table(outcomes))
    completion = _serve(outcomes[-1], console) if options.serve else None
    commands = next_commands(str(model), outcomes[-1])
    text = page.render(model.name, outcomes, completion, commands, perf_counter() - start)
    report = write_bytes(text.encode(), out / "report.html")
    values = {"model": str(model), "outcomes": [outcome.to_dict() for outcome in outcomes]}
    numbers = write_json(values, out / "report.json")
    console.print(f"[bold]Report[/bold] {report} (numbers: {numbers})")
    console.print(f"\n[bold]Next[/bold] (all done in {perf_counter() - start:.0f} s)")
    for what, command in commands:
        console.print(Text(f"  # {what}", style="dim"))
        console.print(Text(f"  {command}"), soft_wrap=True)
    return outcomes


def _measure_all(
    options: QuickstartOptions, model: Path, out: Path, console: Console
) -> list[Outcome]:
    made: dict[str, Path] = {}
    evaluator = Evaluator(
        EvalOptions(
            model,
            text_tokens=options.text_tokens,
            window=512,
            tasks=tuple(options.tasks),
            lengths=options.lengths or _lengths(model),
            samples=options.samples,
        )
    )
    outcomes: list[Outcome] = []
    llms: list[LLM] = []
    for number, variant in enumerate(options.variants, start=1):
        with _timed(console, f"{number}. {variant.name}") as add:
            directory = made.get(variant.slug) or make_checkpoint(variant, model, out / "models")
            made[variant.slug] = directory
            llms.append(make_engine(variant, directory, evaluator.tokenizer))
            with progress_bar(console, "  ") as progress:
                outcomes.append(
                    measure(
                        variant,
                        directory,
                        llms[-1],
                        evaluator,
                        reference=llms[0].decoder if outcomes else None,
                        progress=progress,
                    )
                )
            add(_summary(outcomes[-1]))
    with _timed(console, f"{len(outcomes) + 1}. speed of all, in turn") as add:
        with progress_bar(console, "  ") as progress:
            add_speeds(
                outcomes,
                llms,
                prompt=options.speed_prompt,
                output=options.speed_output,
                progress=progress,
            )
        add(f"batch {' and '.join(map(str, BATCHES))}")
    return outcomes


def _summary(outcome: Outcome) -> str:
    parts = [f"{outcome.weight_bytes / 1e6:.1f} MB of weights"]
    if outcome.quality.text is not None:
        parts.append(f"perplexity {outcome.quality.text.perplexity:.2f}")
    if outcome.quality.cells:
        parts.append(f"retrieval {100 * outcome.quality.retrieval:.0f} %")
    return ", ".join(parts)


def _serve(outcome: Outcome, console: Console) -> Completion:
    arguments = ["--kv", outcome.variant.kv]
    text = []
    with serving(outcome.directory, arguments) as server:
        command = " ".join(server.command)
        console.print(f"[bold]Served[/bold] {command} → {server.url} in {server.seconds:.1f} s")
        console.print(Text(PROMPT, style="cyan"), end="")
        for piece in complete(server.url, PROMPT):
            text.append(piece)
            console.print(Text(piece), end="")
    console.print("\n[dim](server stopped)[/dim]")
    return Completion(PROMPT, "".join(text), command, server.seconds)


def next_commands(model: str, best: Outcome) -> list[tuple[str, str]]:
    """What to type next: (what it does, the command)."""
    directory, kv = best.directory, best.variant.kv
    return [
        (
            "serve the compressed model; the chat page is at the address it prints",
            f"serval serve {directory} --kv {kv}",
        ),
        (
            "measure more: all tasks, all lengths, more text",
            f"serval eval {directory} --kv {kv} --reference {model} --out eval-out",
        ),
        (
            "compress a model of your own (directory or Hugging Face name)",
            "serval compress MODEL --weights gptq --head 8 --out MODEL-w4a8",
        ),
        ("train a model like this one", "serval train recipes/tiny.yaml"),
        ("list every method by seam", "serval methods"),
    ]


def find_model(model: str | Path | None) -> Path:
    """The model's directory; the shipped one is looked for here and beside the package."""
    if model is not None:
        return checkpoint.locate(model)
    return shipped_model(ASSET)


def _lengths(model: Path) -> list[int]:
    """The model's context (at most 2048), half and a quarter of it."""
    context = min(checkpoint.read_config(model).max_position_embeddings, 2048)
    return sorted({length for length in (context // 4, context // 2, context) if length >= 64})


@contextmanager
def _timed(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Print a step's title, then, when it is done, its seconds and what was added."""
    start = perf_counter()
    notes: list[str] = []
    console.print(f"[bold]{title}[/bold]")
    try:
        yield notes.append
    except ServalError:
        console.print(f"  failed after {perf_counter() - start:.0f} s")
        raise
    console.print(f"  {'; '.join(notes)} [dim]({perf_counter() - start:.0f} s)[/dim]")
