"""The command line: one verb per command; it parses, calls and prints, with no logic of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serval import __version__, arguments
from serval.errors import ServalError

app = typer.Typer(
    name="serval",
    help="Train, compress, evaluate and serve long-context language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint directory or Hugging Face hub name.")]
Policy = Annotated[
    str | None, typer.Option(help="What the cache keeps, as in prefixkv:keep=0.2 (default: all).")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]
Layout = Annotated[str, typer.Option("--kv", help="Cache layout; see `serval methods`.")]
TextField = Annotated[str, typer.Option(help="Field of JSONL or Parquet texts.")]
Force = Annotated[bool, typer.Option(help="Replace a checkpoint at --out.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an earlier run's state.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"serval {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors meant for the user become one line on stderr and exit code 2."""
    try:
        app()
    except ServalError as error:
        print(f"serval: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train, compress, evaluate and serve long-context language models."""


@app.command()
def quickstart(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to use (default: assets/serval-tiny).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and the models made.")] = Path(
        "quickstart-out"
    ),
    server: Annotated[bool, typer.Option(help="Serve the result and complete a prompt.")] = True,
) -> None:
    """Evaluate a small model, compress it, compare before and after, and serve it."""
    from serval.quickstart import QuickstartOptions, run

    run(QuickstartOptions(model, out, serve=server))


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
    fresh: Fresh = False,
) -> None:
    """Train a model from a recipe, resuming an interrupted run; works under torchrun too."""
    from serval.train.run import run

    result = run(recipe, overrides=override or [], fresh=fresh)
    if result.interrupted:
        sys.exit(130)


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set adapter.rank=32")
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Fine-tune a model on conversations or completions: all weights, LoRA or AFA-LoRA."""
    from serval.adapt.tune import run

    result = run(recipe, overrides=override or [], fresh=fresh)
    if result.interrupted:
        sys.exit(130)


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="PEFT LoRA adapter directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    force: Force = False,
) -> None:
    """Merge a LoRA adapter into a checkpoint's weights."""
    from serval.adapt.merging import merge_checkpoint

    print(f"wrote {merge_checkpoint(model, adapter, out, force=force)}")


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
    from serval.evaluate.cache_profile import ProfileOptions, print_shares, run
    from serval.evaluate.progress import progress_bar

    options = ProfileOptions(
        model, f"prefixkv:keep={keep}", text, text_field, samples, length, seed
    )
    with progress_bar(Console(stderr=True)) as progress:
        found = run(options, progress)
    print_shares(found)
    found.profile.write(out)
    print(f"wrote {out}; use it with --policy prefixkv:keep={keep},profile={out}")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    weights: Annotated[str, typer.Option(help="Method; see `serval methods`.")] = "int8",
    bits: Annotated[int | None, typer.Option(help="4 or 8 (default: the method's).")] = None,
    group_size: Annotated[
        str | None, typer.Option(help="Inputs that share a scale, or 'channel'.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="token, static or none (float activations).")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="float or integer group scales.")] = None,
    head: Annotated[
        int | None, typer.Option(help="8 or 4: bits of the output head (and a tied embedding).")
    ] = None,
    embedding: Annotated[
        int | None, typer.Option(help="8 or 4: bits of an embedding that is not the head too.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Shell pattern of matrices to keep in float.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="Other scheme by pattern: '*down_proj:bits=8'.")
    ] = None,
    rotate: Annotated[str | None, typer.Option(help="Rotation before it, e.g. hadamard.")] = None,
    format: Annotated[
        str | None, typer.Option(help="pack-quantized or int-quantized (default: by bits).")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Text (file, folder, JSONL), 'stdlib', 'self' or 'random'.")
    ] = "stdlib",
    text_field: TextField = "text",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the calibration samples.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method: --set damping=0.1")
    ] = None,
    force: Force = False,
    json_path: Json = None,
) -> None:
    """Quantise a checkpoint's weights, block by block, into a standard checkpoint directory.

    An interrupted run goes on when it is started again."""
    from serval.compress import Calibration, CompressOptions, report, run
    from serval.evaluate.progress import progress_bar
    from serval.evaluate.report import write_json

    options = CompressOptions(
        model,
        out,
        weights=weights,
        bits=bits,
        group_size=group_size,
        activations=activations,  # type: ignore[arg-type]  # checked with the method
        scales=scales,  # type: ignore[arg-type]
        head=head,
        embedding=embedding,
        ignore=ignore or [],
        overrides=override or [],
        rotate=rotate,
        format=format,  # type: ignore[arg-type]
        calibration=Calibration(calibration, samples, length, text_field, seed),
        settings=arguments.settings("--set", settings or []),
        force=force,
    )
    errors = Console(stderr=True)
    try:
        with progress_bar(errors) as progress:
            result = run(
                options,
                lambda done, total, name: progress("compressing", done, total),
                lambda line: errors.print(line, highlight=False),
            )
    except KeyboardInterrupt:
        print("serval: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    for part in report.summary(result, options):
        Console().print(part, highlight=False, soft_wrap=True)
    if json_path is not None:
        write_json(result.to_dict(), json_path)


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    method: Annotated[str, typer.Option(help="Method; see `serval methods`.")] = "maskprune",
    keep: Annotated[
        float | None, typer.Option(help="Share of the budget that stays (default: 0.65).")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="parameters of the model, of its blocks, or flops of a token.")
    ] = "parameters",
    context: Annotated[
        int | None, typer.Option(help="Tokens at which flops count (default: half the context).")
    ] = None,
    multiple: Annotated[int, typer.Option(help="Channels stay in multiples of this.")] = 8,
    key_value_heads: Annotated[
        int | None, typer.Option(help="Heads to keep, instead of a budget.")
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Channels to keep, instead of a budget.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps, recovery included; 0: none.")] = 300,
    batch_rows: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    micro_batch_rows: Annotated[int, typer.Option(help="Rows computed at a time.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    data: Annotated[
        str | None,
        typer.Option(help="Text (file, folder, JSONL), stdlib, self, random or recipe."),
    ] = None,
    text_field: TextField = "text",
    calibration_rows: Annotated[int, typer.Option(help="Rows that rank the units.")] = 32,
    lora_rank: Annotated[int, typer.Option(help="Rank of the updates; 0: masks only.")] = 16,
    lora_lr: Annotated[float, typer.Option(help="Learning rate of the updates.")] = 1e-3,
    distillation: Annotated[
        float, typer.Option(help="Weight of the divergence from the original.")
    ] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16 products.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of data, updates and random choice.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the method: --set ramp=0.4")
    ] = None,
    force: Force = False,
    json_path: Json = None,
) -> None:
    """Remove heads and channels, the same number in every layer, and recover by distillation.

    An interrupted run goes on when it is started again."""
    from serval.compress.maskprune import PruneOptions, run
    from serval.compress.maskprune.pipeline import summary
    from serval.evaluate.progress import progress_bar
    from serval.evaluate.report import write_json

    options = PruneOptions(
        model,
        out,
        method=method,
        keep=keep,
        budget=budget,  # type: ignore[arg-type]  # checked with the model
        context=context,
        multiple=multiple,
        key_value_heads=key_value_heads,
        intermediate_size=intermediate_size,
        steps=steps,
        batch_rows=batch_rows,
        micro_batch_rows=micro_batch_rows,
        calibration_rows=calibration_rows,
        lora_rank=lora_rank,
        lora_lr=lora_lr,
        distillation=distillation,
        dtype=dtype,
        seed=seed,
        settings=arguments.settings("--set", settings or []),
        data=data,
        length=length,
        text_field=text_field,
        force=force,
    )
    errors = Console(stderr=True)
    try:
        with progress_bar(errors) as progress:
            result = run(
                options,
                lambda done, total: progress("pruning", done, total),
                lambda line: errors.print(line, highlight=False),
            )
    except KeyboardInterrupt:
        print("serval: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    for line in summary(result):
        print(line)
    if json_path is not None:
        write_json(result.to_dict(), json_path)


@app.command()
def export(
    model: Model,
    gguf: Annotated[str, typer.Option(help="Type of the matrices: q4_0, q8_0, f16 or f32.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    force: Annotated[bool, typer.Option(help="Replace a file at --out.")] = False,
    json_path: Json = None,
) -> None:
    """Write a float checkpoint as a GGUF file for llama.cpp."""
    from serval.compress.gguf_file import export
    from serval.evaluate.report import write_json

    result = export(model, out, gguf, force)
    print(
        f"wrote {result.path}: {result.bytes / 1e6:.1f} MB, {result.tensors} tensors, matrices in "
        f"{result.kind}, {result.seconds:.1f} s"
    )
    if json_path is not None:
        write_json({**vars(result), "path": str(result.path)}, json_path)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for clients; may be given several times.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="SERVAL_API_KEY", help="Require this key.")
    ] = None,
    kv: Layout = "full",
    policy: Policy = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    cache_bytes: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="Sequences computed together.")] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Rows of one step, at least --max-sequences.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per cache block.")] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the cache of prompts that start alike.")
    ] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option(help="For requests that bring no seed.")] = 0,
    max_in_flight: Annotated[
        int, typer.Option(help="Sequences running or waiting; more get 429.")
    ] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="Larger bodies get 413.")] = 8 * 2**20,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of one answer.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file to use instead.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIRECTORY of a LoRA adapter, chosen as model; repeatable."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="Time running requests get after SIGTERM.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model behind an OpenAI-compatible API, with a chat page at /."""
    from serval.server.serve import ServeOptions, run

    options = ServeOptions(
        model,
        host=host,
        port=port,
        served_model_name=served_model_name or [],
        api_key=api_key or [],
        kv=kv,
        policy=policy,
        max_model_len=max_model_len,
        cache_bytes=cache_bytes,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        block_size=block_size,
        prefix_caching=prefix_caching,
        dtype=dtype,
        seed=seed,
        max_in_flight=max_in_flight,
        max_body_bytes=max_body_bytes,
        max_tokens=max_tokens,
        chat_template=chat_template,
        lora=lora or [],
        drain_seconds=drain_seconds,
        log_level=log_level,
    )
    sys.exit(run(options))


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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    kv: Layout = "full",
    policy: Policy = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt and print the text."""
    from serval import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    print(LLM(model, kv=kv, policy=policy).generate(prompt, params)[0].outputs[0].text)


if __name__ == "__main__":
    main()
