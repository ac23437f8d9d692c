"""Commands that generate text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serval.cli.app import Layout, Model, Policy, app


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
