"""One lease: send the job, stream, cancel, collect the evidence.

The lease is the host's end of the cell's socket. Shutting its write side tells init to end the job
and report; closing it, in whatever way, ends the cell. End of file on it means that every process,
mount and cgroup of the cell is gone.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from contextlib import suppress

import anyio
from anyio import CancelScope

from isojob import wire
from isojob._account import Outcome
from isojob._descriptors import close_all, receive_fds, sealed_memfd, send_fds
from isojob._job import CAPTURE, STDOUT, Job
from isojob._loop import readable
from isojob._shield import shielded
from isojob._spec import CellSpec
from isojob._streams import Capture, Feed, FileFeed
from isojob._zygote import Zygote
from isojob.errors import PoolBrokenError
from isojob.wire import Failure, MessageType, Stdio, Writer

__all__ = ["CellFailedError", "CellGoneError", "Lease", "run_job"]

LATE_READER_SECONDS = 0.005
"""Most short jobs are over by then, and their pipes need no watching at all."""
GONE_SECONDS = 5.0
"""How long a cancelled call waits for the end of its cell; 500 processes take 23 ms."""
STUCK_SECONDS = 30.0
"""How long zygote and init may be silent when a word from them is due."""
BUDGET = 4 << 20
"""Bytes from one pipe before the others have their turn."""


class CellFailedError(Exception):
    """The cell could not be made; the job never ran, so it may be tried in another one."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.stage, failure.errno)
        self.failure = failure


class CellGoneError(Exception):
    """The cell ended without a report."""


class Lease:
    """The host's end of one cell.

    Attributes:
        zygote: Whose cell it is.
        pipes: Those of its job, which end with it.
    """

    __slots__ = ("_stopped", "pipes", "socket", "zygote")

    def __init__(self, lease: socket.socket, zygote: Zygote) -> None:
        self.socket = lease
        self._stopped = False
        self.zygote = zygote
        self.pipes: list[Capture | Feed | FileFeed] = []

    def send(self, out: Writer, fds: list[int]) -> None:
        """Sends the job; never blocks: the socket is empty and takes a whole message."""
        body = -1
        try:
            if out.length > wire.INLINE_MAX:
                body = sealed_memfd("isojob-job", out.body())
                send_fds(self.socket, out.header(memfd=True), [body, *fds])
            else:
                send_fds(self.socket, out.message(), fds)
        except (BrokenPipeError, ConnectionResetError):
            # What init said before it went is still to be read.
            pass
        finally:
            if body >= 0:
                os.close(body)

    def send_collect(self, message: bytes) -> None:
        """Leaves init its errand; it reads it when the job is over."""
        with suppress(BrokenPipeError, ConnectionResetError):
            send_fds(self.socket, message, [])

    def read(self) -> tuple[wire.Message, list[int]] | None:
        """The next message with its descriptors, or None at end of file.

        Raises:
            BlockingIOError: Nothing there yet.
            wire.WireError: Not a message.
        """
        while True:
            try:
                datagram, fds, flags = receive_fds(self.socket, wire.RECEIVE_SIZE)
            except ConnectionResetError:
                # An unread message of ours died with the cell; its last words are still there.
                continue
            if not datagram and not fds:
                return None
            try:
                # MSG_CTRUNC is no reason: no descriptor was free for the file that came with it.
                if flags & socket.MSG_TRUNC:
                    raise wire.WireError("a message was cut off")
                return wire.decode(datagram), fds
            except BaseException:
                close_all(fds)
                raise

    async def receive(self) -> tuple[wire.Message, list[int]] | None:
        """Waits for what `read` returns."""
        while True:
            try:
                return self.read()
            except BlockingIOError:
                await anyio.wait_readable(self.socket)

    def stop(self) -> None:
        """Tells init to end the job now and report. Idempotent."""
        if not self._stopped:
            self._stopped = True
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    async def gone(self) -> bool:
        """Waits until nothing of the cell is left, bounded; whether that was seen."""
        self.stop()
        deadline = anyio.current_time() + GONE_SECONDS
        return await shielded(lambda: self._until_end_of_file(deadline))

    async def _until_end_of_file(self, deadline: float) -> bool:
        with CancelScope(deadline=deadline):
            while True:
                try:
                    received = await self.receive()
                except wire.WireError:
                    continue
                if received is None:
                    return True
                close_all(received[1])
        return False

    def close(self) -> None:
        """Lets go; whatever still runs in the cell ends. Idempotent, from any thread."""
        self.socket.close()
        while self.pipes:
            self.pipes.pop().close()


