"""Cancellation at each point where a call waits, and at random times: nothing is left of the job."""

from __future__ import annotations

import signal
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import pytest
from environment import SLOW, children_of, rounds, seeded

from isojob import DEVNULL, Cache, IsolatedProcess, Pool
from isojob._group import Member
from isojob._relay import Relay

T = TypeVar("T")

JOB: dict[str, Any] = {
    "input": b"x" * 300_000,
    # A path is read in a thread, which is one more wait.
    "files": {"a": Path(__file__), "large": b"c" * 300_000},
    "collect": ["*"],
}
SCRIPT = "cat large; cat | wc -c; sleep 0.01; echo >d"


class Steps:
    """Counts how often a call waits, in whichever of its tasks, and cancels it the n-th time."""

    def __init__(self, scope: anyio.CancelScope, step: int) -> None:
        self.scope, self.step = scope, step
        self.waits = 0
        self.opened: list[IsolatedProcess] = []

    def wait(self) -> None:
        self.waits += 1
        if self.waits == self.step:
            self.scope.cancel()


class Stepped(Generic[T]):
    """Awaits a coroutine, counting."""

    def __init__(self, work: Coroutine[Any, Any, T], steps: Steps) -> None:
        self.work, self.steps = work, steps

    def __await__(self) -> Generator[Any, Any, T]:
        proceed: Callable[[], Any] = partial(self.work.send, None)
        while True:
            try:
                waited_for = proceed()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            self.steps.wait()
            try:
                proceed = partial(self.work.send, (yield waited_for))
            except BaseException as error:
                proceed = partial(self.work.throw, error)


def step_into(monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
    """Counts the waits of the tasks that a call starts, too."""
    for kind in (Member, Relay, IsolatedProcess):

        async def stepped(*args: Any, run: Callable[..., Any] = kind.run) -> Any:
            steps.opened += [one for one in args if isinstance(one, IsolatedProcess)]
            return await Stepped(run(*args), steps)

        monkeypatch.setattr(kind, "run", stepped)


def of_zygote(pool: Pool) -> list[int]:
    """The cells that there are."""
    assert pool._stock.zygote is not None
    return children_of(pool._stock.zygote.pid)


def lives(pid: int) -> bool:
    """Whether it is more than a zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def has_job(init: int) -> bool:
    """Whether there is more in the cell than its init."""
    try:
        return bool(children_of(init))
    except OSError:
        return False


async def settled(pool: Pool) -> None:
    """Until the cells of calls that ended by themselves are gone, too."""
    with anyio.fail_after(30 * SLOW):
        while len(of_zygote(pool)) != pool.statistics().parked:  # noqa: ASYNC110 - the kernel's
            await anyio.sleep(0.005)


async def run(pool: Pool) -> None:
    result = await pool.run(["sh", "-c", SCRIPT], **JOB)
    assert result.ok and len(result.files) == 3


async def talk(pool: Pool) -> None:
    async with pool.open(["cat"], files={"a": Path(__file__)}, stderr=DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"word")
        assert await process.stdout.receive() == b"word"
        await process.stdin.aclose()
        assert (await process.result()).ok


async def at_a_terminal(pool: Pool) -> None:
    async with pool.open(["cat"], pty=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(b"word\n")
        assert (await process.stdout.receive()).startswith(b"w")
        process.kill()
        assert await process.wait() == -signal.SIGKILL


async def pair(pool: Pool, transcript: int = 0) -> None:
    ask, answer = ["sh", "-c", "echo 1; read x"], ["sh", "-c", "read x; echo $x"]
    result = await pool.run_pair(
        ask, answer, files={"a": Path(__file__)}, idle_time=9 * SLOW, transcript=transcript
    )
    assert result.solution.ok and result.interactor.ok


async def group(pool: Pool) -> None:
    results = await pool.run_group([{"command": ["cat"], "input": b"x" * 300_000}, ["wc", "-c"]])
    assert results[1].stdout == b"300000\n"


async def session(pool: Pool) -> None:
    async with pool.session(files={"a": Path(__file__)}, cache=Cache()) as session:
        await session.run(["sh", "-c", "echo 1 >b"])
        await session.run(["sh", "-c", "echo 1 >c; echo 2 >d"], outputs=["c"])
        assert (await session.run(["ls"], keep=False)).stdout == b"a\nb\nc\n"
        await session.put({"b": b"2"})
        async with session.open(["cat", "b"], keep=False) as process:
            await process.wait()
        pair = await session.run_pair(["cat", "b"], ["cat"], interactor_session=session)
        assert pair.solution.ok
        assert (await session.collect("b")).files == {"b": b"2"}


CALLS: dict[str, Callable[[Pool], Coroutine[Any, Any, None]]] = {
    "run": run,
    "talk": talk,
    "terminal": at_a_terminal,
    "pair": pair,
    "relayed pair": partial(pair, transcript=100),
    "group": group,
    "session": session,
}


@pytest.mark.parametrize("name", CALLS)
async def test_cancel_at_each_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a call is cancelled, it returns with its cells gone, and the pool is as before."""
    cancelled = waits = 0
    async with Pool(parked=0, max_jobs=2) as pool:
        await pool.run(["true"])
        for _ in range(rounds(2, 60) if name == "run" else rounds(1, 20)):
            step = waits = 0
            while step <= waits:
                step += 1
                await settled(pool)
                scope = anyio.CancelScope()
                steps = Steps(scope, step)
                with monkeypatch.context() as patch, anyio.fail_after(20 * SLOW), scope:
                    step_into(patch, steps)
                    await Stepped(CALLS[name](pool), steps)
                waits = steps.waits
                if scope.cancelled_caught:
                    cancelled += 1
                    left = of_zygote(pool)
                    if name == "session":
                        # The pool's zygote reaps that of a session when it gets to it.
                        left = [pid for pid in left if lives(pid)]
                    elif name in ("talk", "terminal"):
                        if any(process.returncode is not None for process in steps.opened):
                            # It had ended before the cancel: only its init is left.
                            left = [pid for pid in left if has_job(pid)]
                    elif name != "run":
                        # One of several jobs may have ended by itself: only its init is left.
                        left = [pid for pid in left if has_job(pid)]
                    assert not left
                assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)
        assert (await pool.run(["true"])).ok
    print(f"{waits} waits, {cancelled} cancelled")
    assert cancelled >= 3


async def test_cancel_while_waiting_for_a_slot() -> None:
    """The waits of a call that has to queue."""
    async with Pool(parked=0, max_jobs=1) as pool:
        for step in range(1, 4):
            with anyio.fail_after(20 * SLOW):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(pool.run, ["sleep", "0.1"])
                    await anyio.sleep(0.02)
                    with anyio.CancelScope() as scope:
                        await Stepped(pool.run(["true"]), Steps(scope, step))
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
