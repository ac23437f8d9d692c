"""The engine behind an event loop: streams, cancellation, failures, drain."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from serval import LLM, SamplingParams
from serval.engine.async_engine import AsyncLLM
from serval.errors import RequestError

from .helpers import greedy, tiny_decoder, tiny_llm

GREEDY = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)


@pytest.fixture
def llm() -> LLM:
    return tiny_llm()


@pytest.fixture
def server(llm: LLM) -> Iterator[AsyncLLM]:
    made = AsyncLLM(llm)
    yield made
    made.shutdown()
    llm.memory.manager.check_integrity()
    assert llm.memory.manager.used_blocks == 0
    assert not made._open


async def collect(server: AsyncLLM, prompt: list[int], params: SamplingParams) -> dict:
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    reasons = {}
    async for delta in server.stream(prompt, params):
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        if delta.finish_reason:
            reasons[delta.index] = delta.finish_reason
    return {"texts": texts, "tokens": tokens, "reasons": reasons}


def test_streams_equal_generate(llm: LLM, server: AsyncLLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=20, stop="e")
    batch = [[i, i + 1, 7] for i in range(12)]

    async def main() -> list[dict]:
        return await asyncio.gather(*(collect(server, prompt, params) for prompt in batch))

    for got, want in zip(asyncio.run(main()), llm.generate(batch, params), strict=True):
        for output in want.outputs:
            assert got["texts"][output.index] == output.text
            assert got["tokens"][output.index] == output.token_ids
            assert got["reasons"][output.index] == output.finish_reason


def test_llm_stream() -> None:
    llm = tiny_llm()

    async def main() -> list[int]:
        return [token async for delta in llm.stream([1, 2], GREEDY) for token in delta.token_ids]

    assert asyncio.run(main()) == greedy(tiny_decoder(), [1, 2], 15)
    assert asyncio.run(main()) == greedy(tiny_decoder(), [1, 2], 15)  # in a second event loop
    llm._async.shutdown()


def test_leaving_a_stream_frees_its_blocks(llm: LLM, server: AsyncLLM) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True, n=2)

    async def main() -> None:
        stream = server.stream([1, 2, 3], endless)
        async for delta in stream:
            if len(delta.token_ids) and delta.index == 1:
                break
        await stream.aclose()
        task = asyncio.create_task(collect(server, [4, 5], endless))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(200):
            if llm.memory.manager.used_blocks == 0:
                return
            await asyncio.sleep(0.005)
        raise AssertionError("blocks were not freed")

    asyncio.run(main())
    assert server.stats().running == 0


def test_bad_requests_raise_where_they_are_made(server: AsyncLLM) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="empty"):
            await server.submit([])
        with pytest.raises(RequestError, match="constraint"):
            await server.submit([1], SamplingParams(regex="("))
        taken = server.engine.add_request([1], GREEDY, request_id="b")
        refused = await server.submit([1], SamplingParams(n=2), request_id="b")
        assert [d.finish_reason async for d in refused] == ["abort", "abort"]
        while not taken.finished:
            await asyncio.sleep(0.001)
        stream = await server.submit([1], GREEDY, request_id="a")
        with pytest.raises(RequestError, match="in use"):
            await server.submit([1], GREEDY, request_id="a")
        assert [d.finish_reason async for d in stream][-1] == "length"

    asyncio.run(main())


def test_a_failing_step_ends_the_streams_and_the_server_lives(
    llm: LLM, server: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = llm.engine.runner.run
    calls = []

    def broken(work):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return run(work)

    monkeypatch.setattr(llm.engine.runner, "run", broken)

    async def main() -> None:
        stream = await server.submit([1, 2], SamplingParams(n=2, max_tokens=20, ignore_eos=True))
        last = [delta async for delta in stream][-1]
        assert last.finish_reason == "abort"
        assert "out of memory" in str(last.stop_reason)
        assert (await collect(server, [1, 2], GREEDY))["reasons"] == {0: "length"}

    asyncio.run(main())


def test_drain(llm: LLM) -> None:
    server = AsyncLLM(llm)

    async def main() -> None:
        task = asyncio.create_task(collect(server, [1, 2], GREEDY))
        await asyncio.sleep(0.01)
        assert await server.drain(10)
        assert (await task)["reasons"] == {0: "length"}
        with pytest.raises(RequestError, match="shutting down"):
            await server.submit([1])

    asyncio.run(main())
    server.shutdown()


def test_drain_cancels_what_takes_too_long(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    server = AsyncLLM(llm)
    run = llm.engine.runner.run

    def slow(work):
        import time

        time.sleep(0.01)
        return run(work)

    monkeypatch.setattr(llm.engine.runner, "run", slow)

    async def main() -> None:
        task = asyncio.create_task(
            collect(server, [1], SamplingParams(max_tokens=None, ignore_eos=True))
        )
        await asyncio.sleep(0.05)
        assert not await server.drain(0.05)
        assert (await task)["reasons"] == {0: "abort"}

    asyncio.run(main())
    server.shutdown()
    assert llm.memory.manager.used_blocks == 0


def test_rude_clients(llm: LLM, server: AsyncLLM) -> None:
    rng = random.Random(0)

    async def client(i: int) -> None:
        params = SamplingParams(
            n=rng.choice([1, 1, 3]), max_tokens=rng.randint(1, 25), ignore_eos=True, seed=i
        )
        prompt = [rng.randrange(250) for _ in range(rng.randint(1, 30))]
        if rng.random() < 0.5:
            await collect(server, prompt, params)
            return
        task = asyncio.create_task(collect(server, prompt, params))
        await asyncio.sleep(rng.random() * 0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def main() -> None:
        await asyncio.gather(*(client(i) for i in range(40)))
        assert await server.drain(10)

    asyncio.run(main())
    assert llm.engine.idle
