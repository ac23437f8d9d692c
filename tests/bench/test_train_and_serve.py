"""The train and serve benchmarks on tiny shapes: the same work on both sides, honest counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serval.bench.serve import Answer, Load, _count, measure_server, run_load, summarise
from serval.bench.servers import ServerError, serval_command
from serval.bench.shapes import TINY
from serval.bench.train import ServalTrainer, TransformersTrainer, Work

WORK = Work(TINY, length=32, rows=2)


def test_both_trainers_train_on_the_same_rows() -> None:
    pytest.importorskip("accelerate")
    ours, peer = ServalTrainer(WORK), TransformersTrainer(WORK)
    for trainer in (ours, peer):
        wall, cpu = trainer.steps(2)
        assert wall > 0
        assert cpu > 0
        assert len(trainer.clock.wall) == 3  # the first step is not counted
    assert ours.trainer.tokens_seen == 3 * WORK.tokens
    assert ours.trainer.step == 3
    data = WORK.data(8)
    assert data.shape == (8, 32)
    assert data.min() >= 0
    assert data.max() < TINY.vocab_size
    own = sum(p.numel() for p in ours.trainer.decoder.parameters())
    assert own == sum(p.numel() for p in peer.model.parameters())


def test_tokens_are_counted_by_usage_then_limit_then_events() -> None:
    def counted(events: list[dict[str, Any]]) -> Answer:
        answer = Answer(0.0, [float(i) for i in range(len(events))])
        _count(answer, events, 9)
        return answer

    text: dict[str, Any] = {"choices": [{"text": "a"}]}
    end: dict[str, Any] = {"choices": [{"text": "", "finish_reason": "length"}]}
    assert counted([text, end, {"choices": [], "usage": {"completion_tokens": 7}}]).tokens == 7
    assert counted([text, end]).tokens == 9
    assert counted([text, text]).tokens == 2
    assert counted([text, end]).events == [0.0]
    with pytest.raises(ServerError, match="boom"):
        counted([{"error": "boom"}])


def test_percentiles_are_of_first_events_and_of_gaps() -> None:
    answers = [Answer(0.0, [1.0, 1.5, 2.0], 3), Answer(0.0, [3.0], 1)]
    assert summarise(answers)["first_token_p50_ms"] == 2000.0
    assert summarise(answers)["token_p50_ms"] == 500.0
    assert summarise([Answer(0.0, [], 4)]) == {}  # no text came: nothing to say


def test_the_client_reads_a_stream_and_refuses_an_error() -> None:
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            body = json.loads(await reader.readexactly(length))
            if body["model"] == "wrong":
                writer.write(b"HTTP/1.1 404 Not Found\r\n\r\nno such model")
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                for text in ("a", "b"):
                    event = json.dumps({"choices": [{"text": text}]})
                    writer.write(f"data: {event}\n\n".encode())
                writer.write(b"data: [DONE]\n\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        load = Load(clients=3, requests=2, prompt_chars=20, max_tokens=4)
        answers = await run_load(port, "right", load)
        assert [a.tokens for a in answers] == [2] * 6
        with pytest.raises(ServerError, match=r"404.*no such model"):
            await run_load(port, "wrong", load)
        server.close()

    asyncio.run(scenario())


def test_prompts_are_all_different() -> None:
    prompts = Load(clients=4, requests=3, prompt_chars=50).prompts()
    flat = [prompt for own in prompts for prompt in own]
    assert [len(own) for own in prompts] == [3] * 4
    assert len(set(flat)) == 12


def test_our_server_answers_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVAL_BENCH_DIR", str(tmp_path))
    sample = measure_server(serval_command, "tiny", 1, Load(3, 1, 100, 5))
    assert sample.seconds > 0
    assert sample.extra["tokens_per_second"] > 0
    assert sample.extra["first_token_p50_ms"] > 0
