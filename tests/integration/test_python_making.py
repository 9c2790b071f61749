"""Templates on their way: who waits for one delays nobody, and each has one end."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from environment import (
    CHILD_USES_THE_POOL,
    PATIENT,
    PYTHON,
    SLOW,
    children_of,
    rounds,
    run_python,
    seeded,
    settle,
)

from isojob import Mount, PoolBrokenError, PoolClosedError, Sandbox
from isojob._branch import Branch
from isojob._python import PythonPool
from isojob.errors import IsojobError, PreloadError

HANGS = 600 * max(1, SLOW)
"""Seconds that imports may take here: a test that waits for that long has failed."""
BOUND = 60 * max(1, SLOW / 4)
"""And how long one waits for what ought to come."""
MANY = 60
"""More calls than anyio has threads for them."""


class Gate:
    """A module whose import waits at a pipe, where it is seen to begin and to end."""

    def __init__(self, folder: Path, name: str, then: str = "") -> None:
        self.name = name
        self._pipe = folder / f"{name}.pipe"
        self._held: list[int] = []
        os.mkfifo(self._pipe)
        self._pipe.chmod(0o666)
        (folder / f"{name}.py").write_text(f"open('/modules/{name}.pipe').read()\n{then}\n")

    async def reached(self) -> None:
        """An import waits here."""
        with anyio.fail_after(BOUND):
            while not self._held:
                try:
                    self._held.append(os.open(self._pipe, os.O_WRONLY | os.O_NONBLOCK))
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    await anyio.sleep(0.005)

    async def deserted(self) -> None:
        """The process that waited is no more."""
        left = select.poll()
        left.register(self._held[-1], select.POLLERR)
        await until(lambda: bool(left.poll(0)))
        self.open()

    def open(self) -> None:
        """Lets go on who waits."""
        while self._held:
            os.close(self._held.pop())


async def until(check: Callable[[], bool]) -> None:
    """Waits, but not for ever."""
    with anyio.fail_after(BOUND):
        while not check():  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Modules of templates and jobs."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "modules"
    folder.mkdir()
    return folder


@pytest.fixture
def gate(folder: Path) -> Iterator[Gate]:
    """Before the module ``slow``."""
    gate = Gate(folder, "slow")
    yield gate
    gate.open()


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the templates that were begun."""
    numbers = []

    class Counted(Branch):
        def __init__(self, zygote: Any, number: int, *rest: Any) -> None:
            numbers.append(number)
            super().__init__(zygote, number, *rest)

    monkeypatch.setattr("isojob._branches.Branch", Counted)
    return numbers


@asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[PythonPool]:
    """A pool that sees these modules."""
    sandbox = Sandbox(mounts=[Mount.bind(folder, "/modules")], env={"PYTHONPATH": "/modules"})
    settings = {"python": PYTHON, "limits": PATIENT, "preload_time": HANGS, "parked": 0, **options}
    async with PythonPool(sandbox=sandbox, **settings) as pool:
        yield pool


async def value(pool: PythonPool, *preload: str) -> object:
    """Which of them a job has that asks for them."""
    code = f"import sys; result = [n for n in {list(preload)} if n in sys.modules]"
    return (await pool.run_python(code, preload=preload)).value


async def test_delays_no_other(folder: Path, gate: Gate) -> None:
    """Other sets are made, and used, while one hangs; then it is ready for all that wait."""
    async with opened(folder) as pool, anyio.create_task_group() as tasks:
        found: list[object] = []

        async def one() -> None:
            found.append(await value(pool, "slow"))

        for _ in range(MANY):
            tasks.start_soon(one)
        await gate.reached()
        with anyio.fail_after(BOUND):
            for names in (["bz2"], ["bz2", "decimal"], ["bz2"]):
                assert await value(pool, *names) == names
            assert (await pool.run_python("result = 1")).value == 1
        assert found == []
        gate.open()
        await until(lambda: len(found) == MANY)
        assert found == [["slow"]] * MANY
        assert len({t.pid for t in pool.statistics().templates}) == 4


async def test_cancelled(folder: Path, gate: Gate, grown: list[int]) -> None:
    """All calls that wait can be; the template that nobody waits for any more ends."""
    async with opened(folder) as pool:
        with anyio.fail_after(BOUND):
            async with anyio.create_task_group() as tasks:
                for _ in range(MANY):
                    tasks.start_soon(value, pool, "slow")
                await gate.reached()
                tasks.cancel_scope.cancel()
        await gate.deserted()
        assert grown == [1]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(value, pool, "slow")
            await gate.reached()
            gate.open()
        assert await value(pool, "slow") == ["slow"]
        assert len(grown) == 2
        assert [t.preload for t in pool.statistics().templates] == [(), ("slow",)]


