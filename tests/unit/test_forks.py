"""What threads and forks of the host find half done, without a job."""

from __future__ import annotations

import socket
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from environment import run_python

from isojob import Pool, PoolBrokenError
from isojob._admission import Slots
from isojob._loop import Bell
from isojob._maker import Maker
from isojob._shield import in_thread
from isojob.cgroups.discovery import NoCgroups

pytestmark = pytest.mark.anyio


def test_a_child_closes_no_number_of_somebody_elses() -> None:
    """Of a file as stdin a thread closes both descriptors; their numbers are given out again."""
    done = run_python(
        "import os, sys, tempfile",
        "from isojob._streams import FileFeed",
        "with tempfile.TemporaryFile() as file:",
        "    feed = FileFeed(file.fileno(), lambda: None)",
        "    numbers = feed._file, feed.write_end",
        "    feed.start()",
        "    assert os.read(feed.read_end, 1) == b''",
        "    while any(os.path.exists(f'/proc/self/fd/{fd}') for fd in numbers): pass",
        "    others = [os.dup(file.fileno()) for _ in range(8)]",
        "    assert set(numbers) <= set(others)",
        "    if (child := os.fork()) == 0:",
        "        feed.close()",
        "        os._exit(sum(not os.path.exists(f'/proc/self/fd/{fd}') for fd in others))",
        "    assert os.waitpid(child, 0)[1] == 0",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_has_no_part_in_a_start() -> None:
    """Locks of a zygote that another thread starts just now are the parent's."""
    stock = Pool()._stock
    let_go: list[str] = []

    class Start:
        def give_up(self) -> None:
            pytest.fail("it is the parent's")

        def let_go(self) -> None:
            let_go.append("start")

    with stock.starts.awaited(), stock.starts.under_way(Start()):
        stock.let_go()
        assert let_go == ["start"]
        stock.starts._under_way.clear()


async def test_threads_are_not_the_applications() -> None:
    """All of its own may wait for us."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        with anyio.fail_after(20):
            async with limiter:
                assert await in_thread(lambda: 42) == 42
    finally:
        limiter.total_tokens = before


def test_a_pool_that_is_opened_again_as_it_closes() -> None:
    """Only what it had is closed."""
    pool = Pool()
    old = pool._stock
    old.open = True

    class Kept:
        def close(self) -> None:
            pool._reset()
            pool._stock.open = True

    pool._sessions = {cast("Any", Kept())}
    pool.close()
    assert not old.open
    assert pool._stock is not old
    assert pool._stock.open
    pool.close()


def test_a_socket_that_has_just_been_closed() -> None:
    """By another thread: the zygote is gone, and no descriptor of the caller's is wrong."""
    maker = Maker(NoCgroups("", ""), own_ids=True)
    maker._control, theirs = socket.socketpair()
    maker._control.close()
    with theirs, pytest.raises(PoolBrokenError):
        maker.make(None)
    assert maker.broken


async def test_admission_within_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ringing allocates, and what it collects may admit the next: not into the same slot."""
    slots = Slots(1, None, 100)
    assert slots.acquire_now(1) is not None
    most = 0
    ring = Bell.ring

    def rings(bell: Bell) -> bool:
        nonlocal most
        slots._admit()
        most = max(most, slots.running)
        return ring(bell)

    async def one() -> None:
        slots.release(await slots.acquire(1))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(one)
        with anyio.fail_after(20):
            while slots.waiting < 3:
                await anyio.lowlevel.checkpoint()
        monkeypatch.setattr(Bell, "ring", rings)
        slots.release(1)
    assert most == 1
    assert slots.running == 0
