"""Leases of one event loop wait in one epoll descriptor, which lives as long as they need it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from isojob._watch import Watch, Watched


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a socket."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def arrived(end: socket.socket) -> bool:
    """Reads without waiting; whether there was something."""
    try:
        return bool(end.recv(1))
    except BlockingIOError:
        return False


def never() -> bool:
    """There is always something to do."""
    return False


def epolls() -> int:
    """Epoll descriptors of this process."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    return names.count("anon_inode:[eventpoll]")


Pair = tuple[socket.socket, socket.socket]


def test_it_hears(pair: Pair) -> None:
    """What comes before, while and after somebody listens; and that nothing comes."""
    ours, theirs = pair

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = epolls()
        watched = Watched(ours.fileno())
        Watch.add_here(watched)
        assert epolls() == before + 1
        theirs.send(b"!")
        await asyncio.sleep(0.01)
        assert await watched.heard(loop, lambda: arrived(ours), never)  # it was there before
        loop.call_later(0.001, theirs.send, b"!")
        assert await watched.heard(loop, lambda: arrived(ours), lambda: True)
        assert not await watched.heard(loop, lambda: False, never)
        watched.unwatch()
        watched.unwatch()
        assert epolls() == before

    asyncio.run(main())


def test_an_error_is_the_listeners(pair: Pair) -> None:
    """What `step` raises, `heard` raises."""
    ours, theirs = pair

    async def main() -> None:
        watched = Watched(ours.fileno())
        asyncio.get_running_loop().call_soon(theirs.close)
        with pytest.raises(ZeroDivisionError):
            await watched.heard(
                asyncio.get_running_loop(), lambda: bool(1 // len(ours.recv(1))), never
            )
        watched.unwatch()

    asyncio.run(main())


def test_a_lease_moves_to_the_loop_that_runs_it(pair: Pair) -> None:
    """Parked in one loop, used in another, when the first one is closed and when it is not."""
    ours, theirs = pair
    before = epolls()
    watched = Watched(ours.fileno())

    async def park() -> None:
        Watch.add_here(watched)

    async def use() -> None:
        theirs.send(b"x")
        assert await watched.heard(asyncio.get_running_loop(), lambda: arrived(ours), never)

    asyncio.run(park())
    asyncio.run(use())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(park(), loop).result()
    asyncio.run(use())
    watched.unwatch()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    del loop
    assert epolls() == before


def test_many_wait_for_one_timer(pair: Pair) -> None:
    """Each wait ends in its time, however many there are."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        sockets = [socket.socketpair() for _ in range(50)]
        watched = [Watched(ours.fileno()) for ours, _ in sockets]
        waits = [asyncio.create_task(one.heard(loop, lambda: False, never)) for one in watched]
        await asyncio.sleep(0.002)
        waits += [asyncio.create_task(Watched(pair[0].fileno()).heard(loop, lambda: False, never))]
        assert await asyncio.wait_for(asyncio.gather(*waits), 5) == [False] * 51
        for one in watched:
            one.unwatch()
        for both in sockets:
            for end in both:
                end.close()

    asyncio.run(main())


def test_idle_waits_go_on(pair: Pair) -> None:
    """As long as there is nothing to do but to wait; what the question raises, the wait raises."""
    ours, theirs = pair
    asked: list[int] = []

    def idle() -> bool:
        asked.append(1)
        return len(asked) < 3

    async def main() -> None:
        loop = asyncio.get_running_loop()
        watched = Watched(ours.fileno())
        assert not await watched.heard(loop, lambda: False, idle)
        assert len(asked) == 3
        asked.clear()
        loop.call_later(0.015, theirs.send, b"!")
        assert await watched.heard(loop, lambda: arrived(ours), lambda: True)
        with pytest.raises(ZeroDivisionError):
            await watched.heard(loop, lambda: False, lambda: bool(1 // 0))
        watched.unwatch()

    asyncio.run(main())


def test_the_loop_that_parked_it_calls_no_other(pair: Pair) -> None:
    """One loop takes the lease over while the other's thread is about to tell it something."""
    ours, theirs = pair
    watched = Watched(ours.fileno())
    threads: list[str] = []
    waits = threading.Event()

    def step() -> bool:
        threads.append(threading.current_thread().name)
        return arrived(ours)

    async def use() -> None:
        asyncio.get_running_loop().call_soon(waits.set)
        assert await watched.heard(asyncio.get_running_loop(), step, lambda: True)

    user = threading.Thread(target=asyncio.run, args=(use(),), name="user")

    class Slow(dict[int, Watched]):
        """Where the thread is preempted between two bytecodes."""

        def get(self, key: int, default: Any = None) -> Any:
            found = super().get(key, default)
            if not waits.is_set():
                user.start()
                assert waits.wait(5)
            return found

    async def park() -> None:
        Watch.add_here(watched)
        watch = watched.watch
        assert watch is not None
        watch._watched = Slow(watch._watched)
        theirs.send(b"!")
        while not waits.is_set():  # noqa: ASYNC110 - its thread is held up
            await asyncio.sleep(0.01)

    asyncio.run(park())
    user.join()
    watched.unwatch()
    assert set(threads) == {"user"}