class _Run:
    def __init__(self, lease: Lease, job: Job) -> None:
        self.lease = lease
        self.job = job
        self.outcome = Outcome(lease.zygote.driver)
        self.feed: Feed | FileFeed | None = None
        self.captures: dict[str, Capture] = {}
        self._collected = 0

    async def run(self, spec: CellSpec) -> Outcome:
        """Sends the job and waits for its end; the caller owns the lease."""
        job = self.job
        try:
            fds, stdio = self._open_streams()
            out = (
                await anyio.to_thread.run_sync(job.message, spec, stdio)
                if job.files
                else job.message(spec, stdio)
            )
            fed = self.feed is None or self.feed.start()
            self.outcome.host.sent_ns = time.monotonic_ns()
            self.lease.send(out, fds)
            if job.collect:
                self.lease.send_collect(job.collect_message())
            for capture in self.captures.values():
                capture.sent()
            if self.feed is not None:
                self.feed.sent()
            while fed and self.outcome.raw is None:
                if not await readable(self.lease.socket, LATE_READER_SECONDS):
                    break
                self._take_all()
            if self.outcome.raw is None:
                await self._stream()
            self._check_stdin()
            self._drain()
        except GeneratorExit:  # the event loop is gone: nobody waits any more
            self.lease.stop()
            raise
        except BaseException as error:
            with suppress(Exception):
                await self.lease.gone()
            if isinstance(error, (CellFailedError, CellGoneError)):
                self._check_stdin()  # it was ended on that account
            raise
        return self.outcome

    def _check_stdin(self) -> None:
        """A job with half its input proves nothing."""
        if isinstance(self.feed, FileFeed) and self.feed.error is not None:
            raise self.feed.error

    def _open_streams(self) -> tuple[list[int], Stdio]:
        job, fds, stdio = self.job, [], Stdio(0)
        if job.collect:
            stdio |= Stdio.COLLECT
        if job.stdin_fd is not None:
            fds.append(job.stdin_fd)
            stdio |= Stdio.IN
        elif job.input is not None or job.stdin_file is not None:
            if job.stdin_file is not None:
                self.feed = FileFeed(job.stdin_file, self.lease.stop)
            else:
                self.feed = Feed(job.input or b"")
            self.lease.pipes.append(self.feed)
            fds.append(self.feed.read_end)
            stdio |= Stdio.IN
        for name, wanted, flag in (
            ("stdout", job.stdout, Stdio.OUT),
            ("stderr", job.stderr, Stdio.ERR),
        ):
            if wanted == CAPTURE:
                capture = self.captures[name] = Capture(job.limits.output)
                self.lease.pipes.append(capture)
                fds.append(capture.write_end)
                stdio |= flag
            elif wanted == STDOUT:
                stdio |= Stdio.MERGE
            elif wanted >= 0:
                fds.append(wanted)
                stdio |= flag
        return fds, stdio

    def _take_all(self) -> None:
        """Reads the cell's messages that are there, up to its report."""
        with suppress(BlockingIOError):
            while self.outcome.raw is None:
                self._take(self.lease.read())

    def _take(self, received: tuple[wire.Message, list[int]] | None) -> None:
        if received is None:
            raise CellGoneError
        message, fds = received
        try:
            match message.kind:
                case MessageType.RESULT:
                    raw = wire.parse_result(message)
                    if raw.failure is not None and raw.failure.stage == "park":
                        raise CellFailedError(raw.failure)
                    self.outcome.raw = raw
                case MessageType.FILE:
                    self._collect(wire.parse_file(message), fds)
                case MessageType.ERROR:
                    raise CellFailedError(wire.parse_failure(message))
                case _:
                    raise wire.WireError(f"unexpected message {message.kind}")
        finally:
            close_all(fds)

    async def _stream(self) -> None:
        """A longer job: service its pipes until it ends, and end it if it writes too much.

        Raises:
            PoolBrokenError: Nothing was heard of zygote or init for `STUCK_SECONDS` longer than
                it may take: somebody has stopped them.
        """
        with select.epoll() as poll:
            poll.register(self.lease.socket, select.EPOLLIN)
            for capture in self.captures.values():
                capture.widen()
                poll.register(capture.read_end, select.EPOLLIN)
            if isinstance(self.feed, Feed) and self.feed.write_end >= 0:
                self.feed.widen()
                poll.register(self.feed.write_end, select.EPOLLOUT)
            await self._service(poll, STUCK_SECONDS)
            if self.outcome.raw is None:
                zygote = self.lease.zygote
                # Asked in order: a zygote that answers has made our cell before.
                if not await zygote.answers(STUCK_SECONDS):
                    zygote.kill()
                    raise PoolBrokenError("the pool's zygote does not answer")
                allowed = self.job.limits.wall_time
                await self._service(poll, None if allowed is None else allowed + STUCK_SECONDS)
                if self.outcome.raw is None:
                    zygote.broken = True  # the next call discards it, and with it goes this init
                    raise PoolBrokenError("the cell's init did not end the job at its wall time")

    async def _service(self, poll: select.epoll, seconds: float | None) -> None:
        captures = {capture.read_end: capture for capture in self.captures.values()}
        with anyio.move_on_after(seconds):
            while self.outcome.raw is None:
                await anyio.wait_readable(poll.fileno())
                for fd, _ in poll.poll(0):
                    if fd == self.lease.socket.fileno():
                        self._take_all()
                    elif fd not in captures:
                        assert isinstance(self.feed, Feed)
                        if self.feed.step():
                            # First this: a forked child may hold the pipe open, and with it the
                            # registration.
                            poll.unregister(fd)
                            self.feed.close_write()
                    elif captures[fd].drain(budget=BUDGET):
                        poll.unregister(fd)
                        if captures[fd].exceeded:
                            self.outcome.stop_reason("output")
                            self.lease.stop()

    def _drain(self) -> None:
        """Every writer is dead: what is in the pipes is all there will be."""
        host, job = self.outcome.host, self.job
        for name, capture in self.captures.items():
            capture.drain()
            setattr(self.outcome, name, capture.data())
            setattr(host, f"{name}_bytes", capture.total)
            setattr(host, f"{name}_exceeded", capture.exceeded)
        if job.stdout != CAPTURE:
            self.outcome.stdout = None

    def _collect(self, reply: wire.FileReply, fds: list[int]) -> None:
        files, uncollected = self.outcome.files, self.outcome.uncollected
        name, parts = reply.name, reply.name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise wire.WireError("a collected file with a name that leads away")
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
            data = _read(fds[0], info.st_size)
            self._collected += len(data)
            files[name] = data


def _read(fd: int, size: int) -> bytes:
    chunks, at = [], 0
    while at < size and (chunk := os.pread(fd, min(size - at, 1 << 20), at)):
        chunks.append(chunk)
        at += len(chunk)
    return b"".join(chunks)


async def run_job(lease: Lease, job: Job, spec: CellSpec) -> Outcome:
    """Runs one job in one cell. When it raises, nothing of the cell is left (bounded wait).

    Args:
        lease: The cell; it stays the caller's.
        job: What to run.
        spec: What the cell was made with.

    Raises:
        CellFailedError: The cell could not be made.
        CellGoneError: The cell ended without a report.
        PoolBrokenError: Zygote or init is stopped; what is left of the cell ends with its zygote.
        OSError: The file given as stdin could not be read.
        wire.WireError: It reported nonsense.
    """
    return await _Run(lease, job).run(spec)
