"""Slots and memory: first come, first served, across threads and event loops.

Waiting costs no descriptor and no thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from isojob._loop import Bell
from isojob._models import Model
from isojob.cgroups import memory_ceiling
from isojob.errors import PoolClosedError, QueueFullError

__all__ = ["PoolStatistics", "Slots", "default_max_jobs", "default_parked", "memory_budget"]

MOST_PARKED = 256


class PoolStatistics(Model, frozen=True):
    """A snapshot of a pool.

    Attributes:
        max_jobs: Slots.
        running: Jobs that have a slot.
        waiting: Calls in the queue.
        memory: What the running jobs may be allowed together, bytes.
        memory_reserved: What they are allowed together.
        parked: Cells ready for a job.
        parked_target: How many there should be; grows with bursts, and shrinks again as jobs end.
        zygotes: Zygotes started so far; more than one means that one died, or was rotated.
    """

    max_jobs: int
    running: int
    waiting: int
    memory: int
    memory_reserved: int
    parked: int
    parked_target: int
    zygotes: int


class _Waiter:
    """One waiting task."""

    def __init__(self, memory: int, count: int) -> None:
        self.bell = Bell()
        self.memory = memory
        self.count = count
        self.admitted = False


class Slots:
    """A fair limiter with a bounded queue.

    Args:
        total: Jobs at once.
        queue: Tasks that may wait; None: any number.
        memory: Bytes that the jobs at once may be allowed together. A job that is allowed more
            than that runs alone.
    """

    def __init__(self, total: int, queue: int | None, memory: int) -> None:
        self.total = total
        self.memory = memory
        self._queue = queue
        # Reentrant: allocating under it may collect garbage, and that an abandoned waiter.
        self._lock = threading.RLock()
        self._running = 0
        self._reserved = 0
        self._waiting: deque[_Waiter] = deque()
        self._closed = False

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._running

    @property
    def reserved(self) -> int:
        """Bytes the running jobs are allowed together."""
        return self._reserved

    @property
    def waiting(self) -> int:
        """Tasks in the queue."""
        return len(self._waiting)

    def acquire_now(self, memory: int | None) -> int | None:
        """A slot if one is free and nobody waits: what to give back with `release`, else None.

        Args:
            memory: Bytes the job is allowed; None: any number.

        Raises:
            PoolClosedError: The pool was closed.
        """
        wanted = self._wanted(memory)
        with self._lock:
            return wanted if self._try(wanted) else None

    async def acquire(self, memory: int | None, *, patient: bool = False, count: int = 1) -> int:
        """Waits for a slot; cancelling gives up the place in the queue.

        Args:
            memory: Bytes the job is allowed; None: any number.
            patient: Wait even where the queue is full.
            count: Slots, all at once, at most `total`.

        Returns:
            What to give back with `release`.

        Raises:
            QueueFullError: The queue is full.
            PoolClosedError: The pool was closed meanwhile.
        """
        wanted = self._wanted(memory)
        waiter = _Waiter(wanted, count)
        with self._lock:
            if self._try(wanted, count):
                return wanted
            if self._queue is not None and len(self._waiting) >= self._queue and not patient:
                raise QueueFullError
            self._waiting.append(waiter)
        try:
            await waiter.bell.wait()
        except BaseException:
            with self._lock:
                if waiter.admitted:
                    self._give_back(wanted, count)
                elif waiter in self._waiting:
                    self._waiting.remove(waiter)
                self._admit()  # whoever stood behind may fit
            raise
        if not waiter.admitted:
            raise PoolClosedError
        return wanted

    def release(self, reserved: int, count: int = 1) -> None:
        """Gives slots back, to the one who waited longest."""
        with self._lock:
            self._give_back(reserved, count)
            self._admit()

    def _wanted(self, memory: int | None) -> int:
        return self.memory if memory is None or memory > self.memory else memory

    def _try(self, wanted: int, count: int = 1) -> bool:
        """Takes slots if they are free and nobody waits."""
        if self._closed:
            raise PoolClosedError
        free = not self._waiting and self._fits(wanted, count)
        if free:
            self._take(wanted, count)
        return free

    def _fits(self, wanted: int, count: int) -> bool:
        return self._running + count <= self.total and self._reserved + wanted <= self.memory

    def _take(self, wanted: int, count: int) -> None:
        self._running += count
        self._reserved += wanted

    def _give_back(self, reserved: int, count: int) -> None:
        self._running -= count
        self._reserved -= reserved

    def _admit(self) -> None:
        # A large job at the head holds up small ones behind it: else it might wait for ever.
        while (waiting := self._waiting) and self._fits(waiting[0].memory, waiting[0].count):
            waiter = waiting.popleft()
            # Before it wakes, in another thread, and before ringing collects garbage and comes here
            # again; a loop that is gone takes no slot.
            self._take(waiter.memory, waiter.count)
            waiter.admitted = True
            waiter.admitted = waiter.bell.ring()
            if not waiter.admitted:
                self._give_back(waiter.memory, waiter.count)

    def close(self) -> None:
        """Turns everybody in the queue away."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
        for waiter in waiting:
            waiter.bell.ring()


def memory_budget() -> int:
    """Bytes that this machine has, or that our own cgroup may use if those are fewer."""
    if not hasattr(os, "sched_getaffinity"):
        return 1 << 40  # not Linux: no job will run
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ceiling = memory_ceiling()
    return physical if ceiling is None else min(physical, ceiling)


def default_parked(max_jobs: int) -> tuple[int, int]:
    """Cells of a kind to keep ready, at least and at most, within a quarter of our descriptors.

    Args:
        max_jobs: Slots.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0, 0
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = MOST_PARKED if soft == resource.RLIM_INFINITY else soft // (4 * 3)
    most = max(1, min(room, max(32, max_jobs), MOST_PARKED))
    return min(8, most), most


def default_max_jobs() -> int:
    """Twice the CPUs we may use, at least 4."""
    if not hasattr(os, "sched_getaffinity"):
        return 4
    return max(4, 2 * len(os.sched_getaffinity(0)))