async def test_one_that_is_cancelled_leaves_it_to_the_others(
    folder: Path, gate: Gate, grown: list[int]
) -> None:
    """Also if it was the first, for whom the template was begun."""
    async with opened(folder) as pool, anyio.create_task_group() as tasks:
        found: list[object] = []

        async def other() -> None:
            found.append(await value(pool, "slow"))

        async with anyio.create_task_group() as first:
            first.start_soon(value, pool, "slow")
            await gate.reached()
            tasks.start_soon(other)
            await anyio.wait_all_tasks_blocked()
            first.cancel_scope.cancel()
        assert await value(pool, "bz2") == ["bz2"]
        gate.open()
        await until(lambda: bool(found))
        assert found == [["slow"]]
        assert sorted(grown) == [1, 2]


async def test_close(folder: Path, gate: Gate) -> None:
    """Closing ends it, and tells all that wait."""
    told: list[str] = []

    async def one(pool: PythonPool) -> None:
        try:
            await value(pool, "slow")
        except IsojobError as error:
            told.append(type(error).__name__)

    async with anyio.create_task_group() as tasks, opened(folder) as pool:
        for _ in range(MANY):
            tasks.start_soon(one, pool)
        await gate.reached()
        with anyio.fail_after(BOUND):
            await pool.aclose()
        await gate.deserted()
    assert told == ["PoolClosedError"] * MANY
    with pytest.raises(PoolClosedError):
        await value(pool, "slow")


async def test_failure_is_told_to_all(folder: Path, grown: list[int]) -> None:
    """To each by an exception of its own; the next call tries again."""
    gate = Gate(folder, "broken", "1/0")
    async with opened(folder) as pool:
        told: list[PreloadError] = []

        async def one() -> None:
            with pytest.raises(PreloadError, match="ZeroDivisionError") as caught:
                await value(pool, "broken")
            told.append(caught.value)

        for turn in (1, 2):
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(one)
                await gate.reached()
                await anyio.wait_all_tasks_blocked()
                gate.open()
            assert len(grown) == turn
            assert len({id(error) for error in told}) == 10 * turn
            assert {(e.module, "1/0" in e.traceback) for e in told} == {("broken", True)}


