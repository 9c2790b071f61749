"""kill -9 at random moments: of zygote, init, job and host."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from environment import SLOW, children_of, rounds, seeded, settle
from leftovers import adopting, cgroups, living, mounts, temporary

from isojob import IsojobError, Limits, PairResult, Pool, PoolBrokenError, Result, Status

ROUNDS = rounds(25, 250)
BOUND = 20 * SLOW
LIMITS = Limits(wall_time=10 * SLOW)
JOBS = (
    ["sh", "-c", "echo hi"],
    ["sh", "-c", "sleep 0.05; echo hi"],
    ["sh", "-c", "sleep 60 & sleep 0.02; echo hi"],
)


def victims(zygote: int, chance: random.Random) -> list[int]:
    """The zygote, or an init of its cells, or what an init has for a child."""
    kind = chance.randrange(3)
    if kind == 0:
        return [zygote]
    inits = children_of(zygote)
    if kind == 1:
        return inits
    found = []
    for pid in inits:
        with suppress(OSError):
            found += children_of(pid)
    return found


@pytest.fixture(autouse=True)
def _adopting() -> Iterator[None]:
    with adopting():
        yield


def names_of(pids: list[int]) -> dict[int, str]:
    """What they call themselves; empty: dead and gone."""
    found = dict.fromkeys(pids, "")
    for pid in pids:
        with suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


class Watch:
    """Looks after each round for what it has left, while the pool is open and idle."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._before = living(), temporary()
        self._least: dict[int, int] = {}

    def left(self) -> list[str]:
        """Processes, cgroups, mounts, files, and descriptors of the zygote, beyond its parked cells."""
        zygote = self._pool._stock.zygote
        if zygote is None or not zygote.alive:
            return ["a dead zygote"]
        assert zygote.subtree is not None
        found = [
            f"process {child}" for child in living() - self._before[0] if child[0] != zygote.pid
        ]
        own = set(map(str, zygote.subtree.directories))
        found += cgroups() - own
        cells = names_of(children_of(zygote.pid))
        if len(cells) > self._pool.statistics().parked_target or set(cells.values()) - {
            "isojob-init"
        }:
            found.append(f"children of the zygote: {cells}")
        for directory in zygote.subtree.directories:
            names = [path.name for path in directory.glob("cell-*")]
            if len(names) > len(cells):  # not each limit is asked for
                found.append(f"{directory}: {names} for {len(cells)} cells")
        found += mounts() | temporary() - self._before[1]
        if found:
            return found  # what follows is true only where nothing moves
        proc = Path(f"/proc/{zygote.pid}")
        held = len((proc / "mountinfo").read_text().splitlines()) + len(os.listdir(proc / "fd"))
        if names_of(children_of(zygote.pid)) != cells:
            return ["cells that come or go"]
        held -= len(cells)  # a lease each, as long as it lives
        self._least[zygote.pid] = least = min(held, self._least.get(zygote.pid, held))
        return [f"{held} mounts and descriptors of the zygote, not {least}"] if held > least else []

    async def check(self, number: int) -> None:
        """After the round of that number: the next job works, and in a moment nothing is left."""
        await the_next_works(self._pool)
        deadline = anyio.current_time() + BOUND
        while True:
            try:
                left = self.left()
            except OSError as error:  # the zygote dies as we look
                left = [repr(error)]
            if not left:
                return
            assert anyio.current_time() < deadline, (number, left)
            await anyio.sleep(0.02)
            zygote = self._pool._stock.zygote
            if zygote is None or not zygote.alive:  # a parked cell was quicker than its end
                await the_next_works(self._pool)


async def the_next_works(pool: Pool) -> None:
    """At the second attempt if need be."""
    with anyio.fail_after(BOUND):
        for attempt in range(2):
            try:
                assert (await pool.run(JOBS[0])).stdout == b"hi\n"
                break
            except PoolBrokenError:  # its cell was dying as it read the job
                if attempt:
                    raise


