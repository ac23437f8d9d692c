"""Commands that measure: quality, attention, shares of the cache, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serval.cli import arguments
from serval.cli.app import Json, Layout, Model, Policy, TextField, app


@app.command(name="eval")
def evaluate(
    model: Model,
    kv: Layout = "full",
    policy: Policy = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text: a folder, file or JSONL (default: stdlib).")
    ] = None,
    text_field: TextField = "text",
    text_tokens: Annotated[
        int, typer.Option(help="Tokens scored for perplexity; 0: none.")
    ] = 32768,
    window: Annotated[
        int | None, typer.Option(help="Tokens of one window of text (default: up to 2048).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens scored per window, overlapping (default: all).")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Retrieval tasks, comma-separated; '' for none.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Context lengths in tokens, comma-separated.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Questions per length and depth band.")] = 4,
    depths: Annotated[int, typer.Option(help="Depth bands of each length.")] = 5,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare next-token predictions with.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="lm-evaluation-harness tasks, comma-separated.")
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(help="Questions of each lm-eval task (default: all).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and plots.")] = None,
    json_path: Json = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated tasks.")] = 0,
) -> None:
    """Measure perplexity on held-out text and retrieval from long contexts."""
    from serval.evaluate import EvalOptions, report, run
    from serval.evaluate.progress import progress_bar

    chosen = {} if tasks is None else {"tasks": arguments.names(tasks)}
    options = EvalOptions(
        model,
        kv=kv,
        policy=policy,
        text=text,
        text_field=text_field,
        text_tokens=text_tokens,
        window=window,
        stride=stride,
        lengths=None if lengths is None else arguments.integers("--lengths", lengths),
        samples=samples,
        depths=depths,
        reference=reference,
        lm_eval=arguments.names(lm_eval or ""),
        lm_eval_limit=lm_eval_limit,
        seed=seed,
        **chosen,  # type: ignore[arg-type]
    )
    with progress_bar(Console(stderr=True)) as progress:
        result = run(options, progress)
    report.print_result(result)
    if out is not None:
        for path in report.write(result, out):
            print(f"wrote {path}")
    if json_path is not None:
        report.write_json(result.to_dict(), json_path)


@app.command()
def inspect(
    model: Model,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("inspect.html"),
    pictures: Annotated[
        Path | None, typer.Option(help="Also write every figure as PNG into this folder.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text: a folder, file or JSONL (default: held-out text).")
    ] = None,
    text_field: TextField = "text",
    sequences: Annotated[int, typer.Option(help="Sequences to look at.")] = 8,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each (default: 512, or what fits).")
    ] = None,
    rate_sequences: Annotated[
        int, typer.Option(help="Sequences of 64 tokens for the sink rate.")
    ] = 100,
    epsilon: Annotated[float, typer.Option(help="Weight from which a token is a sink.")] = 0.3,
    tau: Annotated[
        float | None, typer.Option(help="Times the mean mass that make a sink (default: tokens/8).")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the quantised cache that is tried.")] = 2,
    json_path: Json = None,
    seed: Annotated[int, typer.Option(help="Which parts of the text.")] = 0,
) -> None:
    """Show where a model's attention goes: sinks, outliers, and what depends on them."""
    from serval.analyze import InspectOptions, report, run
    from serval.evaluate.progress import progress_bar
    from serval.evaluate.report import write_json

    options = InspectOptions(
        model,
        text=text,
        text_field=text_field,
        sequences=sequences,
        tokens=tokens,
        rate_sequences=rate_sequences,
        epsilon=epsilon,
        tau=tau,
        bits=bits,
        seed=seed,
    )
    with progress_bar(Console(stderr=True)) as progress:
        result = run(options, progress)
    for line in report.summary(result):
        print(line)
    print(f"wrote {report.write(result, out)}")
    if pictures is not None:
        for path in report.write_pictures(result, pictures):
            print(f"wrote {path}")
    if json_path is not None:
        write_json(result.to_dict(), json_path)


@app.command(name="profile-kv")
def profile_kv(
    model: Model,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    keep: Annotated[float, typer.Option(help="Fraction of keys and values to keep.")] = 0.2,
    text: Annotated[
        str | None, typer.Option(help="Text: a folder, file or JSONL (default: stdlib).")
    ] = None,
    text_field: TextField = "text",
    samples: Annotated[int, typer.Option(help="Pieces of text to measure.")] = 10,
    length: Annotated[
        int | None, typer.Option(help="Tokens of each (default: up to 1024).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of text.")] = 0,
) -> None:
    """Measure PrefixKV's shares per layer once, for --policy prefixkv:keep=...,profile=FILE."""
    from serval.cache.policies.profile import check_target
    from serval.evaluate.cache_profile import ProfileOptions, print_shares, run
    from serval.evaluate.progress import progress_bar

    check_target(out)  # before minutes of work
    options = ProfileOptions(
        model, f"prefixkv:keep={keep}", text, text_field, samples, length, seed
    )
    with progress_bar(Console(stderr=True)) as progress:
        found = run(options, progress)
    print_shares(found)
    found.profile.write(out)
    print(f"wrote {out}; use it with --policy prefixkv:keep={keep},profile={out}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, 'all', or 'table' (see --readme).")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="For 'table': result files; of FILE:TEXT, cases whose name has TEXT."),
    ] = None,
    json_path: Json = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes, to see that it works.")] = False,
    only: Annotated[str | None, typer.Option(help="Cases whose name contains this.")] = None,
    readme: Annotated[
        Path | None, typer.Option(help="For 'table': the file to update (default: README.md).")
    ] = None,
) -> None:
    """Run a benchmark: a peer and Serval in turn, with ratio, spread and fraction of the floor."""
    from serval.bench import run_command

    run_command(name, files or [], readme, json_path, quick, only)