async def test_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch, grown: list[int]) -> None:
    """Where none can be started the call makes its template itself."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "isojob-branch":
            raise RuntimeError("can't start new thread")
        start(thread)

    (folder / "broken.py").write_text("1/0")
    async with opened(folder) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert await value(pool, "bz2") == ["bz2"]
        with pytest.raises(PreloadError, match="ZeroDivisionError"):
            await value(pool, "broken")
        assert grown == [1, 2]


@pytest.mark.parametrize("victim", ["template", "zygote"])
async def test_death(folder: Path, gate: Gate, victim: str) -> None:
    """Of the template or the zygote: who waits is told, the next call makes it anew."""
    async with opened(folder) as pool:
        zygote = pool._pool.stock.zygote
        assert zygote is not None
        known = set(children_of(zygote.pid))
        errors: list[IsojobError] = []

        async def one() -> None:
            try:
                await value(pool, "slow")
            except IsojobError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(one)
            await gate.reached()
            (made,) = set(children_of(zygote.pid)) - known
            os.kill(made if victim == "template" else zygote.pid, signal.SIGKILL)
        await gate.deserted()
        expected = PreloadError if victim == "template" else PoolBrokenError
        assert [type(error) for error in errors] == [expected] * 3
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(value, pool, "slow")
            await gate.reached()
            gate.open()
        assert pool.statistics().zygotes == (1 if victim == "template" else 2)


async def test_parent_stays(folder: Path, gate: Gate, grown: list[int]) -> None:
    """What a template is forked from does not make room for another meanwhile."""
    async with opened(folder, branch_memory=1) as pool:
        assert await value(pool, "decimal") == ["decimal"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(value, pool, "decimal", "slow")
            await gate.reached()
            assert await value(pool, "bz2") == ["bz2"]
            preloads = {t.preload for t in pool.statistics().templates}
            assert ("decimal",) in preloads
            gate.open()
        assert await value(pool, "decimal", "slow") == ["decimal", "slow"]
        assert len(set(grown)) == 3  # no number twice while it was in use
        preloads = {t.preload for t in pool.statistics().templates}
        assert preloads == {(), ("decimal",), ("decimal", "slow")}
        assert await value(pool, "csv") == ["csv"]  # and then it does
        assert {t.preload for t in pool.statistics().templates} == {(), ("csv",)}


async def test_dead_parent(folder: Path) -> None:
    """One that died unnoticed is not forked: another, or the first, takes its place."""
    async with opened(folder) as pool:
        for last in ("bz2", "csv"):
            assert await value(pool, "decimal") == ["decimal"]
            os.kill(pool.statistics().templates[-1].pid, signal.SIGKILL)
            assert await value(pool, "decimal", last) == ["decimal", last]


async def test_dead_first_template(folder: Path) -> None:
    """The pool has another by the next call or the one after it."""
    async with opened(folder) as pool:
        os.kill(pool.statistics().templates[0].pid, signal.SIGKILL)
        with suppress(PoolBrokenError):
            await value(pool, "bz2")
        assert await value(pool, "bz2") == ["bz2"]
        assert pool.statistics().zygotes == 2


async def test_renewed_meanwhile(folder: Path, gate: Gate) -> None:
    """Its zygote stays for it when another takes over, and goes when its job has ended."""
    async with opened(folder, rotate_jobs=1) as pool:
        found: list[object] = []
        first = pool._pool.stock.zygote
        assert first is not None

        async def one() -> None:
            found.append(await value(pool, "slow"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await gate.reached()
            while pool._pool.stock.zygote is first:
                assert await value(pool) == []
            assert await value(pool) == []
            assert first.alive
            gate.open()
        assert found == [["slow"]]
        with anyio.fail_after(BOUND):
            while first.alive:
                await value(pool)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_of_several_loops(anyio_backend: str, folder: Path, gate: Gate) -> None:
    """One template for calls of asyncio and trio in threads, whichever of them stay."""
    found: list[object] = []
    left = threading.Event()

    async def stays(pool: PythonPool) -> None:
        found.append(await value(pool, "slow"))

    async def leaves(pool: PythonPool) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(value, pool, "slow")
            await gate.reached()
            tasks.cancel_scope.cancel()
        left.set()

    async with opened(folder) as pool:
        first = threading.Thread(target=lambda: asyncio.run(leaves(pool)))
        others = [
            threading.Thread(target=lambda: asyncio.run(stays(pool))),
            threading.Thread(target=lambda: trio.run(stays, pool)),
        ]
        for thread in (*others, first):
            thread.start()
        await until(left.is_set)
        gate.open()
        with anyio.fail_after(BOUND):
            for thread in (first, *others):
                await anyio.to_thread.run_sync(thread.join)
        assert found == [["slow"]] * 2


async def test_cancelled_at_any_time(folder: Path, gate: Gate) -> None:
    """No template is left that nobody waits for, and none that nobody ends."""
    chance = seeded()
    async with opened(folder) as pool:
        assert await value(pool, "bz2") == ["bz2"]
        zygote = pool._pool.stock.zygote
        assert zygote is not None
        # With no cells its children are the templates, and pid 1 of their namespace.
        await until(lambda: len(children_of(zygote.pid)) == 3)
        for _ in range(rounds(60, 600)):
            with anyio.move_on_after(chance.uniform(0, 0.03)):
                await value(pool, chance.choice(("slow", "bz2")), "slow")
        assert not settle(lambda: set(children_of(zygote.pid)[3:]), BOUND)
        assert zygote.alive and pool.statistics().zygotes == 1
        assert await value(pool, "bz2") == ["bz2"]


def test_forked_host(folder: Path) -> None:
    """A child of the host makes its own; the parent's is not touched."""
    gate = Gate(folder, "slow")
    done = run_python(
        "import asyncio, os, warnings, isojob",
        "warnings.simplefilter('ignore', DeprecationWarning)  # 3.12 on: a fork beside threads",
        f"sandbox = isojob.Sandbox(mounts=[isojob.Mount.bind({str(folder)!r}, '/modules')],",
        "                         env={'PYTHONPATH': '/modules'})",
        "async def reached():",
        "    while True:",
        "        try:",
        f"            return os.open({str(gate._pipe)!r}, os.O_WRONLY | os.O_NONBLOCK)",
        "        except OSError:",
        "            await asyncio.sleep(0.01)",
        f"limits = isojob.Limits(wall_time={60 * SLOW}, cpu_time={10 * SLOW})",
        "async def main():",
        f"    async with isojob.PythonPool(python={PYTHON!r}, sandbox=sandbox, parked=0,",
        f"                                 preload_time={HANGS}, limits=limits) as pool:",
        "        task = asyncio.create_task(pool.run_python('result = 7', preload=['slow']))",
        "        fd = await reached()",
        "        pid = os.fork()",
        "        if pid == 0:",
        "            os.close(fd)",
        *CHILD_USES_THE_POOL,
        "        status = (await asyncio.to_thread(os.waitpid, pid, 0))[1]",
        "        os.close(fd)",
        "        print((await task).value, status)",
        "asyncio.run(main())",
    )
    assert (done.stdout, done.stderr) == ("7 0\n", "")
