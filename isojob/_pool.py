"""Pool: a zygote, a stock of parked cells, and admission."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from isojob._account import make_result
from isojob._admission import (
    PoolStatistics,
    Slots,
    default_max_jobs,
    default_parked,
    memory_budget,
)
from isojob._attempt import attempt
from isojob._cache import Cache
from isojob._group import group
from isojob._job import Content, Environment, Job, StrOrBytesPath
from isojob._map import JobLike, Results
from isojob._models import parse_bytes
from isojob._options import OpenOptions, PairOptions, RunOptions, check_options
from isojob._pair import Pair, PairResult, Place
from isojob._process import IsolatedProcess, opened
from isojob._session import Session
from isojob._session_opening import opened_session
from isojob._shield import in_thread
from isojob._shutdown import each, end_with_process
from isojob._stock import Stock
from isojob.errors import PoolClosedError
from isojob.host.ids import DEFAULT_RANGE
from isojob.limits import Limits
from isojob.result import Result
from isojob.sandbox import Sandbox

__all__ = ["Pool", "PoolStatistics"]


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
        parked: Cells kept ready (0.3 MB and three descriptors each) for jobs with the pool's own
            limits, and at most so many for each other kind of limits that jobs bring. By default 8,
            and more when bursts of jobs were found to need more.
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
        for name, value, kind in (("sandbox", sandbox, Sandbox), ("limits", limits, Limits)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(
                    f"{name} must be isojob.{kind.__name__}, not {type(value).__name__}"
                )
        for name, count, least in (
            ("max_jobs", max_jobs, 1),
            ("parked", parked, 0),
            ("queue", queue, 0),
        ):
            if count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an int, not {type(count).__name__}")
            if count < least:
                raise ValueError(f"{name} must be at least {least}")
        if not isinstance(uid_range, range):
            raise TypeError(f"uid_range must be a range, not {type(uid_range).__name__}")
        if uid_range.start < 0 or uid_range.step != 1:
            raise ValueError(f"uid_range must be a range of ids, each of them, not {uid_range}")
        if memory is not None and not (memory := parse_bytes(memory)):
            raise ValueError("memory must be at least 1 (None: what there is)")
        self.sandbox = Sandbox() if sandbox is None else sandbox
        self.limits = Limits() if limits is None else limits
        self._environment = Environment.make(self.sandbox.environment())
        self._max_jobs = max_jobs or default_max_jobs()
        self._memory = memory_budget() if memory is None else memory
        self._parked = default_parked(self._max_jobs) if parked is None else (parked, parked)
        self._queue = queue
        self._uid_range = uid_range
        self._reset()
        end_with_process(self)

    def _reset(self) -> None:
        self._slots = Slots(self._max_jobs, self._queue, self._memory)
        self._stock = self._new_stock()
        self._sessions: set[Session] = set()
        self.pins = 0
        """Calls that hold the pool but no slot yet; counted by the owner of the default pools."""

    def _new_stock(self) -> Stock:
        return Stock(self.sandbox, self.limits, self._parked, self._uid_range)

    async def __aenter__(self) -> Self:
        self.open_now()
        await self.started()
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
        if self._stock.open:
            raise RuntimeError("the pool is open already")
        self._reset()
        self._stock.open = True

    async def started(self) -> None:
        """Waits for the zygote; the pool is closed if it does not come."""
        try:
            await self._stock.ready()
        except BaseException:
            await in_thread(self.close)
            raise

    async def aclose(self) -> None:
        """Ends every job and cell and waits until nothing of them is left (bounded)."""
        await in_thread(self.close)

    def close(self) -> None:
        """As `aclose`, blocking. Calls still under way end with `PoolClosedError`."""
        # Somebody may open it again meanwhile, with others.
        stock, slots, sessions = self._stock, self._slots, list(self._sessions)
        stock.open = False  # before anybody in the queue is told
        each([*(session.close for session in sessions), slots.close, stock.close])

    def forget(self) -> None:
        """In a forked child: lets go of the parent's leases without touching its cells."""
        before, sessions = self._stock, list(self._sessions)
        self._reset()
        self._stock.open = before.open
        for session in sessions:
            session.let_go()
        before.let_go()

    async def run(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        limits: Limits | None = None,
        check: bool = False,
        **options: Unpack[RunOptions],
    ) -> Result:
        """Runs one job in a fresh cell; arguments and errors are those of `run_isolated`."""
        check_options("run", options, RunOptions.__optional_keys__)
        return await self._run(command, limits=limits, check=check, **options)

    def open(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        limits: Limits | None = None,
        **options: Unpack[OpenOptions],
    ) -> AbstractAsyncContextManager[IsolatedProcess]:
        """Starts a job to talk to; arguments and errors are those of `open_isolated`."""
        check_options("open", options, OpenOptions.__optional_keys__)
        return opened(self, command, limits=limits, **options)

    def session(
        self,
        *,
        files: Mapping[str, Content] | None = None,
        limits: Limits | None = None,
        disk: int | str | None = None,
        inodes: int | None = None,
        cache: Cache | None = None,
    ) -> AbstractAsyncContextManager[Session]:
        """Keeps one working directory over several jobs: compile once, run many times.

            async with pool.session(files={"main.c": source}) as session:
                await session.run(["gcc", "-o", "main", "main.c"], check=True)
                result = await session.run(["./main"], keep=False, input=case)

        Each job has a fresh cell with limits and a verdict of its own. Leaving the block ends the
        jobs, and the directory with all that is in it.

        Args:
            files: Written into the directory first, as for `run_isolated`.
            limits: Used where a run gives none; by default the pool's.
            disk: Capacity of the directory, bytes or a string such as ``"64MiB"``; by default
                ``limits.disk``. What a job is allowed itself is for its /tmp, /dev/shm and changes.
            inodes: Files and directories in it; by default ``limits.inodes``.
            cache: Remembers what runs with ``outputs=`` made, also for other sessions.

        Raises:
            TypeError, ValueError: An argument that makes no sense.
            PoolClosedError: The pool is closed.
            PoolBrokenError: The zygote died.
            SandboxSetupError: The directory could not be made.
        """
        return opened_session(
            self, self._sessions, files=files, limits=limits, disk=disk, inodes=inodes, cache=cache
        )

    async def run_pair(
        self,
        solution: Sequence[StrOrBytesPath],
        interactor: Sequence[StrOrBytesPath],
        *,
        interactor_pool: Pool | None = None,
        **options: Unpack[PairOptions],
    ) -> PairResult:
        """Runs two programs that talk to each other; see `isojob.run_pair`.

        Args:
            solution: The one command.
            interactor: The other.
            interactor_pool: Where the interactor runs, for a sandbox of its own, under that pool's
                limits if it is given none; by default here, under the solution's.
            **options: As for `isojob.run_pair`, but for sandboxes.

        Raises:
            TypeError: An argument of the wrong type, or one that there is not.
            ValueError: An argument that makes no sense: this pool has one slot, and both run here.
            IsojobError: One could not be run: the other was ended.
        """
        if interactor_pool is not None and not isinstance(interactor_pool, Pool):
            raise TypeError(f"interactor_pool must be a pool, not {type(interactor_pool).__name__}")
        here = Place(self, self.limits)
        there = None if interactor_pool is None else Place(interactor_pool, interactor_pool.limits)
        return await Pair.make(solution, here, interactor, there, options).run()

    async def run_group(
        self,
        jobs: Sequence[JobLike],
        pipes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Result]:
        """Runs jobs at once, each in a cell of its own, connected by pipes.

            await pool.run_group([["cat", "words"], ["sort"], ["uniq", "-c"]])

        The jobs cannot reach each other but for the pipes. All start or none; each has its own
        limits and its own verdict. What goes from job to job is not counted by ``limits.output``.

        Args:
            jobs: Commands, or mappings with the arguments of `run`, at most ``max_jobs``.
            pipes: (source, target) pairs of positions in `jobs`: the one's stdout is the other's
                stdin. By default a pipeline: each writes to the next.

        Returns:
            The results, in the order of the jobs; ``stdout`` is None where a pipe has it.

        Raises:
            TypeError: What is no job, or no pipe.
            ValueError: More jobs than slots, or pipes that make no sense.
            IsojobError: A job could not be run: the others were ended.
        """
        return await group(self, jobs, pipes)

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
        job = self.job(command, limits, **options)
        result = await self.perform(job, patient=patient, index=index)
        if check:
            result.check_returncode()
        return result

    def job(self, command: Sequence[StrOrBytesPath], limits: Limits | None, **options: Any) -> Job:
        """A checked request; for the other modules of isojob."""
        return Job.make(
            command,
            sandbox=self.sandbox,
            limits=self.limits if limits is None else limits,
            environment=self._environment,
            **options,
        )

    @property
    def stock(self) -> Stock:
        """The pool's cells; for the other modules of isojob."""
        return self._stock

    @property
    def slots(self) -> Slots:
        """The same of admission."""
        return self._slots

    async def perform(
        self,
        job: Job,
        *,
        patient: bool = False,
        index: int | None = None,
        stock: Stock | None = None,
    ) -> Result:
        """Admits a job and runs it; for the other modules of isojob."""
        limits = job.limits
        # Closing and opening the pool again replaces both.
        stock, slots = stock or self._stock, self._slots
        if not stock.open:
            raise PoolClosedError(stock.closed)
        asked = admitted = time.monotonic_ns()
        reserved = slots.acquire_now(limits.memory)
        if reserved is None:
            reserved = await slots.acquire(limits.memory, patient=patient)
            admitted = time.monotonic_ns()
        try:
            outcome = await attempt(stock, job)
        finally:
            slots.release(reserved)
        outcome.host.queue_ns = admitted - asked
        outcome.host.admitted_ns = admitted
        return make_result(job, outcome, stock.posture, index)

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
            parked=self._stock.parked,
            parked_target=self._stock.wanted,
            zygotes=self._stock.started,
        )
