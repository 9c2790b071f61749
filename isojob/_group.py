"""Jobs that talk to each other by pipes.

All start together or not at all. The pipes are the kernel's own, from job to job; the host reads
along only where a transcript is wanted, and then passes every byte on itself.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from isojob._account import make_result
from isojob._attempt import attempt
from isojob._descriptors import close
from isojob._ends import drop_after_fork
from isojob._job import CAPTURE, Job
from isojob._map import JobLike, arguments
from isojob._streams import JOBS_BOTH, Meter, open_pipe
from isojob.cgroups import live
from isojob.errors import HostNotSupportedError, PoolClosedError
from isojob.result import Result

if TYPE_CHECKING:
    from isojob._account import Outcome
    from isojob._lease import Lease
    from isojob._pool import Pool
    from isojob._stock import Stock

__all__ = ["Member", "connect", "group", "perform"]


class Member:
    """One job of a group: an `Attended` that holds its ends of the pipes until it has copies."""

    out: Meter | None = None
    err: Meter | None = None
    terminal = False

    def __init__(self, pool: Pool, job: Job, stock: Stock | None = None) -> None:
        self.pool = pool
        self.job = job
        self._stock = stock
        self.result: Result | None = None
        self.ended_ns = 0
        self._ends: list[int] = []
        self._lease: Lease | None = None
        self._outcome: Outcome | None = None
        self._is_idle = False
        self.has_ended = False
        self.at_end: list[Callable[[], None]] = []
        job.attended = self
        drop_after_fork(self)

    def reads(self, fd: int) -> None:
        """Makes a pipe its stdin; the descriptor is ours from now on."""
        self._ends.append(fd)
        self.job.stdin_fd = fd

    def writes(self, fd: int) -> None:
        """Makes a pipe its stdout; the descriptor is ours from now on."""
        self._ends.append(fd)
        self.job.stdout = fd

    def began(self, lease: Lease, outcome: Outcome) -> None:
        """See `Attended`."""
        self._lease, self._outcome = lease, outcome
        if self._is_idle:
            self.end_idle()

    def started(self) -> None:
        """See `Attended`: the end of a stream is seen when nobody but the job has it open."""
        self.close()

    def ended(self) -> None:
        """See `Attended`."""
        self.has_ended = True
        for function in self.at_end:
            function()

    def drop(self) -> None:
        """In a forked child."""
        self.close()

    async def run(self, asked_ns: int) -> None:
        """Runs the job, and closes what it had when it has ended."""
        try:
            stock, admitted = self._stock or self.pool.stock, time.monotonic_ns()
            outcome = await attempt(stock, self.job)
            outcome.host.queue_ns = admitted - asked_ns
            outcome.host.admitted_ns = admitted
            assert outcome.raw is not None
            self.ended_ns = outcome.raw.end_ns
            self.result = make_result(self.job, outcome, stock.posture, None)
        finally:
            self._lease = None
            self.close()

    async def check_accounts(self) -> None:
        """Looks, before it starts, whether its CPU time can be told while it runs.

        Raises:
            HostNotSupportedError: There is no cgroup that counts it.
        """
        stock = self._stock or self.pool.stock
        maker = stock.zygote
        if maker is None:
            maker = await stock.ready()
        if maker.driver.files.cpu is None:
            raise HostNotSupportedError("idle_time without CPU accounting", "give the host cgroups")

    def end_idle(self) -> None:
        """Ends the job; its status is ``killed``."""
        self._is_idle = True
        if self._lease is not None and self._outcome is not None:
            self._outcome.stop_reason("idle")
            self._lease.stop()

    def cpu_ns(self) -> int | None:
        """CPU time so far; 0: it has ended. None: it does not run yet."""
        if self.has_ended:
            return 0
        lease = self._lease
        if lease is None:
            return None
        try:
            return live.read(lease.zygote.driver, lease.zygote.cell_directories(lease.cell))[1]
        except OSError:
            return None

    def close(self) -> None:
        """Closes our copies of its ends. Idempotent."""
        while self._ends:
            close(self._ends.pop())


def connect(source: Member, target: Member) -> None:
    """A pipe from one job's stdout to another's stdin."""
    read_end, write_end = open_pipe(JOBS_BOTH)
    source.writes(write_end)
    target.reads(read_end)


async def perform(members: Sequence[Member], *extra: Any) -> list[Result]:
    """Runs the jobs at once, with further tasks beside them that end when the last job has.

    Raises:
        IsojobError: One of them could not be run; the others were ended.
    """
    failure: BaseException | None = None
    left, asked_ns = len(members), time.monotonic_ns()
    beside = anyio.CancelScope()

    async def one(member: Member) -> None:
        nonlocal failure, left
        try:
            await member.run(asked_ns)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:  # noqa: BLE001 - raised below, not in a group
            failure = failure or error
            tasks.cancel_scope.cancel()
        left -= 1
        if left == 0:
            beside.cancel()

    async def extras() -> None:
        nonlocal failure
        with beside:
            try:
                async with anyio.create_task_group() as further:
                    for function in extra:
                        further.start_soon(function)
            except* Exception as errors:  # noqa: BLE001 - raised below
                failure = failure or errors.exceptions[0]
                tasks.cancel_scope.cancel()

    async with _admitted(members), anyio.create_task_group() as tasks:
        for member in members:
            tasks.start_soon(one, member)
        if extra:
            tasks.start_soon(extras)
    if failure is not None:
        raise failure
    return [member.result for member in members if member.result is not None]


@asynccontextmanager
async def _admitted(members: Sequence[Member]) -> AsyncIterator[None]:
    pools: dict[int, list[Member]] = {}
    for member in members:
        pools.setdefault(id(member.pool), []).append(member)
    async with AsyncExitStack() as stack:
        # In one order for everybody: two groups never wait for each other.
        for _, mine in sorted(pools.items()):
            await stack.enter_async_context(_slots_for(mine[0].pool, mine))
        yield


@asynccontextmanager
async def _slots_for(pool: Pool, members: Sequence[Member]) -> AsyncIterator[None]:
    """Holds a slot of the pool for each, all taken at once."""
    slots, count = pool.slots, len(members)
    if count > slots.total:
        raise ValueError(
            f"{count} jobs at once do not fit into the pool's {slots.total} (max_jobs)"
        )
    if not pool.stock.open:
        raise PoolClosedError
    sizes = [member.job.limits.memory for member in members]
    memory = None if None in sizes else sum(size or 0 for size in sizes)
    reserved = await slots.acquire(memory, count=count)
    try:
        yield
    finally:
        slots.release(reserved, count)


async def group(
    pool: Pool, jobs: Sequence[JobLike], pipes: Sequence[tuple[int, int]] | None
) -> list[Result]:
    """`Pool.run_group`."""
    if isinstance(jobs, (str, bytes, Mapping)) or not isinstance(jobs, Sequence):
        raise TypeError(f"jobs must be a sequence of commands, not {type(jobs).__name__}")
    if not jobs:
        raise ValueError("jobs is empty")
    pipes = [(n, n + 1) for n in range(len(jobs) - 1)] if pipes is None else list(pipes)
    checked = [_job(pool, job) for job in jobs]
    _check_pipes(pipes, checked)
    members = [Member(pool, job) for job in checked]
    try:
        for source, target in pipes:
            connect(members[source], members[target])
        return await perform(members)
    finally:
        for member in members:
            member.close()


def _job(pool: Pool, job: JobLike) -> Job:
    options = arguments(job, "run_group")
    if options.pop("check", False):
        raise ValueError("check= is not for the jobs of a group: look at the results")
    return pool.job(options.pop("command"), options.pop("limits", None), **options)


def _check_pipes(pipes: Sequence[tuple[int, int]], jobs: Sequence[Job]) -> None:
    sources, targets = set[int](), set[int]()
    for pipe in pipes:
        if not isinstance(pipe, tuple) or len(pipe) != 2:
            raise TypeError(f"pipes holds {pipe!r}: give (source, target)")
        source, target = pipe
        for number in pipe:
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"pipes holds {pipe!r}: give the numbers of two jobs")
            if not 0 <= number < len(jobs):
                raise ValueError(f"pipe {pipe!r}: there is no job number {number}")
        if source in sources or target in targets:
            raise ValueError(f"pipe {pipe!r}: that stream has a pipe already")
        if jobs[source].stdout != CAPTURE:
            raise ValueError(f"pipe {pipe!r}: the source has a stdout= of its own")
        given = jobs[target]
        if given.input is not None or given.stdin_fd is not None or given.stdin_file is not None:
            raise ValueError(f"pipe {pipe!r}: the target has an input of its own")
        sources.add(source)
        targets.add(target)
