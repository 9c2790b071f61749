"""Sessions: one kept working directory, many jobs, each in a fresh cell."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Unpack

import anyio

from isojob import mounts
from isojob._cache import Cache
from isojob._job import Content, Job, StrOrBytesPath, check_files, content_size, read_content
from isojob._options import OpenOptions, PairOptions, RunOptions, check_options
from isojob._outputs import below, misfits, refused, without
from isojob._pair import Pair, PairResult, Place
from isojob._process import IsolatedProcess, opened
from isojob._session_zygote import SessionStock, SessionZygote
from isojob._shield import in_thread
from isojob._turns import Turns
from isojob.errors import SandboxSetupError
from isojob.limits import Limits
from isojob.result import Result, Status, Usage

if TYPE_CHECKING:
    from isojob._pool import Pool

__all__ = ["Session"]

_NOTHING: Sequence[StrOrBytesPath] = ("(no program)",)
_MORE_MEMORY = 16 << 20
"""For who writes files, beside them."""
_PATIENT: Mapping[str, None] = {"wall_time": None, "cpu_time": None}
"""Of what no program does, but isojob: whoever waits can cancel."""


def _is_closed(job: Job) -> bool:
    """Whether nothing comes or goes by streams of the caller's, of which no key can tell."""
    streams = (job.stdin_fd, job.stdin_file)
    return streams == (None, None) and job.stdout < 0 and job.stderr < 0


def _has_ended(result: Result) -> bool:
    """By itself: the same again would end the same."""
    return result.status in (Status.OK, Status.NONZERO_EXIT)


