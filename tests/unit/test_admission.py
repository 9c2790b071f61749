"""Slots: first come, first served, by number and by memory, without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from isojob import Pool, PoolClosedError, QueueFullError
from isojob._admission import Slots

MIB = 1 << 20


async def start(
    slots: Slots, memory: int | None, order: list[str], name: str, hold: anyio.Event | None = None
) -> None:
    """One job that takes its turn and notes it."""
    reserved = await slots.acquire(memory)
    order.append(name)
    if hold is not None:
        await hold.wait()
    slots.release(reserved)


async def until(check: Callable[[], bool]) -> None:
    """Waits, but not for ever."""
    with anyio.fail_after(20):
        while not check():  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.001)


async def test_first_come_first_served() -> None:
    """Jobs start in the order in which they asked."""
    slots, order = Slots(1, None, 100 * MIB), list[str]()
    first = await slots.acquire(MIB)
    async with anyio.create_task_group() as tasks:
        for number, name in enumerate("abcdef", 1):
            tasks.start_soon(start, slots, MIB, order, name)
            await until(lambda number=number: slots.waiting == number)  # type: ignore[misc]
        slots.release(first)
    assert order == list("abcdef")
    assert (slots.running, slots.waiting, slots.reserved) == (0, 0, 0)


async def test_memory_is_a_limit_of_its_own() -> None:
    """Two jobs that may use 60 of 100 MiB do not run together; a third small one keeps its turn."""
    slots, order, hold = Slots(8, None, 100 * MIB), list[str](), anyio.Event()
    first = await slots.acquire(60 * MIB)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start, slots, 60 * MIB, order, "large", hold)
        await until(lambda: slots.waiting == 1)
        tasks.start_soon(start, slots, 1 * MIB, order, "small")
        await until(lambda: slots.waiting == 2)
        assert order == []
        assert (slots.running, slots.waiting, slots.reserved) == (1, 2, 60 * MIB)
        slots.release(first)
        await until(lambda: sorted(order) == ["large", "small"])
        hold.set()
    assert (slots.running, slots.waiting, slots.reserved) == (0, 0, 0)


@pytest.mark.parametrize("memory", [None, 101 * MIB, 1 << 50])
async def test_a_job_larger_than_everything_runs_alone(memory: int | None) -> None:
    """It is neither refused nor starved."""
    slots, order, hold = Slots(8, None, 100 * MIB), list[str](), anyio.Event()
    small = await slots.acquire(MIB)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start, slots, memory, order, "huge", hold)
        await until(lambda: slots.waiting == 1)
        tasks.start_soon(start, slots, MIB, order, "next")
        await until(lambda: slots.waiting == 2)
        assert order == []
        slots.release(small)
        await until(lambda: order == ["huge"])
        assert (slots.reserved, slots.waiting) == (100 * MIB, 1)
        hold.set()
    assert order == ["huge", "next"]


async def test_a_cancelled_waiter_lets_the_next_one_go() -> None:
    """A large job that gives up no longer holds up the small one behind it."""
    slots, order = Slots(8, None, 100 * MIB), list[str]()
    await slots.acquire(60 * MIB)
    async with anyio.create_task_group() as tasks:
        async with anyio.create_task_group() as inner:
            inner.start_soon(start, slots, 60 * MIB, order, "large")
            await until(lambda: slots.waiting == 1)
            tasks.start_soon(start, slots, MIB, order, "small")
            await until(lambda: slots.waiting == 2)
            inner.cancel_scope.cancel()
        await until(lambda: order == ["small"])
    assert (slots.running, slots.waiting) == (1, 0)


async def test_bounded_queue_and_the_patient() -> None:
    """A full queue refuses; who is patient waits all the same; closing turns all away."""
    slots = Slots(1, 0, 100 * MIB)
    await slots.acquire(MIB)
    with pytest.raises(QueueFullError):
        await slots.acquire(MIB)
    refused: list[str] = []

    async def patient() -> None:
        try:
            await slots.acquire(MIB, patient=True)
        except PoolClosedError:
            refused.append("closed")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(patient)
        await until(lambda: slots.waiting == 1)
        slots.close()
    assert refused == ["closed"]
    with pytest.raises(PoolClosedError):
        await slots.acquire(MIB)


@pytest.mark.parametrize(
    "options",
    [
        {"sandbox": {}},
        {"limits": {"memory": "1GiB"}},
        {"max_jobs": True},
        {"max_jobs": "4"},
        {"parked": 1.5},
        {"queue": "no"},
        {"uid_range": (1, 2)},
    ],
)
def test_pools_of_wrong_types(options: dict[str, Any]) -> None:
    """Each argument of a wrong type is named, before anything starts."""
    with pytest.raises(TypeError, match=next(iter(options))):
        Pool(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_jobs": 0},
        {"memory": 0},
        {"parked": -1},
        {"queue": -1},
        {"uid_range": range(-1, 9)},
        {"uid_range": range(0, 9, 2)},
    ],
)
def test_pools_of_wrong_sizes(options: dict[str, Any]) -> None:
    """Numbers that make no sense are refused by name."""
    with pytest.raises(ValueError, match=next(iter(options))):
        Pool(**options)
