"""One job in one cell: send it, stream, cancel, collect the evidence."""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from contextlib import suppress
from functools import partial

from isojob import wire
from isojob._account import Outcome
from isojob._descriptors import close_all, sized_memfd
from isojob._job import CAPTURE, STDOUT, Job
from isojob._lease import Lease
from isojob._loop import running_asyncio, serve
from isojob._shield import in_thread
from isojob._spec import CellSpec
from isojob._streams import Capture, Feed, FileFeed
from isojob._watch import AGAIN_SECONDS, SECONDS
from isojob.errors import PoolBrokenError
from isojob.wire import Failure, JobState, MessageType, Stdio
from isojob.wire_result import CAUSES

__all__ = ["CellFailedError", "CellGoneError", "Run"]

YOUNG_NS = 100_000_000
"""A job that is older gets a service of its own, and bounds for its silence."""
STUCK_SECONDS = 30.0
"""How long zygote and init may be silent when a word from them is due."""
_PARKED, _EXEC, _NONE = int(JobState.PARKED), int(JobState.EXEC), CAUSES.index("none")
MOST_FILES = 2048
"""That init tells of, collected or not, beside two for each pattern (native/collect.c): the first
that cannot be collected, and that there are others."""


class CellFailedError(Exception):
    """The cell could not be made; the job never ran, so it may be tried in another one."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.stage, failure.errno)
        self.failure = failure


class CellGoneError(Exception):
    """The cell ended without a report."""


class Run:
    """One job in one cell.

    Args:
        lease: The cell; it stays the caller's.
        job: What to run.
    """

    __slots__ = (
        "_captures",
        "_collected",
        "_feed",
        "_ready",
        "_started",
        "_told",
        "job",
        "lease",
        "outcome",
        "was_started",
    )

    def __init__(self, lease: Lease, job: Job) -> None:
        self.lease = lease
        self.job = job
        self.outcome = Outcome(lease.zygote.driver)
        self._feed: Feed | FileFeed | None = None
        self._captures: list[Capture] = []
        self._collected = 0
        self._told = 0
        job.patterns.clear()  # of an attempt before
        self._ready: select.epoll | None = None
        self._started: Capture | None = None
        self.was_started = False
        """Whoever attends the job was told that it runs: it cannot be run elsewhere any more."""

    async def run(self, spec: CellSpec) -> Outcome:
        """Sends the job and waits for its end. When it raises, nothing of the cell is left.

        Args:
            spec: What the cell was made with.

        Raises:
            CellFailedError: The cell could not be made.
            CellGoneError: The cell ended without a report.
            PoolBrokenError: Zygote or init is stopped; what is left of the cell ends with its
                zygote.
            OSError: The file given as stdin could not be read.
            wire.WireError: It reported nonsense.
        """
        job, lease, outcome = self.job, self.lease, self.outcome
        try:
            fds, stdio = self._open_streams()
            out = (
                await in_thread(partial(job.message, spec, stdio), many=True)
                if job.reads_files
                else job.message(spec, stdio)
            )
            feed = self._feed
            fed = feed is None or feed.start()
            outcome.host.sent_ns = time.monotonic_ns()
            lease.send(out, fds)
            if job.attended is not None:
                job.attended.began(lease, outcome)
            if job.collect:
                lease.send_collect(job.collect_message())
            for capture in self._captures:
                capture.close_write()  # the launcher has its own copy by now
            if feed is not None:
                feed.close_read()
            loop = running_asyncio()
            if self._started is not None:
                self._started.close_write()
            if self._started is not None or not fed:
                ended = False
            elif loop is not None:
                ended = await lease.heard(loop, self._take_all, self._is_idle)
            else:
                ended = await self._first_on_trio()
            if not ended:
                await self._stream()
            if feed is not None:
                self._check_stdin()
            self._drain()
        except GeneratorExit:  # the event loop is gone: nobody waits any more
            lease.stop()
            raise
        except BaseException as error:
            with suppress(Exception):
                await lease.gone()
            if isinstance(error, (CellFailedError, CellGoneError)):
                self._check_stdin()  # it was ended on that account
            raise
        return outcome

    async def _first_on_trio(self) -> bool:
        seconds = SECONDS
        while not await serve(self.lease.socket.fileno(), self._take_all, seconds):
            if not self._is_idle():
                return False
            seconds = AGAIN_SECONDS
        return True

    def _is_idle(self) -> bool:
        """Whether waiting is all there is to do: the job writes nothing, and is still young.

        Most jobs end before they have written what a pipe holds, and need no more than this look.
        """
        for capture in self._captures:
            capture.drain_some()
            if capture.total:
                return False
        return time.monotonic_ns() - self.outcome.host.sent_ns < YOUNG_NS

    def _check_stdin(self) -> None:
        """A job with half its input proves nothing."""
        if isinstance(self._feed, FileFeed) and self._feed.error is not None:
            raise self._feed.error

    def _open_streams(self) -> tuple[list[int], int]:
        job, lease, outcome = self.job, self.lease, self.outcome
        fds: list[int] = []
        stdio = Stdio.COLLECT if job.collect else 0
        stdio |= Stdio.NO_EXEC if job.no_exec else 0
        if job.stdin_fd is not None:
            fds.append(job.stdin_fd)
            stdio |= Stdio.IN
        elif job.input is not None or job.stdin_file is not None:
            if job.stdin_file is not None:
                self._feed = FileFeed(job.stdin_file, lease.stop)
            else:
                self._feed = Feed(job.input or b"")
            lease.pipes.append(self._feed)
            fds.append(self._feed.read_end)
            stdio |= Stdio.IN
        if job.stdout == CAPTURE:
            outcome.out, kept = self._capture(lease.out, fds)
            stdio |= Stdio.OUT_KEPT if kept else Stdio.OUT
        elif job.stdout >= 0:
            fds.append(job.stdout)
            stdio |= Stdio.OUT
        if job.stderr == CAPTURE:
            outcome.err, kept = self._capture(lease.err, fds)
            stdio |= Stdio.ERR_KEPT if kept else Stdio.ERR
        elif job.stderr == STDOUT:
            stdio |= Stdio.MERGE
        elif job.stderr >= 0:
            fds.append(job.stderr)
            stdio |= Stdio.ERR
        if job.result_size > 0:
            if job.result_fd < 0:  # else from an attempt before
                job.result_fd = sized_memfd("isojob-result", job.result_size)
            fds.append(job.result_fd)
            stdio |= Stdio.RESULT
        if job.attended is not None:
            outcome.out = job.attended.out or outcome.out
            outcome.err = job.attended.err or outcome.err
            stdio |= Stdio.STARTED | (Stdio.TERMINAL if job.attended.terminal else 0)
            self._started = Capture()
            self._started.cap = 1
            lease.pipes.append(self._started)
            fds.append(self._started.write_end)
        return fds, stdio

    def _capture(self, kept: Capture | None, fds: list[int]) -> tuple[Capture, bool]:
        """A pipe for an output stream, and whether the cell has the other end already."""
        capture = kept
        if capture is None:
            capture = Capture()
            self.lease.pipes.append(capture)
            fds.append(capture.write_end)
        capture.cap = self.job.limits.output
        self._captures.append(capture)
        return capture, kept is not None

    def _take_all(self) -> bool:
        """Reads the cell's messages that are there; whether its report was among them."""
        outcome = self.outcome
        while outcome.raw is None:
            try:
                received = self.lease.read()
            except BlockingIOError:
                return False
            if received is None:
                if self.lease.unread:
                    raise CellFailedError(Failure("cell", errno.EOWNERDEAD))
                raise CellGoneError
            datagram, fds = received
            # A report has no descriptors; `_take` closes what came all the same.
            outcome.raw = None if fds else outcome.driver.usual.read(datagram)
            if outcome.raw is None:
                self._take(datagram, fds)
        if outcome.raw.state <= _PARKED and outcome.raw.cause == _NONE:
            # Somebody killed the launcher while it waited: the job has not been read.
            raise CellFailedError(Failure("launcher", 0))
        outcome.host.reply_ns = time.monotonic_ns()
        return True

    def _take(self, datagram: bytes, fds: list[int]) -> None:
        """Reads any message field by field."""
        try:
            message = wire.decode(datagram)
            if message.kind is MessageType.RESULT:
                raw = self.outcome.driver.usual.parse(message)
                if raw.failure is not None and raw.failure.stage == "park":
                    raise CellFailedError(raw.failure)
                self.outcome.raw = raw
            elif message.kind is MessageType.FILE:
                self._collect(wire.parse_file(message), fds)
            elif message.kind is MessageType.ERROR:
                raise CellFailedError(wire.parse_failure(message))
            else:
                raise wire.WireError(f"unexpected message {message.kind}")
        finally:
            if fds:
                close_all(fds)

    async def _stream(self) -> None:
        """A longer job: service its pipes until it ends, and end it if it writes too much.

        Raises:
            PoolBrokenError: Nothing was heard of zygote or init for `STUCK_SECONDS` longer than
                it may take: somebody has stopped them.
        """
        with select.epoll() as self._ready:
            self._ready.register(self.lease.socket, select.EPOLLIN)
            if self._started is not None:
                self._ready.register(self._started.read_end, select.EPOLLIN)
            for capture in self._captures:
                if capture.exceeded:  # by what was read before: perhaps nothing more comes
                    self._stop_for_output()
                    continue
                capture.widen()
                self._ready.register(capture.read_end, select.EPOLLIN)
            if isinstance(self._feed, Feed) and self._feed.write_end >= 0:
                self._feed.widen()
                self._ready.register(self._feed.write_end, select.EPOLLOUT)
            if await serve(self._ready.fileno(), self._service, STUCK_SECONDS):
                return
            zygote = self.lease.zygote
            # Asked in order: a zygote that answers has made our cell before.
            if not await zygote.answers(STUCK_SECONDS):
                if self._service():  # it has ended meanwhile
                    return
                zygote.kill()
                raise PoolBrokenError("the pool's zygote does not answer")
            allowed = self.job.limits.wall_time
            allowed = None if allowed is None else allowed + STUCK_SECONDS
            if not await serve(self._ready.fileno(), self._service, allowed):
                zygote.broken = True  # the next call discards it, and with it goes this init
                raise PoolBrokenError("the cell's init did not end the job at its wall time")

    def _service(self) -> bool:
        """Moves what can be moved without waiting; whether the job has ended."""
        assert self._ready is not None
        captures = {capture.read_end: capture for capture in self._captures}
        for fd, _ in self._ready.poll(0):
            if fd == self.lease.socket.fileno():
                self._take_all()
            elif self._started is not None and fd == self._started.read_end:
                self._look_whether_started(self._started)
            elif fd not in captures:
                assert isinstance(self._feed, Feed)
                if self._feed.step():
                    # First this: a forked child may hold the pipe open, and with it the
                    # registration.
                    self._ready.unregister(fd)
                    self._feed.close_write()
            elif captures[fd].drain_some():
                self._ready.unregister(fd)
                if captures[fd].exceeded:
                    self._stop_for_output()
        return self.outcome.raw is not None

    def _stop_for_output(self) -> None:
        self.outcome.stop_reason("output")
        self.lease.stop()

    def _look_whether_started(self, pipe: Capture) -> None:
        """Closed by execve after a byte; by a launcher that dies after none or two, rarely one."""
        assert self._ready is not None and self.job.attended is not None
        if not pipe.drain():
            return
        self._ready.unregister(pipe.read_end)
        self._take_all()  # the cell's last words, if it has spoken them
        raw = self.outcome.raw
        if pipe.total == 1 and (raw is None or raw.state == _EXEC):
            self.was_started = True
            self.job.attended.started()

    def _drain(self) -> None:
        """Every writer is dead: what is in the pipes is all there will be."""
        for capture in self._captures:
            capture.drain_now()
        if self.job.attended is not None:
            self.job.attended.ended()

    def _collect(self, reply: wire.FileReply, fds: list[int]) -> None:
        files, uncollected = self.outcome.files, self.outcome.uncollected
        name, parts = reply.name, reply.name.split("/")
        self._told += 1
        if self._told > MOST_FILES + 2 * len(self.job.collect):
            raise wire.WireError("more files than there can be")
        if any(part in ("", ".", "..") for part in parts):
            raise wire.WireError("a collected file with a name that leads away")
        self.job.patterns[name] = reply.pattern  # they come in order
        if name in files or name in uncollected:
            return
        if reply.reason is not None or not fds:
            uncollected[name] = reply.reason or "no descriptor was free in this process"
            return
        info = os.fstat(fds[0])
        cap = self.job.limits.collect
        if not stat.S_ISREG(info.st_mode):
            uncollected[name] = "not a regular file"
        elif cap is not None and self._collected + info.st_size > cap:
            uncollected[name] = f"{info.st_size} bytes, more than limits.collect leaves"
        else:
            try:
                data = _read(fds[0], info.st_size)
            except (OSError, MemoryError) as error:
                number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
                uncollected[name] = os.strerror(number or 0)
                return
            self._collected += len(data)
            files[name] = data
            self.job.modes[name] = info.st_mode & 0o777


def _read(fd: int, size: int) -> bytes:
    chunks, at = [], 0
    while at < size and (chunk := os.pread(fd, min(size - at, 1 << 20), at)):
        chunks.append(chunk)
        at += len(chunk)
    return b"".join(chunks)
