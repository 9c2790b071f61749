"""Slots: first come, first served, across threads and event loops; waiting costs no descriptor."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable

import anyio
import sniffio

from isojob.errors import PoolClosedError, QueueFullError

__all__ = ["Slots", "default_max_jobs"]


class _Waiter:
    """One waiting task; `wake` may be called from any thread."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.admitted = False
        self._call_soon: Callable[[Callable[[], None]], object]
        if sniffio.current_async_library() == "asyncio":
            self._call_soon = asyncio.get_running_loop().call_soon_threadsafe
        else:
            import trio

            self._call_soon = trio.lowlevel.current_trio_token().run_sync_soon

    def wake(self) -> None:
        """Sets the event in its own loop, unless that loop is gone."""
        try:
            self._call_soon(self.event.set)
        except RuntimeError:  # closed; trio's RunFinishedError is one, too
            self.admitted = False


class Slots:
    """A fair limiter with a bounded queue.

    Args:
        total: Jobs at once.
        queue: Tasks that may wait; None: any number.
    """

    def __init__(self, total: int, queue: int | None) -> None:
        self.total = total
        self._queue = queue
        self._lock = threading.Lock()
        self._free = total
        self._waiting: deque[_Waiter] = deque()
        self._closed = False

    @property
    def running(self) -> int:
        """Slots in use."""
        return self.total - self._free

    @property
    def waiting(self) -> int:
        """Tasks in the queue."""
        return len(self._waiting)

    async def acquire(self) -> None:
        """Waits for a slot; cancelling gives up the place in the queue.

        Raises:
            QueueFullError: The queue is full.
            PoolClosedError: The pool was closed meanwhile.
        """
        with self._lock:
            if self._closed:
                raise PoolClosedError
            if self._free > 0 and not self._waiting:
                self._free -= 1
                return
            if self._queue is not None and len(self._waiting) >= self._queue:
                raise QueueFullError
            waiter = _Waiter()
            self._waiting.append(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            with self._lock:
                if waiter.admitted:
                    self._free += 1
                    self._admit()
                elif waiter in self._waiting:
                    self._waiting.remove(waiter)
            raise
        if not waiter.admitted:
            raise PoolClosedError

    def release(self) -> None:
        """Gives a slot back, to the one who waited longest."""
        with self._lock:
            self._free += 1
            self._admit()

    def _admit(self) -> None:
        while self._free > 0 and self._waiting:
            waiter = self._waiting.popleft()
            waiter.admitted = True
            waiter.wake()
            if waiter.admitted:
                self._free -= 1

    def close(self) -> None:
        """Turns everybody in the queue away."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for waiter in waiting:
            waiter.wake()


def default_max_jobs() -> int:
    """Twice the CPUs, at least 4; but one for each 256 MiB of memory at most."""
    if not hasattr(os, "sched_getaffinity"):
        return 4  # not Linux: no job will run
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    by_cpu = max(4, 2 * len(os.sched_getaffinity(0)))
    return max(1, min(by_cpu, memory // (256 << 20)))
