"""Pool.map: order, backpressure, errors, and ends of every kind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from environment import SLOW

from isojob import CommandNotFoundError, Pool, PoolClosedError, Result


def echoes(count: int, taken: list[int] | None = None) -> Iterator[list[str]]:
    """Jobs that say their number."""
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield ["echo", str(number)]


async def test_every_job_has_its_result() -> None:
    """As they end: each result knows which job it is of."""
    async with Pool(max_jobs=4) as pool:
        results = [result async for result in pool.map(echoes(30))]
    assert sorted(result.index or 0 for result in results) == list(range(30))
    assert all(result.stdout == b"%d\n" % (result.index or 0) for result in results)


async def test_in_order() -> None:
    """A slow first job holds back the others' results, not the others."""

    def jobs() -> Iterator[dict[str, Any]]:
        yield {"command": ["sh", "-c", f"sleep {0.3 * SLOW}; cat"], "input": b"slow"}
        for number in range(1, 12):
            yield {"command": ["echo", str(number)]}

    async with Pool(max_jobs=4) as pool:
        results = [result async for result in pool.map(jobs(), ordered=True)]
        first = [result async for result in pool.map(jobs())]
    assert [result.index for result in results] == list(range(12))
    assert results[0].stdout == b"slow"
    assert first[0].index != 0


async def test_asynchronous_source() -> None:
    """Jobs may come from an async generator, and slowly; none at all is fine, too."""

    async def jobs() -> AsyncIterator[list[str]]:
        for number in range(5):
            await anyio.sleep(0.01)
            yield ["echo", str(number)]

    async with Pool(max_jobs=2) as pool:
        results = [result.stdout async for result in pool.map(jobs(), ordered=True)]
        assert [result async for result in pool.map([])] == []
    assert results == [b"%d\n" % number for number in range(5)]


async def test_backpressure() -> None:
    """No more jobs are taken than have room while the caller takes no results."""
    taken: list[int] = []
    async with Pool(max_jobs=2) as pool, pool.map(echoes(1000, taken)) as results:
        async for _ in results:
            await anyio.sleep(0.3 * SLOW)
            break
        assert 2 <= len(taken) <= 1 + 2 * 2
    assert len(taken) <= 1 + 2 * 2


async def test_full_queue_is_no_obstacle() -> None:
    """A bounded queue is for strangers' calls."""
    async with Pool(max_jobs=2, queue=0) as pool:
        assert len([r async for r in pool.map(echoes(20))]) == 20


async def test_an_error_ends_the_rest() -> None:
    """It says which job; what ran is gone."""

    def jobs() -> Iterator[list[str]]:
        yield ["sleep", "600"]
        yield ["sleep", "600"]
        yield ["no-such-program"]
        yield ["sleep", "600"]

    async with Pool(max_jobs=4) as pool:
        with pytest.raises(CommandNotFoundError) as caught:
            async for _ in pool.map(jobs()):
                pass
        assert caught.value.__notes__ == ["job 2 of Pool.map"]
        assert pool.statistics().running == 0


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"cmd": ["true"]}, "a job without a command"),
        ({"command": ["true"], "index": 5}, r"a job of map\(\) takes no index"),
        ({"command": ["true"], "patient": False}, "takes no patient"),
        ({"command": ["true"], "sandbox": None}, "takes no sandbox"),
        ("true", "command must be a sequence"),
    ],
)
async def test_what_is_no_job(job: Any, message: str) -> None:
    """It is told what is wrong, and which job it was."""
    async with Pool(max_jobs=2) as pool:
        with pytest.raises(TypeError, match=message) as caught:
            async for _ in pool.map([{"command": ["true"], "check": True}, job]):
                pass
        assert caught.value.__notes__ == ["job 1 of Pool.map"]


async def test_an_error_of_the_source() -> None:
    """What the caller's generator raises comes out."""

    def jobs() -> Iterator[list[str]]:
        yield ["sleep", "600"]
        raise ZeroDivisionError

    async with Pool(max_jobs=4) as pool:
        with pytest.raises(ZeroDivisionError):
            async for _ in pool.map(jobs()):
                pass
        assert pool.statistics().running == 0


async def test_cancelled() -> None:
    """When the cancel comes out, nothing runs any more."""
    async with Pool(max_jobs=4) as pool:
        with anyio.move_on_after(0.4 * SLOW) as scope:
            async for _ in pool.map([["sleep", "600"]] * 100):
                pass
        assert scope.cancelled_caught
        assert pool.statistics().running == 0
        assert (await pool.run(["true"])).ok


