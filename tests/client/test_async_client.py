"""The asyncio client: the same behaviour as the synchronous one."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from serving_rig import TOKENIZER, serving, wait_until

from euryale import client as euryale
from euryale.client import AsyncClient

LONG = {"max_tokens": 150}


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_same_methods():
    def public(cls):
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(euryale.Client) == public(AsyncClient)
    assert public(euryale.Generation) == public(euryale.AsyncGeneration)


def test_calls_and_streaming():
    async def main(address):
        async with AsyncClient(address, timeout=10) as client:
            assert (await client.hello()).model == "scripted"
            assert (await client.health()).status == "ok"
            pieces = [delta async for delta in client.generate("hello world", max_tokens=10)]
            completion = await client.generate("hello world", max_tokens=10).result()
            assert "".join(piece.text for piece in pieces) == completion.text
            assert completion.tokens_per_step == (3, 3, 3, 1)
            assert (await client.stats())["requests_finished"] == 2
            with pytest.raises(euryale.InvalidRequest, match="temperatur"):
                await client.generate("hello", temperatur=0).text()
            with pytest.raises(euryale.InvalidRequest, match="exactly one"):
                client.generate()

    with serving() as rig:
        run(main(rig.address))


def test_many_at_once():
    async def main(address):
        async with AsyncClient(address, timeout=20) as client:
            generations = [client.generate("hello world", max_tokens=n) for n in range(1, 100)]
            completions = await asyncio.gather(*(generation.result() for generation in generations))
            assert [len(completion.tokens) for completion in completions] == list(range(1, 100))

    with serving() as rig:
        run(main(rig.address))


def test_leaving_cancels():
    async def by_break(client):
        async for _ in client.generate("hello", **LONG):
            break

    async def by_task_cancellation(client):
        task = asyncio.create_task(client.generate("hello", **LONG).result())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def by_exception(client):
        async def fail():
            async for delta in client.generate("hello", **LONG):
                raise KeyError(delta)

        with pytest.raises(KeyError):
            await fail()

    async def by_context(client):
        async with client.generate("hello", **LONG) as generation:
            await asyncio.sleep(0.1)
            assert generation.partial().finish_reason is None

    async def by_forgetting(client):
        client.generate("hello", **LONG)
        await asyncio.sleep(0.1)

    async def main(rig):
        async with AsyncClient(rig.address, timeout=10) as client:
            for count, leave in enumerate((by_break, by_task_cancellation, by_exception, by_context), 1):
                await leave(client)
                await until(lambda count=count: len(rig.engine.cancels) == count)
            adds = len(rig.engine.adds)
            await by_forgetting(client)  # abandoned before it was sent, or cancelled after
            assert len(rig.engine.adds) == adds or await until(lambda: len(rig.engine.cancels) == adds + 1) is None
            await until(lambda: not rig.engine.running)

    with serving() as rig:
        rig.engine.pause = 0.02
        run(main(rig))


def test_cancel():
    async def main(rig):
        async with AsyncClient(rig.address, timeout=10) as client:
            generation = client.generate("hello", **LONG)
            deltas = aiter(generation)
            await anext(deltas)
            assert await client.cancel(generation) is True
            assert await client.cancel(generation) is False
            with pytest.raises(euryale.Cancelled) as caught:
                async for _ in deltas:
                    pass
            assert caught.value.completion.tokens[:1] == tuple(TOKENIZER.encode("hello"))[:1]

    with serving() as rig:
        rig.engine.pause = 0.02
        run(main(rig))


def test_errors_of_the_connection():
    async def main(address):
        async with AsyncClient("tcp://127.0.0.1:1", connect_timeout=0.2) as client:
            with pytest.raises(euryale.ServerLost, match="no server answered"):
                await client.hello()
            with pytest.raises(euryale.ServerLost, match="no server answered"):
                await client.generate("hello").result()
        with pytest.raises(ValueError, match="address must be tcp://host:port or ipc://path, not 'nonsense'"):
            AsyncClient("nonsense")
        async with AsyncClient(address, timeout=0.2) as client:
            with pytest.raises(euryale.TimedOut):
                await client.generate("hello").result()
            with pytest.raises(euryale.TooLarge):
                client.generate("x" * (5 << 20))
        await client.close()
        with pytest.raises(euryale.ServerLost, match="closed"):
            await client.hello()

    with serving(hold=True) as rig:
        run(main(rig.address))


def test_drain():
    async def main(rig):
        async with AsyncClient(rig.address, timeout=10) as client:
            running = client.generate("hello", max_tokens=30)
            await until(lambda: rig.engine.running)
            await client.drain()
            assert len((await running.result()).tokens) == 30

    with serving() as rig:
        rig.engine.pause = 0.02
        run(main(rig))
        wait_until(lambda: rig.outcome == ["drained"])


def test_a_killed_server_is_noticed_at_once():
    script = Path(__file__).parents[1] / "serving_rig.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()

        async def main():
            async with AsyncClient(address, timeout=60) as client:
                generation = client.generate("hello", **LONG)
                deltas = aiter(generation)
                await anext(deltas)
                process.kill()
                async with asyncio.timeout(5):
                    with pytest.raises(euryale.ServerLost, match="broke"):
                        async for _ in deltas:
                            pass

        try:
            run(main())
        finally:
            process.kill()