class Session:
    """A working directory that outlives its jobs. Made by `Pool.session`; of one event loop.

    A job sees the directory as its working directory and owns what is in it. As root all jobs of a
    session have the same host id: they are one stranger's. /tmp, /dev/shm and everything else are
    fresh for each.

    Attributes:
        limits: Used where a run gives none.
    """

    def __init__(
        self, pool: Pool, zygote: SessionZygote, limits: Limits, cache: Cache | None
    ) -> None:
        self.limits = limits
        # What the directory may hold can be written at once.
        self._own_limits = limits.model_copy(update={"disk": zygote.disk, **_PATIENT})
        self._cache = cache
        self._pool = pool
        self._zygote = zygote
        # Who renames a directory above a mount takes it along, in cells that are parked, too.
        moved = any(
            mounts.below(os.path.dirname(mount.target), pool.sandbox.workdir)
            for mount in pool.sandbox.mounts
        )
        self._kept = SessionStock(pool.stock, zygote, limits, private=False, parked=not moved)
        self._private = SessionStock(pool.stock, zygote, limits, private=True)
        self._turns = Turns()
        self._total = Usage.total(())
        self._history = b""
        if cache is not None:
            room = f"{zygote.disk} {zygote.inodes} "
            self._history = (room + pool.sandbox.model_dump_json()).encode()

    async def run(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        keep: bool = True,
        limits: Limits | None = None,
        check: bool = False,
        outputs: Sequence[str] = (),
        **options: Unpack[RunOptions],
    ) -> Result:
        """Runs one job in a fresh cell on the session's directory.

        Args:
            command: As for `run_isolated`.
            keep: What the job does to the directory stays; such jobs run one at a time, and no
                others meanwhile. False: it works on a copy-on-write view of its own, that goes with
                it; any number at once. Its changes count as its `Limits.disk`.
            limits: As for `run_isolated`; by default the session's.
            check: Raise `JobFailedError` unless the status is ``ok``.
            outputs: Names and patterns of what the job makes: nothing else of what it does to the
                directory stays, and that only if the job is ``ok`` and all can be collected and
                fits into the directory: `Result.uncollected` tells what does not, and where there
                was no room left some of them may stay. Then a session with a cache does not run
                it where the same was run before, on a directory that came about in the same way.
                Names that may hold ``*``, ``?`` or ``[`` go through `glob.escape`.
            **options: The other arguments of `run_isolated` but for `sandbox`.

        Raises:
            PoolBrokenError: The zygote died, and with it the directory.
            PoolClosedError: The session or the pool is closed.
            JobFailedError: `check` is set, and the status is another.
            TypeError, ValueError, IsojobError: As `run_isolated`.
        """
        check_options("run", options, RunOptions.__optional_keys__)
        limits = self.limits if limits is None else limits
        if outputs:
            if not keep:
                raise ValueError("outputs= names what is kept: leave keep=False away")
            result = await self._make(command, limits, outputs, dict(options))
        else:
            result = await self._run(command, limits, keep=keep, **options)
        if check:
            result.check_returncode()
        return result

    async def _run(
        self,
        command: Sequence[StrOrBytesPath],
        limits: Limits,
        *,
        keep: bool,
        no_exec: bool = False,
        **options: Any,
    ) -> Result:
        job = self._job(command, limits, options)
        job.no_exec = no_exec
        if not keep:
            async with self._turns.shared():
                return await self._perform(job, keep=False)
        async with self._turns.alone():
            # Whatever does not end by itself leaves nobody knows what.
            before, self._history = self._history, os.urandom(32)
            try:
                result = await self._perform(job, keep=True)
            finally:
                self._private.make_anew()
            if self._cache is not None and _is_closed(job) and _has_ended(result):
                self._history = Cache.key(before, job)
            return result

    @asynccontextmanager
    async def open(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        keep: bool = True,
        limits: Limits | None = None,
        **options: Unpack[OpenOptions],
    ) -> AsyncIterator[IsolatedProcess]:
        """Starts a job on the session's directory, to talk to.

        Args:
            command: As for `open_isolated`.
            keep: As for `run`: while such a job is open no other works on the directory, so do
                not wait for one inside the block. One that is not kept keeps others from
                keeping: no `put`, and no run that is kept, inside the block.
            limits: As for `open_isolated`; by default the session's.
            **options: The other arguments of `open_isolated` but for `sandbox`.

        Raises:
            PoolBrokenError: The zygote died, and with it the directory.
            PoolClosedError: The session or the pool is closed.
            TypeError, ValueError, IsojobError: As `open_isolated`.
        """
        check_options("open", options, OpenOptions.__optional_keys__)
        stock = self._kept if keep else self._private
        limits = self.limits if limits is None else limits
        async with self._turns.alone() if keep else self._turns.shared():
            if keep:
                self._history = os.urandom(32)  # nobody knows what it was told
            try:
                async with opened(
                    self._pool, command, limits=limits, stock=stock, **options
                ) as process:
                    try:
                        yield process
                    finally:
                        await process.aclose()
                        # An error is for whoever asks for the result, not instead of the block's.
                        with anyio.CancelScope(shield=True), suppress(Exception):
                            result = await process.result()
                            self._total = Usage.total((self._total, result.usage))
            finally:
                if keep:
                    self._private.make_anew()

    async def run_pair(
        self,
        solution: Sequence[StrOrBytesPath],
        interactor: Sequence[StrOrBytesPath],
        *,
        interactor_session: Session | None = None,
        **options: Unpack[PairOptions],
    ) -> PairResult:
        """Runs two programs that talk, as `Pool.run_pair`, on views that go with them.

        Args:
            solution: Works on a copy-on-write view of this session's directory.
            interactor: Works on one of `interactor_session`'s; without, on an empty directory.
            interactor_session: May be of another pool, or this one.
            **options: As for `isojob.run_pair`, but for sandboxes; limits are by default those of
                the session where a program runs.

        Raises:
            PoolBrokenError: A zygote died, and with it a directory.
            PoolClosedError: A session or its pool is closed.
            TypeError, ValueError, IsojobError: As `isojob.run_pair`.
        """
        other = interactor_session
        if other is not None and not isinstance(other, Session):
            raise TypeError(f"interactor_session must be a session, not {type(other).__name__}")
        here = Place(self._pool, self.limits, self._private)
        there = None if other is None else Place(other._pool, other.limits, other._private)
        both = Pair.make(solution, here, interactor, there, options)
        async with AsyncExitStack() as turns:
            # In one order for everybody: two pairs never wait for each other.
            for session in sorted({self, other or self}, key=id):
                await turns.enter_async_context(session._turns.shared())
            result = await both.run()
        self._total = Usage.total((self._total, result.solution.usage))
        if other is not None:
            other._total = Usage.total((other._total, result.interactor.usage))
        return result

    def _job(
        self, command: Sequence[StrOrBytesPath], limits: Limits, options: dict[str, Any]
    ) -> Job:
        job = self._pool.job(command, limits, **options)
        if self._cache is not None and job.files:  # read once: what runs is what is remembered
            contents = {name: read_content(content) for name, content in job.files.items()}
            job.files = {name: (data, mode) for name, (mode, data) in contents.items()}
        return job

    async def _perform(self, job: Job, *, keep: bool) -> Result:
        result = await self._pool.perform(job, stock=self._kept if keep else self._private)
        if not job.no_exec:
            self._total = Usage.total((self._total, result.usage))
        elif not result.ok:
            raise SandboxSetupError("files of a session", 0, str(result))
        return result

    async def _make(
        self,
        command: Sequence[StrOrBytesPath],
        limits: Limits,
        outputs: Sequence[str],
        options: dict[str, Any],
    ) -> Result:
        collect = options.get("collect", ())
        for name, value in (("outputs", outputs), ("collect", collect)):
            if isinstance(value, (str, bytes)):
                raise TypeError(f"{name} must be a sequence of names, such as [{value!r}]")
        collect, outputs = tuple(collect), tuple(outputs)
        job = self._job(command, limits, {**options, "collect": (*collect, *outputs)})
        place = below(job.cwd, job.workdir)
        async with self._turns.shared():
            cache = self._cache if _is_closed(job) else None
            key = b"" if cache is None else Cache.key(self._history, job, len(outputs))
            found = None if cache is None else cache.get(key)
            if found is None:
                result = await self._perform(job, keep=False)
                made = [name for name, at in job.patterns.items() if at >= len(collect)]
                if not result.ok or any(name in result.uncollected for name in made):
                    return result
                found = (result, {name: (result.files[name], job.modes[name]) for name in made})
                if cache is not None:
                    cache.put(key, *found)
        result, files = found
        placed = {place + name: content for name, content in files.items()}
        # Not remembered: another session may have the room.
        unfit = misfits(placed, self._own_limits.disk)
        if placed and not unfit:
            try:
                await self.put(placed)
            except SandboxSetupError as error:
                unfit = refused(placed, error)
        return without(result, {name.removeprefix(place): why for name, why in unfit.items()})

    async def put(self, files: Mapping[str, Content]) -> None:
        """Writes files into the directory, instead of what is there under these names.

        Args:
            files: As for `run_isolated`.

        Raises:
            SandboxSetupError: There is no room, or what a job has left stands in the way: a
                directory under that name; above it a file, a link, or a closed directory (mode 0).
            PoolBrokenError, PoolClosedError: As `run`.
            TypeError, ValueError: Files that no job can be given.
        """
        limits = self._own_limits
        files = check_files(files, limits)
        if limits.memory is not None:
            needed = sum(map(content_size, files.values())) + _MORE_MEMORY
            limits = limits.model_copy(update={"memory": max(limits.memory, needed)})
        await self._run(_NOTHING, limits, keep=True, no_exec=True, files=files)

    async def collect(self, *patterns: str) -> Result:
        """Reads files of the directory, as ``collect=`` of a run does.

        Args:
            *patterns: Names and patterns, relative to the directory.

        Returns:
            A result whose ``files`` and ``uncollected`` tell what was found.

        Raises:
            PoolBrokenError, PoolClosedError: As `run`.
            TypeError, ValueError: Names that lead out of the directory.
        """
        limits = self.limits.model_copy(update=_PATIENT)
        return await self._run(_NOTHING, limits, keep=False, no_exec=True, collect=patterns)

    def usage(self) -> Usage:
        """What the runs so far have used: sums of times and counts, the highest of the peaks.

        Of those that came to a result: neither cancelled ones nor what a cache had, and not what
        `put` and `collect` do.
        """
        return self._total

    async def aclose(self) -> None:
        """Ends what runs, and removes the directory. Idempotent."""
        await in_thread(self.close)

    def close(self) -> None:
        """As `aclose`, blocking."""
        self._kept.open = self._private.open = False  # before anybody is told
        self._kept.close()
        self._private.close()
        self._zygote.sweep()

    def let_go(self) -> None:
        """In a forked child: closes the descriptors."""
        for stock in (self._kept, self._private):
            stock.open = False
            stock.let_go()