async def test_left_early() -> None:
    """Closed on leaving the block; a forgotten iterator ends its jobs soon after."""
    jobs = [["true"], *[["sleep", "600"]] * 10]
    async with Pool(max_jobs=4) as pool:
        async with pool.map(jobs) as results:
            async for result in results:
                assert result.ok
                break
        assert pool.statistics().running == 0
        assert [r async for r in results] == []

        async for result in pool.map(jobs):
            assert result.ok
            break
        gc.collect()
        with anyio.fail_after(10 * SLOW):
            while pool.statistics().running:  # noqa: ASYNC110 - nobody tells
                await anyio.sleep(0.01)


async def test_pool_closed_meanwhile() -> None:
    """The iterator ends with the pool's error."""
    async with Pool(max_jobs=2) as pool:
        results = pool.map([["sleep", "600"]] * 4)

        async def close() -> None:
            await anyio.sleep(0.3 * SLOW)
            await pool.aclose()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(close)
            with pytest.raises(PoolClosedError):
                await anext(results)


def test_loop_ends_under_it() -> None:
    """asyncio.run that returns with a map under way leaves nothing and says nothing."""

    async def main(pool: Pool) -> list[Result]:
        await pool.__aenter__()
        results = pool.map([["true"], *[["sleep", "600"]] * 10])
        kept.append(results)
        return [await anext(results)]

    kept: list[object] = []
    pool = Pool(max_jobs=4)
    try:
        assert asyncio.run(main(pool))[0].ok
        assert pool.statistics().running == 0
    finally:
        pool.close()


def test_loop_ends_before_it_began() -> None:
    """Workers that are cancelled before their first step are not waited for."""

    async def consume(pool: Pool) -> None:
        async for _ in pool.map([["sleep", "600"]] * 10):
            pass

    async def main(pool: Pool) -> None:
        await pool.__aenter__()
        kept.append(asyncio.create_task(consume(pool)))
        await asyncio.sleep(0)

    kept: list[object] = []
    for _ in range(3):
        pool = Pool(max_jobs=4)
        try:
            asyncio.run(main(pool))
        finally:
            pool.close()


async def test_closed_by_another_task() -> None:
    """A consumer whose iterator another task closes does not take that for the end."""
    seen: list[type[BaseException]] = []
    async with Pool(max_jobs=2) as pool:
        results = pool.map([["sleep", "600"]] * 10)

        async def consume() -> None:
            try:
                await anext(results)
            except RuntimeError as error:
                seen.append(type(error))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            await anyio.sleep(0.3 * SLOW)
            await results.aclose()
    assert seen == [RuntimeError]


async def test_source_is_told() -> None:
    """An async generator that is left early is closed."""
    ended: list[bool] = []

    async def jobs() -> AsyncIterator[list[str]]:
        try:
            while True:
                yield ["true"]
        finally:
            ended.append(True)

    async with Pool(max_jobs=2) as pool, pool.map(jobs()) as results:
        assert (await anext(results)).ok
    assert ended == [True]


@pytest.mark.parametrize("bad", ["no-such-program", ""])
async def test_source_is_told_of_a_failure(bad: str) -> None:
    """Also where the last job that ran was the one that failed; nobody waits for the collector."""
    ended: list[bool] = []

    async def jobs() -> AsyncIterator[list[str]]:
        try:
            while True:
                yield [bad]
        finally:
            ended.append(True)

    source = jobs()  # held, as callers do
    async with Pool(max_jobs=1) as pool:
        with pytest.raises((CommandNotFoundError, ValueError)):
            async for _ in pool.map(source):
                pass
        assert ended == [True]


@pytest.mark.parametrize("bad", [False, True])
async def test_two_consumers(bad: bool) -> None:
    """Both see the ordinary end, and of a failure one sees it; the source is closed once."""
    ended: list[bool] = []
    seen: list[str] = []

    async def jobs() -> AsyncIterator[list[str]]:
        try:
            for _ in range(6):
                yield ["true"]
            if bad:
                yield ["no-such-program"]
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            ended.append(True)

    source = jobs()
    async with Pool(max_jobs=2) as pool:
        results = pool.map(source)

        async def consume() -> None:
            try:
                async for result in results:
                    assert result.ok
                    seen.append("ok")
            except CommandNotFoundError:
                seen.append("failed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            tasks.start_soon(consume)
    assert ended == [True]
    assert seen.count("ok") == 6 or "failed" in seen
    assert bad or "failed" not in seen
