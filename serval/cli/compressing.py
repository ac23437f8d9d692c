"""Commands that make a checkpoint smaller or write it in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serval.cli import arguments
from serval.cli.app import Force, Json, Model, TextField, app, resumable


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
    with resumable(), progress_bar(errors) as progress:
        result = run(
            options,
            lambda done, total, name: progress("compressing", done, total),
            lambda line: errors.print(line, highlight=False),
        )
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
        int | None,
        typer.Option(help="Tokens at which a budget of flops counts (default: half the context)."),
    ] = None,
    multiple: Annotated[int, typer.Option(help="Channels stay in multiples of this.")] = 8,
    key_value_heads: Annotated[
        int | None, typer.Option(help="Heads to keep, instead of a budget.")
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Channels to keep, instead of a budget.")
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Training steps, recovery included: 0, or 10 and more.")
    ] = 300,
    batch_rows: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    micro_batch_rows: Annotated[int, typer.Option(help="Rows computed at a time.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a row (default: 512, or the whole context).")
    ] = None,
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
    with resumable(), progress_bar(errors) as progress:
        result = run(
            options,
            lambda done, total: progress("pruning", done, total),
            lambda line: errors.print(line, highlight=False),
        )
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
