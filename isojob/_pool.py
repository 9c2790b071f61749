"""Pool: a zygote, a stock of parked cells, and admission."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import anyio

from isojob import wire
from isojob._account import Outcome, make_result
from isojob._admission import PoolStatistics, Slots, default_max_jobs, memory_budget
from isojob._cell import (
    STUCK_SECONDS,
    CellFailedError,
    CellGoneError,
    Lease,
    run_job,
)
from isojob._job import CAPTURE, DEVNULL, Content, Job, StdioArg, StrOrBytesPath
from isojob._map import JobLike, Results
from isojob._models import parse_bytes
from isojob._shield import in_thread
from isojob._zygote import CellSpec, Zygote, privilege
from isojob.cgroups import Driver
from isojob.errors import IsojobError, PoolBrokenError, PoolClosedError
from isojob.host import failures, kernel
from isojob.host.ids import DEFAULT_RANGE
from isojob.host.posture import check_limits, find_driver, posture
from isojob.host.rootfs import block_devices
from isojob.limits import Limits
from isojob.result import Posture, Result
from isojob.sandbox import Sandbox

__all__ = ["Pool", "PoolStatistics"]

PARKED = 8
_ATTEMPTS = 2


class Pool:
    """Runs jobs in cells that are made ahead of time from one template.

    Use it as an async context manager. Methods may be called from any event loop (asyncio or trio)
    of any thread while it is open. A process that forks does not share its pool with the child.

    Args:
        sandbox: What the jobs see; the template of all cells.
        limits: Used where a call gives none. Cells are parked with these limits; a job that
            differs in more than memory, processes, times and rlimits gets a cell made on demand.
        max_jobs: Jobs at once; by default twice the CPUs, at least 4.
        memory: What the jobs at once may be allowed together, bytes or a string such as
            ``"8GiB"``: the sum of their `Limits.memory`. A larger job runs alone. By default the
            memory of this machine or of our own cgroup.
        parked: Cells kept ready (some 0.6 MB each).
        queue: Calls that may wait for their turn; None: any number.
        uid_range: Host uids and gids to take a block from, as root.
    """

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        limits: Limits | None = None,
        *,
        max_jobs: int | None = None,
        memory: int | str | None = None,
        parked: int | None = None,
        queue: int | None = None,
        uid_range: range = DEFAULT_RANGE,
    ) -> None:
        if max_jobs is not None and max_jobs < 1:
            raise ValueError("max_jobs must be at least 1")
        if parked is not None and parked < 0:
            raise ValueError("parked must not be negative")
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self.limits = Limits() if limits is None else limits
        self._max_jobs = max_jobs or default_max_jobs()
        self._memory = None if memory is None else parse_bytes(memory)
        self._parked = PARKED if parked is None else parked
        self._queue = queue
        self._uid_range = uid_range
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._slots = Slots(self._max_jobs, self._queue, self._memory or memory_budget())
        self._zygote: Zygote | None = None
        self._stock: deque[Lease] = deque()
        self._active: set[Lease] = set()
        self._spec: CellSpec | None = None
        self._driver: Driver | None = None
        self._posture: Posture | None = None
        self._devices: tuple[str, ...] = ()
        self._zygotes = 0
        self.pins = 0
        """Calls that hold the pool but no slot yet; counted by the owner of the default pools."""
        self._retired: list[Zygote] = []

    async def __aenter__(self) -> Self:
        self.open_now()
        try:
            await in_thread(self._ensure_zygote)
        except BaseException:
            await in_thread(self.close)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def open_now(self) -> None:
        """Admits jobs; the zygote starts with the first."""
        if self._open:
            raise RuntimeError("the pool is open already")
        self._reset()
        self._open = True

    async def aclose(self) -> None:
        """Ends every job and cell and waits until nothing of them is left (bounded)."""
        await in_thread(self.close)

    def close(self) -> None:
        """As `aclose`, blocking. Calls still under way end with `PoolClosedError`."""
        with self._lock:
            self._open = False
            zygotes, self._retired = self._retired, []
            if self._zygote is not None:
                zygotes.append(self._zygote)
                self._zygote = None
            stock, self._stock = self._stock, deque()
        self._slots.close()
        for lease in stock:
            lease.close()
        # The cells of a zygote that died earlier listen to nobody else.
        for lease in list(self._active):
            lease.stop()
        for zygote in zygotes:
            zygote.close()

    def forget(self) -> None:
        """In a forked child: lets go of the parent's leases without touching its cells."""
        zygotes = [*self._retired, *([] if self._zygote is None else [self._zygote])]
        stock, active = self._stock, self._active
        was_open = self._open
        self._reset()
        for lease in (*stock, *active):
            lease.close()
        for zygote in zygotes:
            zygote.let_go()
        self._open = was_open

    def _ensure_zygote(self) -> Zygote:
        with self._lock:
            if not self._open:
                raise PoolClosedError
            if self._zygote is not None and self._zygote.alive:
                return self._zygote
            if self._zygote is not None:
                self._discard(self._zygote)
            kernel.check()
            driver = find_driver(self.sandbox.allow_missing)
            devices = block_devices(self.sandbox)
            check_limits(driver, self.limits, devices, self.sandbox.allow_missing)
            zygote = Zygote(self.sandbox, driver, self._uid_range)
            self._driver, self._devices = driver, devices
            self._spec = CellSpec(driver, self.limits, devices)
            self._posture = posture(self.sandbox, driver, privilege(self._uid_range))
            self._zygote = zygote
            self._zygotes += 1
            return zygote

    def _discard(self, zygote: Zygote) -> None:
        """Jobs of it may still run and report: their cgroups and uids stay ours until the last."""
        stock, self._stock = self._stock, deque()
        for lease in stock:
            lease.close()
        self._zygote = None
        self._retired.append(zygote)

    async def _let_go(self, lease: Lease) -> None:
        """Ends a lease; the last one of a discarded zygote takes that along."""
        self._active.discard(lease)
        lease.close()
        if not self._retired:
            return
        with self._lock:
            held = {other.zygote for other in list(self._active)}
            over = [zygote for zygote in self._retired if zygote not in held]
            self._retired = [zygote for zygote in self._retired if zygote in held]
        for zygote in over:
            await in_thread(zygote.close)

    async def _take(self, limits: Limits) -> tuple[Lease, Limits]:
        """A lease, from the stock or made now, and the limits its cell was made with."""
        zygote = self._zygote
        if not self._open:
            raise PoolClosedError
        if zygote is None or not zygote.alive:
            zygote = await in_thread(self._ensure_zygote)
        spec = self._spec
        assert spec is not None and self._driver is not None
        if CellSpec.key_of(limits) == spec.key:
            try:
                return self._stock.popleft(), spec.limits
            except IndexError:
                pass
        else:
            check_limits(self._driver, limits, self._devices, self.sandbox.allow_missing)
            spec = CellSpec(self._driver, limits, self._devices)
        with anyio.move_on_after(STUCK_SECONDS):
            while True:
                try:
                    return Lease(zygote.make(spec), zygote), spec.limits
                except BlockingIOError:
                    await anyio.sleep(0.001)
        zygote.kill()
        raise PoolBrokenError("the pool's zygote does not answer")

    def _refill(self) -> None:
        """After the job is on its way: its cell's successor is made while it runs."""
        zygote, spec = self._zygote, self._spec
        if zygote is None or spec is None or not self._open:
            return
        try:
            while len(self._stock) < self._parked:
                self._stock.append(Lease(zygote.make(spec), zygote))
        except (OSError, PoolBrokenError):
            return  # the next job that finds the stock empty says why

    async def run(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        limits: Limits | None = None,
        input: bytes | None = None,
        stdin: StdioArg = DEVNULL,
        stdout: StdioArg = CAPTURE,
        stderr: StdioArg = CAPTURE,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        files: Mapping[str, Content] | None = None,
        collect: Sequence[str] = (),
        check: bool = False,
    ) -> Result:
        """Runs one job in a fresh cell; the arguments are those of `run_isolated`."""
        return await self._run(
            command,
            limits=limits,
            check=check,
            input=input,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            files=files,
            collect=collect,
        )

    def map(
        self, jobs: Iterable[JobLike] | AsyncIterable[JobLike], *, ordered: bool = False
    ) -> Results:
        """Runs many jobs, as many at once as there are slots, and yields their results.

            async for result in pool.map(["prog", str(n)] for n in range(10_000)):
                print(result.index, result.status)

        Jobs are taken and results kept only as fast as the caller takes results: at most twice
        the slots are in memory. Cancelling ends what runs before it returns; so does `aclose` or
        leaving it as an async context manager. These jobs wait, however full the queue is.

        Args:
            jobs: Commands, or mappings with the arguments of `run`, from any iterable.
            ordered: Yield in the order of the jobs, else as they end; `Result.index` tells.

        Raises:
            IsojobError: While iterating, what `run` raises for a job, with a note that tells
                which; the others end.
        """
        run = partial(self._run, patient=True)
        return Results(run, jobs, ordered=ordered, workers=self._max_jobs)

    async def _run(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        limits: Limits | None = None,
        check: bool = False,
        patient: bool = False,
        index: int | None = None,
        **options: Any,
    ) -> Result:
        limits = self.limits if limits is None else limits
        job = Job.make(command, sandbox=self.sandbox, limits=limits, **options)
        if not self._open:
            raise PoolClosedError
        asked = time.monotonic_ns()
        slots = self._slots
        reserved = await slots.acquire(limits.memory, patient=patient)
        queued = time.monotonic_ns() - asked
        try:
            outcome = await self._attempt(job)
        finally:
            slots.release(reserved)
        outcome.host.queue_ns = queued
        assert self._driver is not None and self._posture is not None
        result = make_result(job, outcome, self._driver, self._posture, index)
        if check:
            result.check_returncode()
        return result

    async def _attempt(self, job: Job) -> Outcome:
        for attempt in range(_ATTEMPTS):
            try:
                lease, parked = await self._take(job.limits)
            except PoolBrokenError:
                if attempt == _ATTEMPTS - 1:
                    raise
                continue  # with a new zygote
            self._active.add(lease)
            try:
                assert self._driver is not None
                # Not before the message is out; run_job sends without a pause.
                outcome = await run_job(lease, job, self._driver, parked, self._refill)
            except CellFailedError as error:
                # A parked cell may have failed long ago, for a reason that has passed.
                if error.failure.stage == "zygote":
                    lease.zygote.broken = True
                if attempt == _ATTEMPTS - 1:
                    raise failures.to_exception(error.failure) from None
            except (CellGoneError, wire.WireError) as error:
                raise self._why_gone(lease.zygote, error) from None
            else:
                if not self._open:
                    # Closing ends what runs, by more than one way: no verdict is true any more.
                    raise self._why_gone(lease.zygote, CellGoneError())
                return outcome
            finally:
                await self._let_go(lease)
        raise AssertionError

    def _why_gone(self, zygote: Zygote, error: Exception) -> IsojobError:
        if not self._open:
            return PoolClosedError("the pool was closed while the job ran")
        if isinstance(error, wire.WireError):
            return PoolBrokenError(f"the cell's init sent nonsense: {error}")
        return zygote.diagnose()

    @property
    def busy(self) -> bool:
        """Whether jobs run, wait or are about to."""
        return self.pins > 0 or self._slots.running > 0 or self._slots.waiting > 0

    def statistics(self) -> PoolStatistics:
        """A snapshot of slots, queue and stock."""
        return PoolStatistics(
            max_jobs=self._max_jobs,
            running=self._slots.running,
            waiting=self._slots.waiting,
            memory=self._slots.memory,
            memory_reserved=self._slots.reserved,
            parked=len(self._stock),
            zygotes=self._zygotes,
        )


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
