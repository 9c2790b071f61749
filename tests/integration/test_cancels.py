"""Cancellation at each point where a call waits, and at random times: nothing is left of the job."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from environment import SLOW, children_of, rounds, seeded

from isojob import Pool, Result

JOB: dict[str, Any] = {
    "input": b"x" * 300_000,
    # A path is read in a thread, which is one more wait.
    "files": {"a": Path(__file__), "large": b"c" * 300_000},
    "collect": ["*"],
}
SCRIPT = "cat large; cat | wc -c; sleep 0.01; echo >d"


class AtStep:
    """Awaits a coroutine, and cancels the scope as it waits for the n-th time."""

    def __init__(self, work: Coroutine[Any, Any, Result], scope: anyio.CancelScope, step: int):
        self.work, self.scope, self.step = work, scope, step
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, Result]:
        proceed: Callable[[], Any] = partial(self.work.send, None)
        while True:
            try:
                waited_for = proceed()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            self.waits += 1
            if self.waits == self.step:
                self.scope.cancel()
            try:
                proceed = partial(self.work.send, (yield waited_for))
            except BaseException as error:
                proceed = partial(self.work.throw, error)


def of_zygote(pool: Pool) -> list[int]:
    """The cells that there are."""
    assert pool._stock.zygote is not None
    return children_of(pool._stock.zygote.pid)


async def settled(pool: Pool) -> None:
    """Until the cells of calls that ended by themselves are gone, too."""
    with anyio.fail_after(30 * SLOW):
        while len(of_zygote(pool)) != pool.statistics().parked:  # noqa: ASYNC110 - the kernel's
            await anyio.sleep(0.005)


async def test_cancel_at_each_wait() -> None:
    """Wherever a call is cancelled, it returns with its cell gone, and the pool is as before."""
    cancelled = waits = 0
    async with Pool(parked=0) as pool:
        await pool.run(["true"])
        for _ in range(rounds(2, 60)):
            step = waits = 0
            while step <= waits:
                step += 1
                await settled(pool)
                scope = anyio.CancelScope()
                call = AtStep(pool.run(["sh", "-c", SCRIPT], **JOB), scope, step)
                with anyio.fail_after(20 * SLOW), scope:
                    result = await call
                    assert result.ok and len(result.files) == 3
                waits = call.waits
                if scope.cancelled_caught:
                    cancelled += 1
                    assert not of_zygote(pool)
                assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)
        assert (await pool.run(["true"])).ok
    print(f"{waits} waits, {cancelled} cancelled")
    assert cancelled >= 6


async def test_cancel_while_waiting_for_a_slot() -> None:
    """The waits of a call that has to queue."""
    async with Pool(parked=0, max_jobs=1) as pool:
        for step in range(1, 4):
            with anyio.fail_after(20 * SLOW):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(pool.run, ["sleep", "0.1"])
                    await anyio.sleep(0.02)
                    with anyio.CancelScope() as scope:
                        await AtStep(pool.run(["true"]), scope, step)
            assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)
            await settled(pool)


async def test_cancels_at_random() -> None:
    """Several at a time, out of step with each other and with a stock that grows meanwhile."""
    chance = seeded()
    cancelled = 0
    async with Pool(max_jobs=4) as pool:
        await pool.run(["true"])
        full = (await pool.run(["sh", "-c", SCRIPT], **JOB)).usage.wall_time

        async def one(seconds: float, command: list[str], **job: Any) -> None:
            nonlocal cancelled
            with anyio.move_on_after(seconds) as scope:
                assert (await pool.run(command, **job)).ok
            cancelled += scope.cancelled_caught

        for _ in range(rounds(12, 125)):
            with anyio.fail_after(30 * SLOW):
                async with anyio.create_task_group() as tasks:
                    for job in (
                        partial(one, command=["sh", "-c", SCRIPT], **JOB),
                        partial(one, command=["true"]),
                        partial(one, command=["sh", "-c", "sleep 60 & sleep 60 & cat"], input=b"x"),
                        partial(one, command=["sleep", "60"]),
                    ):
                        tasks.start_soon(job, chance.uniform(0, 2 * full + 0.02 * SLOW))
            assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)
        await settled(pool)
        assert pool.statistics().zygotes == 1
    print(f"{cancelled} cancelled")
    assert cancelled
