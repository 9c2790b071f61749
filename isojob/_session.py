"""Sessions: one kept working directory, many jobs, each in a fresh cell."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from typing_extensions import override

from isojob import wire
from isojob._cache import Cache
from isojob._descriptors import close_all, receive_fds
from isojob._job import Content, StrOrBytesPath, read_content
from isojob._maker import Maker
from isojob._models import parse_bytes
from isojob._shelf import Level, Shelf
from isojob._shield import in_thread
from isojob._spec import CellSpec
from isojob._stock import Stock
from isojob._zygote import START_SECONDS, STOP_SECONDS, Zygote
from isojob.errors import PoolBrokenError, PoolClosedError
from isojob.host import failures
from isojob.limits import Limits
from isojob.result import Result, Usage
from isojob.verdict import total
from isojob.wire import MessageType, Tag, Writer

if TYPE_CHECKING:
    from isojob._pool import Pool

__all__ = ["Session", "opened_session"]

_GONE = "the session's directory went with the pool's zygote"
_NOTHING: Sequence[StrOrBytesPath] = ("(no program)",)


class SessionZygote(Maker):
    """The zygote of a session, a child of the pool's."""

    def __init__(self, parent: Zygote, disk: int, inodes: int) -> None:
        super().__init__(parent.driver)
        self._parent = parent
        self._pidfd = -1
        self.numbers = parent.numbers
        self.subtree = parent.subtree
        message = Writer(MessageType.SESSION)
        message.number(Tag.DISK, disk)
        message.number(Tag.INODES, inodes)
        self._control = control = parent.ask_for_session(message.message())
        try:
            control.settimeout(START_SECONDS)
            self._await_ready(control)
            control.setblocking(False)
        except BaseException:
            self.let_go()
            raise

    def _await_ready(self, control: socket.socket) -> None:
        try:
            datagram, fds, _ = receive_fds(control)
        except TimeoutError:
            raise PoolBrokenError("the pool's zygote does not answer") from None
        except ConnectionResetError:
            datagram, fds = b"", []
        close_all(fds)
        if not datagram:
            raise PoolBrokenError("the pool's zygote died")
        message = wire.decode(datagram)
        if message.kind is not MessageType.READY:
            raise failures.to_exception(wire.parse_failure(message))
        self._pid = wire.parse_ready(message)
        # It cannot be another's yet: it just spoke, and its parent is the zygote.
        self._pidfd = os.pidfd_open(self._pid)

    @property
    @override
    def pid(self) -> int:
        return self._pid

    @property
    @override
    def alive(self) -> bool:
        return not self.broken and self._control is not None and self._parent.alive

    @override
    def kill(self) -> None:
        self.broken = True
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @override
    def close(self) -> None:
        control, self._control = self._control, None
        if control is None:
            return
        try:
            with suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)
            control.close()
            # Not its end of the socket: its namespace, and the directory with it, go after that.
            if self._pidfd >= 0:
                dead = select.poll()
                dead.register(self._pidfd, select.POLLIN)
                if not dead.poll(STOP_SECONDS * 1000):
                    self.kill()
        finally:
            self._close_pidfd()

    @override
    def let_go(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class SessionStock(Stock):
    """The cells of a session that change its directory, or those that copy it."""

    def __init__(self, of: Stock, zygote: SessionZygote, limits: Limits, *, private: bool) -> None:
        super().__init__(of.sandbox, limits, of.wanted_range, of.uid_range)
        self._private = private
        self.devices = of.devices
        self._posture = of.posture
        self.zygote = zygote
        most = self.wanted_range[1]
        self._shelf = Shelf(self._spec(zygote, limits), Level(min(1, most), most))
        self.open = True

    @override
    def _spec(self, zygote: Maker, limits: Limits) -> CellSpec:
        return CellSpec(zygote.driver, limits, self.devices, private=self._private)

    @override
    def start(self) -> Maker:
        if not self.open:
            raise PoolClosedError
        raise PoolBrokenError(_GONE)

    def make_anew(self) -> None:
        """Lets go of the parked cells: what they copied has changed."""
        for shelf in self._shelves():
            shelf.empty()


class _Turns:
    """Many may read, or one write; who wants to write is next."""

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._writers = 0
        self._changed = anyio.Event()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while self._writing or self._writers:
            await self._changed.wait()
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._change()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._writers += 1
        try:
            while self._writing or self._readers:
                await self._changed.wait()
            self._writing = True
        finally:
            self._writers -= 1
            self._change()
        try:
            yield
        finally:
            self._writing = False
            self._change()


class Session:
    """A working directory that outlives its jobs. Made by `Pool.session`; of one event loop.

    A job sees the directory as its working directory and owns what is in it. As root all jobs of a
    session have the same host id: they are one stranger's. /tmp, /dev/shm and everything else are
    fresh for each.
    """

    def __init__(
        self, pool: Pool, zygote: SessionZygote, limits: Limits, cache: Cache | None
    ) -> None:
        self.limits = limits
        self._cache = cache
        self._pool = pool
        self._kept = SessionStock(pool.stock, zygote, limits, private=False)
        self._private = SessionStock(pool.stock, zygote, limits, private=True)
        self._turns = _Turns()
        self._usages: list[Usage] = []
        self._history = b"" if cache is None else pool.sandbox.model_dump_json().encode()

    async def run(
        self,
        command: Sequence[StrOrBytesPath],
        *,
        keep: bool = True,
        limits: Limits | None = None,
        check: bool = False,
        outputs: Sequence[str] = (),
        **options: Any,
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
                directory stays, and that only if the job is ``ok`` and all can be collected. Then
                a session with a cache does not run it where the same was run before, on a
                directory that came about in the same way.
            **options: The other arguments of `run_isolated` but for `sandbox`.

        Raises:
            PoolBrokenError: The zygote died, and with it the directory.
            PoolClosedError: The session or the pool is closed.
        """
        limits = self.limits if limits is None else limits
        if outputs:
            if not keep:
                raise ValueError("outputs= names what is kept: leave keep=False away")
            result = await self._make(command, limits, outputs, options)
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
        modes: dict[str, int] | None = None,
        **options: Any,
    ) -> Result:
        job = self._pool.job(command, limits, **options)
        job.no_exec = no_exec
        stock = self._kept if keep else self._private
        turn = self._turns.alone() if keep else self._turns.shared()
        async with turn:
            try:
                result = await self._pool.perform(job, stock=stock)
            finally:
                if keep:
                    self._private.make_anew()
                    if self._cache is not None:
                        self._history = Cache.key(self._history, job)
        if modes is not None:
            modes.update(job.modes)
        if not no_exec:
            self._usages.append(result.usage)
        return result

    async def _make(
        self,
        command: Sequence[StrOrBytesPath],
        limits: Limits,
        outputs: Sequence[str],
        options: dict[str, Any],
    ) -> Result:
        if isinstance(outputs, (str, bytes)):
            raise TypeError(f"outputs must be a sequence of names, such as [{outputs!r}]")
        wanted = {**options, "collect": (*options.get("collect", ()), *outputs)}
        job = self._pool.job(command, limits, **wanted)
        if job.files:  # read once: what is run is what is remembered
            contents = {name: read_content(content) for name, content in job.files.items()}
            wanted["files"] = {name: (data, mode) for name, (mode, data) in contents.items()}
            job = self._pool.job(command, limits, **wanted)
        key = b"" if self._cache is None else Cache.key(self._history, job)
        found = None if self._cache is None else self._cache.get(key)
        if found is None:
            modes: dict[str, int] = {}
            result = await self._run(command, limits, keep=False, modes=modes, **wanted)
            if not result.ok or result.uncollected:
                return result
            found = result, {name: (data, modes[name]) for name, data in result.files.items()}
            if self._cache is not None:
                self._cache.put(key, *found)
        result, files = found
        if files:
            await self.put(files)
        return result

    async def put(self, files: Mapping[str, Content]) -> None:
        """Writes files into the directory, instead of what is there under these names.

        Args:
            files: As for `run_isolated`; at most ``limits.disk`` bytes at once.

        Raises:
            SandboxSetupError: There is no room, or a directory stands in the way.
        """
        await self._run(_NOTHING, self.limits, keep=True, no_exec=True, files=files)

    async def collect(self, *patterns: str) -> Result:
        """Reads files of the directory, as ``collect=`` of a run does.

        Args:
            *patterns: Names and patterns, relative to the directory.

        Returns:
            A result whose ``files`` and ``uncollected`` tell what was found.
        """
        return await self._run(_NOTHING, self.limits, keep=False, no_exec=True, collect=patterns)

    def usage(self) -> Usage:
        """What all runs so far have used: sums of times and counts, the highest of the peaks."""
        return total(self._usages)

    async def aclose(self) -> None:
        """Ends what runs, and removes the directory. Idempotent."""
        await in_thread(self.close)

    def close(self) -> None:
        """As `aclose`, blocking."""
        self._kept.close()
        self._private.close()

    def let_go(self) -> None:
        """In a forked child: closes the descriptors."""
        for stock in (self._kept, self._private):
            stock.open = False
            stock.let_go()


@asynccontextmanager
async def opened_session(
    pool: Pool,
    sessions: set[Session],
    *,
    files: Mapping[str, Content] | None,
    limits: Limits | None,
    disk: int | str | None,
    inodes: int | None,
    cache: Cache | None,
) -> AsyncIterator[Session]:
    """`Pool.session`."""
    limits = pool.limits if limits is None else limits
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be isojob.Limits, not {type(limits).__name__}")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"cache must be isojob.Cache, not {type(cache).__name__}")
    size = limits.disk if disk is None else parse_bytes(disk)
    if inodes is not None and (isinstance(inodes, bool) or not isinstance(inodes, int)):
        raise TypeError(f"inodes must be an int, not {type(inodes).__name__}")
    if inodes is not None and inodes < 1:
        raise ValueError("inodes must be at least 1")
    if not pool.stock.open:
        raise PoolClosedError
    zygote = await in_thread(pool.stock.start)
    assert isinstance(zygote, Zygote)
    own = await in_thread(partial(SessionZygote, zygote, size or 0, (inodes or limits.inodes) or 0))
    session = Session(pool, own, limits, cache)
    sessions.add(session)
    try:
        if files:
            await session.put(files)
        yield session
    finally:
        sessions.discard(session)
        await session.aclose()
