"""One epoll descriptor for an asyncio event loop, in which leases wait for their cells' reports.

The loop's own add_reader and remove_reader, for each job, cost more than all else that a call does
around its wait. So a lease is registered when its cell is parked, in the epoll of the loop that
parked it, and the loop watches one descriptor. trio's own way is cheap as it is.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import select
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, TypeAlias

from isojob._loop import Service, running_asyncio

__all__ = ["Watch", "Watched"]

SECONDS = 0.002
"""How long `Watched.heard` waits before it looks whether there is more to do than waiting."""
AGAIN_SECONDS = 0.008
"""How long until it looks again."""


class Watched:
    """A descriptor that a `Watch` looks after; `Lease` is one."""

    __slots__ = ("_fd", "_heard", "_service", "_watch")

    def __init__(self, fd: int) -> None:
        # Weak, as all that cells and the registry know of a loop and its waits: it alone has these,
        # until it is closed.
        self._watch: weakref.ref[Watch] | None = None
        self._service: weakref.ref[_Wait] | None = None
        self._fd = fd
        self._heard = False

    @property
    def watch(self) -> Watch | None:
        """Where it is registered."""
        return None if self._watch is None else self._watch()

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self._watch = None if watch is None else weakref.ref(watch)

    def ready(self, watch: Watch) -> None:
        """There is something to read, or the other end has gone. Said once (EPOLLET)."""
        self._heard = True
        service = None if (waits := self._service) is None else waits()
        # In this order: another loop's thread that takes it over is told by its own epoll.
        if service is not None and self.watch is watch:
            service.ready()

    async def heard(
        self, loop: asyncio.AbstractEventLoop, step: Callable[[], bool], idle: Callable[[], bool]
    ) -> bool:
        """Waits until `step` says that all is done; false if there is more to do than to wait.

        Args:
            loop: The running one.
            step: Reads without waiting, all there is.
            idle: Asked now and then: whether there is nothing to do but to wait.

        Raises:
            OSError: The kernel watches no more descriptors.
        """
        watch = self.watch
        if watch is None or watch.loop() is not loop:
            watch = Watch.add(loop, self)
        wait = _Wait(step, loop.create_future(), idle)
        self._service = weakref.ref(wait)
        watch.expect(loop, wait)
        if self._heard:  # before anybody listened
            self.ready(watch)
        try:
            return await wait.future
        finally:
            self._service = None

    def unwatch(self) -> None:
        """Ends the registration, before the descriptor is closed. Idempotent, from any thread."""
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.remove(self._fd)


class _Wait(Service):
    __slots__ = ("idle",)

    def __init__(
        self, step: Callable[[], bool], future: asyncio.Future[bool], idle: Callable[[], bool]
    ) -> None:
        super().__init__(step, future)
        self.idle = idle


_Expected: TypeAlias = tuple[float, int, _Wait]
_Registry: TypeAlias = "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[Watch]]"


class Watch:
    """The epoll descriptor of one loop. It lives while something is registered in it."""

    _lock = threading.RLock()
    _all: ClassVar[_Registry] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        """Weak: neither a parked cell nor the registry keeps a closed loop."""
        self._owner = os.getpid()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._expected: list[_Expected] = []
        """Every wait that is not over, with when it is looked at next: it has no other holder."""
        self._count = 0
        loop.add_reader(self._epoll.fileno(), self._serve)

    @classmethod
    def add(cls, loop: asyncio.AbstractEventLoop, watched: Watched) -> Watch:
        """Registers a descriptor with the running loop, instead of where it was.

        Raises:
            OSError: The kernel watches no more descriptors.
        """
        watched.unwatch()
        with cls._lock:
            known = cls._all.get(loop)
            watch = None if known is None else known()
            if watch is None or watch._owner != os.getpid():
                watch = cls(loop)
                cls._all[loop] = weakref.ref(watch)
            watch._epoll.register(watched._fd, select.EPOLLIN | select.EPOLLET)
            watch._watched[watched._fd] = watched
            watched.watch = watch
        return watch

    @classmethod
    def add_here(cls, watched: Watched) -> None:
        """The same if this is asyncio; at leisure, so that a job need not wait for it."""
        with suppress(RuntimeError, OSError):  # no loop; no room
            loop = running_asyncio()
            if loop is not None:
                cls.add(loop, watched)

    def remove(self, fd: int) -> None:
        """Ends a registration, whatever thread or process this is."""
        if self._owner != os.getpid():  # another thread there may hold the lock
            return
        with self._lock:
            if self._watched.pop(fd, None) is None:
                return
            # Not left to close(2): a fork of ours may hold the descriptor open.
            with suppress(OSError):
                self._epoll.unregister(fd)
            loop = self.loop()
            if self._watched or loop is None:
                return
            try:
                if asyncio._get_running_loop() is loop:
                    self._close_if_idle()
                else:
                    loop.call_soon_threadsafe(self._close_if_idle)
            except RuntimeError:  # it is closed, and watches nothing any more
                self._all.pop(loop, None)
                self._epoll.close()

    def _close_if_idle(self) -> None:
        with self._lock:
            loop = self.loop()
            if not self._watched and not self._epoll.closed and loop is not None:
                self._all.pop(loop, None)
                loop.remove_reader(self._epoll.fileno())
                self._epoll.close()

    def _serve(self) -> None:
        for fd, _ in self._epoll.poll(0):
            watched = self._watched.get(fd)
            if watched is not None:
                watched.ready(self)

    def expect(self, loop: asyncio.AbstractEventLoop, wait: _Wait) -> None:
        """Answers False for that wait when it is no longer idle. One timer serves all waits."""
        if not self._expected:
            loop.call_later(SECONDS, self._tick)
        self._push(SECONDS, wait)

    def _push(self, seconds: float, wait: _Wait) -> None:
        self._count += 1  # no two are equal: the rest is never compared
        heapq.heappush(self._expected, (time.monotonic() + seconds, self._count, wait))

    def _tick(self) -> None:
        expected = self._expected
        # A little early is as good: else the first look would often be the second tick's.
        now = time.monotonic() + SECONDS / 4
        while expected and expected[0][0] <= now:
            _, _, wait = heapq.heappop(expected)
            if wait.future.done():
                continue
            try:
                if wait.idle():
                    self._push(AGAIN_SECONDS, wait)
                else:
                    wait.future.set_result(False)
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                wait.future.set_exception(error)
        loop = self.loop()
        if expected and loop is not None:
            loop.call_later(SECONDS, self._tick)


def _after_fork_in_child() -> None:
    Watch._lock = threading.RLock()
    Watch._all = weakref.WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
