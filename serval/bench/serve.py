"""32 streaming clients at once against `serval serve`, and the same load against the servers a user
would pick instead.

Every client asks for one completion after another over its own connection. A measured unit is one
generated token: wall seconds of the whole load over all tokens. The servers run one at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serval.bench.harness import Case, Contestant, Outcome, Sample, Setup, compare, paired_rounds
from serval.bench.servers import (
    Command,
    Server,
    ServerError,
    llama_cpp_command,
    serval_command,
    transformers_command,
)

PEERS: dict[str, Command] = {
    "transformers serve": transformers_command,
    "llama-cpp-python server": llama_cpp_command,
}


@dataclass
class Load:
    """What the clients ask for: `requests` each, prompts of about `prompt_chars` characters."""

    clients: int = 32
    requests: int = 2
    prompt_chars: int = 500
    max_tokens: int = 64

    def prompts(self) -> list[list[str]]:
        """Texts per client, no two alike."""
        from serval.data.sources import stdlib

        needed = self.clients * self.requests
        text = "".join(itertools.islice(stdlib(), 30))
        step = max(1, (len(text) - self.prompt_chars) // needed)
        parts = [text[i * step : i * step + self.prompt_chars] for i in range(needed)]
        return [parts[i :: self.clients] for i in range(self.clients)]


@dataclass
class Answer:
    """One streamed answer: when it was asked for, when each event came, how many tokens."""

    asked: float
    events: list[float] = field(default_factory=list)
    tokens: int = 0


async def stream_completion(port: int, body: dict[str, Any]) -> Answer:
    """POST /v1/completions with stream, over a new connection; raises ServerError.

    Written on bare sockets, since the client shares the machine with the server.
    """
    payload = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(head.encode() + payload)
        await writer.drain()
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"200":
            rest = await reader.read(2000)
            raise ServerError(f"the server answered {status[1:2]}: {rest[-300:]!r}")
        events: list[bytes] = []
        async for line in reader:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                answer.events.append(time.perf_counter())
                events.append(line[5:])
    finally:
        writer.close()
    _count(answer, [json.loads(event) for event in events], body["max_tokens"])
    return answer


def _count(answer: Answer, events: list[dict[str, Any]], max_tokens: int) -> None:
    """Drop events without text and count tokens: by usage, or the limit if that ended the text, or
    else one per event."""
    reason, usage = None, None
    kept = []
    for moment, event in zip(answer.events, events, strict=True):
        if "error" in event:
            raise ServerError(f"the server broke off: {event['error']}")
        usage = event.get("usage") or usage
        choices = event.get("choices") or []
        if choices:
            reason = choices[0].get("finish_reason") or reason
            if choices[0].get("text"):
                kept.append(moment)
    answer.events = kept
    if usage:
        answer.tokens = usage["completion_tokens"]
    else:
        answer.tokens = max_tokens if reason == "length" else len(kept)


async def run_load(port: int, model: str, load: Load) -> list[Answer]:
    """All clients at once; returns every answer."""

    async def client(prompts: list[str]) -> list[Answer]:
        answers = []
        for prompt in prompts:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": load.max_tokens,
                "temperature": 0,
                "stream_options": {"include_usage": True},
            }
            answers.append(await stream_completion(port, body))
        return answers

    found = await asyncio.gather(*(client(prompts) for prompts in load.prompts()))
    return [answer for answers in found for answer in answers]


def summarise(answers: list[Answer]) -> dict[str, float]:
    """Milliseconds to the first event and between events, 50th and 99th percentile over all."""
    first = [a.events[0] - a.asked for a in answers if a.events]
    gaps = [gap for a in answers for gap in np.diff(a.events).tolist()]
    result: dict[str, float] = {}
    for name, values in (("first_token", first), ("token", gaps)):
        for percent in (50, 99) if values else ():
            result[f"{name}_p{percent}_ms"] = 1000.0 * float(np.percentile(values, percent))
    return result


def measure_server(command: Command, model: str, threads: int, load: Load) -> Sample:
    """Start a server, warm it with one request, load it, end it."""
    with Server(command, model, threads) as server:
        warm = Load(1, 1, load.prompt_chars, 4)
        asyncio.run(run_load(server.port, server.model, warm))
        cpu, began = server.cpu_seconds(), time.perf_counter()
        try:
            answers = asyncio.run(run_load(server.port, server.model, load))
        except OSError as error:
            raise ServerError(f"the server went away ({error}): {server.log()}") from error
        wall = time.perf_counter() - began
        cpu = server.cpu_seconds() - cpu
        tokens = sum(answer.tokens for answer in answers)
        extra = {
            "tokens_per_second": tokens / wall,
            **summarise(answers),
            "start_seconds": server.start_seconds,
            "resident_gib": server.peak_bytes() / 2**30,
        }
    return Sample(wall / tokens, cpu / tokens, extra)


def collect(setup: Setup) -> list[Case]:
    """One case per peer."""
    import torch

    model, load, rounds = "llama-82m", Load(), 3
    if setup.quick:
        model, load, rounds = "tiny", Load(4, 1, 200, 8), 1
    case = f"float32-{model}-serve-{load.clients}clients-{load.max_tokens}tokens"
    if not setup.wants(case):
        return []
    setup.note(case)
    threads = torch.get_num_threads()

    def contestant(name: str, command: Command) -> Contestant:
        return Contestant(name, lambda: measure_server(command, model, threads, load))

    contestants = [contestant("serval serve", serval_command)]
    contestants += [contestant(name, command) for name, command in PEERS.items()]
    outcomes = paired_rounds(contestants, rounds, setup.note)
    ours = outcomes.pop("serval serve")
    return [compare(case, ours, peer, metrics=_metrics(ours, peer)) for peer in outcomes.values()]


def _metrics(ours: Outcome, peer: Outcome) -> dict[str, Any]:
    """Medians over rounds of everything a sample brought."""
    metrics: dict[str, Any] = {}
    for prefix, outcome in (("", ours), ("peer_", peer)):
        if outcome.samples:
            for key in outcome.samples[0].extra:
                values = [sample.extra[key] for sample in outcome.samples]
                metrics[prefix + key] = float(np.median(values))
    return metrics
