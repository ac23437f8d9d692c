"""The command line: one verb per command; it parses, calls and prints, with no logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serval.errors import ServalError

app = typer.Typer(
    name="serval",
    help="Train, compress, evaluate and serve long-context language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face hub name.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]


def main() -> None:
    """Entry point: errors meant for the user become one line on stderr and exit code 2."""
    try:
        app()
    except ServalError as error:
        print(f"serval: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def methods() -> None:
    """List every method by seam, with the paper behind it."""
    from serval.methods import print_methods

    print_methods()


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set train.steps=100")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run's state.")] = False,
) -> None:
    """Train a model from a recipe, resuming an interrupted run; works under torchrun too."""
    from serval.train.run import run

    result = run(recipe, overrides=override or [], fresh=fresh)
    if result.interrupted:
        sys.exit(130)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    kv: Annotated[str, typer.Option(help="Cache layout; see `serval methods`.")] = "full",
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt and print the text."""
    from serval import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    print(LLM(model, kv=kv).generate(prompt, params)[0].outputs[0].text)


if __name__ == "__main__":
    main()