async def test_random_kills() -> None:
    """Each call ends with a true verdict or a named error, and the next one works."""
    chance, ends = seeded(), dict[str, int]()
    async with Pool(limits=LIMITS, parked=4, max_jobs=4) as pool:
        watch = Watch(pool)
        for number in range(ROUNDS):
            outcomes: list[Result | IsojobError] = []

            async def one(
                command: list[str], outcomes: list[Result | IsojobError] = outcomes
            ) -> None:
                try:
                    outcomes.append(await pool.run(command))
                except IsojobError as error:
                    outcomes.append(error)

            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as tasks:
                    for command in JOBS:
                        tasks.start_soon(one, command)
                    await anyio.sleep(chance.uniform(0, 0.06 * SLOW))
                    zygote = pool._stock.zygote
                    if zygote is not None:
                        with suppress(OSError):
                            if found := victims(zygote.pid, chance):
                                os.kill(chance.choice(found), signal.SIGKILL)
            assert len(outcomes) == len(JOBS)
            for outcome in outcomes:
                name = type(outcome).__name__
                if isinstance(outcome, Result):
                    name = str(outcome.status)
                    if outcome.status == Status.OK:
                        assert outcome.stdout == b"hi\n"
                    else:  # the one that was killed
                        assert outcome.signal == signal.SIGKILL, outcome
                ends[name] = ends.get(name, 0) + 1
            await watch.check(number)
    print(ends)
    assert set(ends) <= {"ok", "signaled", "PoolBrokenError", "SandboxSetupError"}
    assert ends["ok"] > ROUNDS


def everybody(zygote: int) -> list[int]:
    """The pool's zygote and all below: zygotes of sessions, inits, jobs and what these start."""
    found, below = [], [zygote]
    while below:
        found.append(pid := below.pop())
        with suppress(OSError):
            below += children_of(pid)
    return found


async def in_session(pool: Pool) -> None:
    async with pool.session(files={"a": b"hi\n"}) as session:
        kept = await session.run(["sh", "-c", "cat a >b && sleep 0.01"])
        assert not kept.ok or (await session.collect("b")).files == {"b": b"hi\n"}
        view = await session.run(["sh", "-c", "sleep 60 & exec cat a"], keep=False)
        assert not view.ok or view.stdout == b"hi\n"
        check_pair(await session.run_pair(["cat", "a"], ["cat"], transcript=100))


async def in_pair(pool: Pool) -> None:
    ask, answer = ["sh", "-c", "echo hi; read x; sleep 0.02"], ["sh", "-c", "read x; echo $x"]
    check_pair(await pool.run_pair(ask, answer))


async def in_pipeline(pool: Pool) -> None:
    results = await pool.run_group(
        [["echo", "hi"], ["cat"], ["sh", "-c", "sleep 0.02 && exec cat"]]
    )
    if all(result.ok for result in results):
        assert results[2].stdout == b"hi\n"


async def in_talk(pool: Pool) -> None:
    async with pool.open(["cat"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            await process.stdin.send(b"hi\n")
            assert await process.stdout.receive() == b"hi\n"
            await process.stdin.aclose()
        result = await process.result()
        assert result.ok or result.signal == signal.SIGKILL, result


def check_pair(pair: PairResult) -> None:
    """Each is well, or was killed, or has met the end of the other's pipe."""
    assert not pair.idle
    for one in (pair.solution, pair.interactor):
        assert one.status in (Status.OK, Status.NONZERO_EXIT, Status.SIGNALED), one


async def test_random_kills_of_what_is_composed() -> None:
    """Sessions, pairs, pipelines and conversations end with an answer or a named error."""
    chance, ends = seeded(), {"ended": 0}
    async with Pool(limits=LIMITS, parked=2, max_jobs=8) as pool:
        watch = Watch(pool)
        for number in range(rounds(12, 125)):

            async def one(call: Callable[[Pool], Coroutine[Any, Any, None]]) -> None:
                name = "ended"
                try:
                    await call(pool)
                except IsojobError as error:
                    name = type(error).__name__
                ends[name] = ends.get(name, 0) + 1

            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as tasks:
                    for call in (in_session, in_pair, in_pipeline, in_talk):
                        tasks.start_soon(one, call)
                    await anyio.sleep(chance.uniform(0, 0.1 * SLOW))
                    zygote = pool._stock.zygote
                    if zygote is not None:
                        first, *others = everybody(zygote.pid)
                        victim = (
                            first if chance.random() < 0.2 else chance.choice(others or [first])
                        )
                        with suppress(OSError):
                            os.kill(victim, signal.SIGKILL)
            assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)
            await watch.check(number)
    print(ends)
    assert set(ends) <= {"ended", "PoolBrokenError", "PoolClosedError", "SandboxSetupError"}
    assert ends["ended"] or rounds(12, 125) < 5


HOST = """
import os, signal, sys, threading, time, anyio, isojob
token, how, delay = sys.argv[1], sys.argv[2], float(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def job(n):
    return ["sh", "-c", "sleep 60 & sleep 0.0" + str(n), token]
def again(n):
    while True:
        isojob.run_isolated_sync(job(n))
def threads(target):
    for n in range(4):
        threading.Thread(target=target, args=(n,), daemon=True).start()
async def tasks():
    async with isojob.Pool() as pool:
        async def again(n):
            while True:
                await pool.run(job(n))
        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(again, n)
            await anyio.sleep(0.05)
            print("ready", flush=True)
            threading.Thread(target=end, daemon=True).start()
def end():
    time.sleep(delay)
    if how == "fork":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "_exit":
        os._exit(0)
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
def opens(n):
    async def one():
        if n == 3:
            await isojob.run_python("")
        async with isojob.Pool(parked=0) as pool:
            await pool.run(job(n))
    while True:
        anyio.run(one)
if how in ("shutdown", "opens"):
    threads(opens if how == "opens" else again)
    time.sleep(0.2)
    print("ready", flush=True)
    time.sleep(delay)
else:
    anyio.run(tasks)
"""
LATE = """
import atexit, glob, os
def late():
    try:
        print(isojob.run_isolated_sync(["true"]).status)
    except isojob.PoolClosedError as error:
        print(error)
    print(glob.glob(f"/sys/fs/cgroup/**/isojob-{os.getpid()}-*", recursive=True))
atexit.register(late)
import isojob
print(isojob.run_isolated_sync(["true"]).status)
"""


def test_a_call_after_the_end() -> None:
    """What a thread asks for while the interpreter shuts down is refused: nobody would end it."""
    done = subprocess.run(
        [sys.executable, "-c", LATE],
        capture_output=True,
        text=True,
        check=False,
        timeout=BOUND + 40,
    )
    assert done.stdout == "ok\nthe interpreter is shutting down\n[]\n", done.stderr


CUT = """
import os, threading, time, anyio, isojob
from isojob._zygote import Zygote
begun, spawn = threading.Event(), Zygote._spawn
def slow(*arguments):
    begun.set()
    time.sleep(0.5)
    spawn(*arguments)
Zygote._spawn = slow
async def one():
    async with isojob.Pool():
        await anyio.sleep_forever()
threading.Thread(target=anyio.run, args=(one,), daemon=True).start()
begun.wait()
print(os.getpid())
"""


def test_shutdown_waits_for_a_start() -> None:
    """A zygote whose cgroups are there, but which is not, is not left half-way."""
    done = subprocess.run(
        [sys.executable, "-c", CUT],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=BOUND + 40,
    )
    assert not settle(lambda: living() | cgroups(int(done.stdout)))


ENDS = ("SIGKILL", "SIGTERM", "SIGINT", "_exit", "fork", "shutdown", "opens")


def test_host_ends() -> None:
    """Nothing of a host that was killed, exits or falls into shutdown survives it for long."""
    chance, before = seeded(), temporary()
    for number in range(len(ENDS) * max(1, ROUNDS // 25)):
        how = ENDS[number % len(ENDS)]
        token = f"host-{os.getpid()}-{number}"
        delay = str(chance.uniform(0, 0.1 * SLOW))
        with subprocess.Popen(
            [sys.executable, "-c", HOST, token, how, delay],
            stdout=subprocess.PIPE,
            # Tracebacks: of KeyboardInterrupt, of threads that are refused at the end.
            stderr=subprocess.DEVNULL if how in ("SIGINT", "shutdown", "opens") else None,
            text=True,
        ) as host:
            assert host.stdout is not None
            assert host.stdout.readline() == "ready\n"
            child = int(host.stdout.readline()) if how == "fork" else 0
            try:
                host.wait(BOUND)
            finally:
                host.kill()

            def left(pid: int = host.pid, child: int = child) -> set[object]:
                processes = {one for one in living() if one[0] != child}
                return {*processes, *cgroups(pid), *mounts(), *temporary() - before}

            # The child of a fork holds copies of all that its parent had open.
            assert not (there := settle(left, BOUND)), (number, how, there)
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
