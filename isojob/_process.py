"""A job that the caller talks to while it runs: an `anyio.abc.Process`."""

from __future__ import annotations

import errno
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.abc
from anyio.abc import ByteReceiveStream, ByteSendStream
from typing_extensions import override

from isojob._account import usage_so_far
from isojob._cell import STUCK_SECONDS
from isojob._descriptors import close
from isojob._ends import Receiver, Sender, drop_after_fork
from isojob._job import CAPTURE, DEVNULL, Job
from isojob._loop import spawn
from isojob._options import terminal_size
from isojob._shield import shielded
from isojob._streams import Capture, Feed, Meter
from isojob.cgroups import live
from isojob.errors import HostNotSupportedError, PoolClosedError
from isojob.result import Result, Usage

if sys.platform != "win32":
    import fcntl
    import termios
    from signal import pidfd_send_signal

if TYPE_CHECKING:
    from isojob._account import Outcome
    from isojob._lease import Lease
    from isojob._pool import Pool
    from isojob._stock import Stock

__all__ = ["PIPE", "IsolatedProcess"]

PIPE = CAPTURE
"""A stream that the caller writes or reads (the value of `subprocess.PIPE`)."""
_JOB = 2  # pid 1 is init


class IsolatedProcess(anyio.abc.Process):
    """A job under way. Made by `open_isolated`, `Pool.open` and `Session.open`.

    Its limits hold as they do in `run_isolated`, output included: what is read beyond
    ``limits.output`` ends it. A stream that nobody reads blocks the job, until its wall time ends.
    """

    def __init__(self, job: Job, terminal: tuple[int, int] | None) -> None:
        self.out: Meter | None = None
        self.err: Meter | None = None
        self.terminal = terminal is not None
        self._job = job
        self._lease: Lease | None = None
        self._outcome: Outcome | None = None
        self._stop: Literal["kill", "output"] | None = None
        self._began_ns = 0
        self._usage: Usage | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._scope = anyio.CancelScope()
        self._task: object = None
        self._is_started = anyio.Event()
        self._has_ended = anyio.Event()
        self._ends: list[int] = []
        """The job's ends of its streams, until it has copies."""
        self._master = -1
        self._stdin: Sender | None = None
        self._stdout: Receiver | None = None
        self._stderr: Receiver | None = None
        job.attended = self
        drop_after_fork(self)
        try:
            if terminal is None:
                self._open_pipes()
            else:
                self._open_terminal(*terminal)
        except BaseException:
            self.close_streams()
            raise

    def _open_pipes(self) -> None:
        job, cap = self._job, self._job.limits.output
        if job.stdin_fd == PIPE:
            feed = Feed(b"")
            self._stdin, job.stdin_fd = Sender(feed.write_end), feed.read_end
            self._ends.append(feed.read_end)
        if job.stdout == PIPE:
            self.out = Meter(cap)
            self._stdout, job.stdout = self._receiver(self.out)
        if job.stderr == PIPE:
            self.err = Meter(cap)
            self._stderr, job.stderr = self._receiver(self.err)

    def _receiver(self, meter: Meter) -> tuple[Receiver, int]:
        pipe = Capture()
        self._ends.append(pipe.write_end)
        return Receiver(pipe.read_end, meter, self._too_much), pipe.write_end

    def _open_terminal(self, rows: int, columns: int) -> None:
        job = self._job
        master, slave = os.openpty()
        self._ends.append(slave)
        self.out = Meter(job.limits.output)
        # One more descriptor, so that each stream can be closed by itself.
        self._stdout = Receiver(master, self.out, self._too_much)
        os.set_blocking(master, False)
        self._stdin = Sender(fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3), is_terminal=True)
        self._master = fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, 3)
        job.stdin_fd = job.stdout = job.stderr = slave
        self.resize(rows, columns)

    def began(self, lease: Lease, outcome: Outcome) -> None:
        """See `Attended`."""
        self._lease, self._outcome = lease, outcome
        self._began_ns = time.monotonic_ns()
        if self._stop is not None:
            self._end(self._stop)

    def started(self) -> None:
        """See `Attended`."""
        self._is_started.set()

    def ended(self) -> None:
        """See `Attended`."""
        for stream in (self._stdout, self._stderr):
            if stream is not None:
                stream.measure()

    def drop(self) -> None:
        """In a forked child: the streams are dropped by themselves."""
        self._close_ends()
        if self._master >= 0:
            close(self._master)
            self._master = -1

    def _too_much(self) -> None:
        self._end("output")

    def _end(self, why: Literal["kill", "output"]) -> None:
        """Ends the job; the first reason stays."""
        self._stop = self._stop or why
        if self._lease is not None and self._outcome is not None:
            self._outcome.stop_reason(self._stop)
            self._lease.stop()

    def start(self, pool: Pool, stock: Stock | None) -> None:
        """Runs it beside the caller."""
        # No task group: what an async generator has open may be closed by another task.
        self._task = spawn(partial(self.run, pool, stock), self._is_over)

    async def run(self, pool: Pool, stock: Stock | None) -> None:
        """The job from admission to its end."""
        try:
            with self._scope:
                self._result = await pool.perform(self._job, stock=stock)
        except Exception as error:  # noqa: BLE001 - raised where it is asked for
            self._error = error

    def _is_over(self) -> None:
        if self._result is None and self._error is None:
            self._error = PoolClosedError("the block was left before the job had ended")
        self._lease = None
        self._close_ends()
        self._has_ended.set()
        self._is_started.set()

    async def give_up(self) -> None:
        """Ends it, also while it waits for a slot, and returns when it is gone. Idempotent."""
        self._scope.cancel()
        await self._has_ended.wait()

    async def until_started(self) -> None:
        """Waits for its program to run.

        Raises:
            IsojobError: It will not.
        """
        await self._is_started.wait()
        self._close_ends()
        if self._error is not None:
            raise self._error

    def _close_ends(self) -> None:
        while self._ends:
            close(self._ends.pop())

    def close_streams(self) -> None:
        """Closes all that is ours of the streams. Idempotent."""
        self._close_ends()
        for stream in (self._stdin, self._stdout, self._stderr):
            if stream is not None:
                stream.close()
        if self._master >= 0:
            close(self._master)
            self._master = -1

    @override
    async def wait(self) -> int:
        """Waits for the end.

        Returns:
            As `returncode`.

        Raises:
            IsojobError: As `result`.
        """
        return (await self.result()).returncode

    async def result(self) -> Result:
        """Waits for the end, and tells how it was.

        Read the streams until their end before, or beside: a job that cannot write does not end.

        Returns:
            The result; ``stdout`` and ``stderr`` are None, for you have read them.

        Raises:
            PoolBrokenError: The zygote or the cell's init was killed under the job.
            PoolClosedError: The pool was closed, or the block was left by an error.
        """
        await self._has_ended.wait()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    @override
    async def aclose(self) -> None:
        """Closes the streams, ends the job if it still runs, and waits until it is gone."""
        self.close_streams()
        self.kill()
        with anyio.move_on_after(STUCK_SECONDS, shield=True):
            await self._has_ended.wait()
        await shielded(self.give_up)  # an init that does not hear us must not keep the caller

    @override
    def kill(self) -> None:
        """Ends the job with all its processes; its status is ``killed``. Idempotent."""
        if not self._has_ended.is_set():
            self._end("kill")

    @override
    def terminate(self) -> None:
        """Sends SIGTERM to its main process; see `send_signal`."""
        self.send_signal(signal.SIGTERM)

    @override
    def send_signal(self, signal: signal.Signals) -> None:
        """Sends a signal to its main process. After the end nothing happens.

        Raises:
            HostNotSupportedError: Without cgroups the process cannot be found: `kill` can end it.
        """
        with suppress(ProcessLookupError):
            pidfd = self._pidfd()
            try:
                pidfd_send_signal(pidfd, signal)
            finally:
                os.close(pidfd)

    @property
    @override
    def pid(self) -> int:
        """Pid of the main process, as this host sees it.

        Raises:
            ProcessLookupError: It has ended.
            HostNotSupportedError: It cannot be found without cgroups.
        """
        for pid in self._pids():
            with suppress(OSError, IndexError, ValueError):
                # Bytes: its name, which is in there, need be no text; newlines are escaped.
                line = Path(f"/proc/{pid}/status").read_bytes().partition(b"\nNSpid:")[2]
                if int(line.partition(b"\n")[0].split()[-1]) == _JOB:
                    return pid
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _pids(self) -> list[int]:
        directories = self._directories()
        if not directories:
            if self._has_ended.is_set():
                return []
            raise HostNotSupportedError(
                "signals to a job without a cgroup", "use kill(), or give the host cgroups"
            )
        for directory in directories:  # v1: not every hierarchy has one
            with suppress(OSError):
                return [int(word) for word in (directory / "cgroup.procs").read_text().split()]
        return []

    def _pidfd(self) -> int:
        """The process cannot become another one between look and signal."""
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        if pid in self._pids():
            return pidfd
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _directories(self) -> list[Path]:
        lease = self._lease
        return [] if lease is None else lease.zygote.cell_directories(lease.cell)

    @property
    @override
    def returncode(self) -> int | None:
        """None while it runs, and where nothing true can be said; else as `Result.returncode`."""
        return None if self._result is None else self._result.returncode

    @property
    @override
    def stdin(self) -> ByteSendStream | None:
        """What the job reads; None: it is not a pipe."""
        return self._stdin

    @property
    @override
    def stdout(self) -> ByteReceiveStream | None:
        """What the job writes; None: it is not a pipe."""
        return self._stdout

    @property
    @override
    def stderr(self) -> ByteReceiveStream | None:
        """What the job writes to its stderr; None: it is not a pipe, or a terminal has it all."""
        return self._stderr

    def usage(self) -> Usage:
        """What the job has used so far; after its end, what `result` says.

        Its wall time counts from the request; what the host cannot tell yet is None.
        """
        if self._result is not None:
            return self._result.usage
        lease = self._lease
        wall_ns = time.monotonic_ns() - self._began_ns if self._began_ns else 0
        if lease is not None and (directories := self._directories()):
            with suppress(OSError):
                counters, cpu_ns = live.read(lease.zygote.driver, directories)
                self._usage = usage_so_far(counters, cpu_ns, wall_ns)
        return self._usage or Usage(wall_time=wall_ns / 1e9)

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of its terminal in characters, 1 to 65535; the job gets SIGWINCH.

        Raises:
            ValueError: It has none, or the size makes no sense.
        """
        if self._master < 0:
            raise ValueError("the job has no terminal: give pty=True")
        for count in (rows, columns):
            if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < 2**16:
                raise ValueError(f"a terminal of {rows!r} rows and {columns!r} columns")
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@asynccontextmanager
async def opened(
    pool: Pool,
    command: Sequence[Any],
    *,
    limits: Any = None,
    stdin: Any = PIPE,
    stdout: Any = PIPE,
    stderr: Any = PIPE,
    pty: bool | tuple[int, int] = False,
    stock: Stock | None = None,
    **options: Any,
) -> AsyncIterator[IsolatedProcess]:
    """`Pool.open`, in a cell of the pool's own stock or of a session's."""
    size = terminal_size(pty)
    if size is not None and not (stdin == stdout == stderr == PIPE):
        raise ValueError("pty: a terminal is all three streams; do not redirect one")
    own_stdin = isinstance(stdin, int) and not isinstance(stdin, bool) and stdin == PIPE
    streams = {"stdin": DEVNULL if own_stdin else stdin, "stdout": stdout, "stderr": stderr}
    job = pool.job(command, limits, **streams, **options)
    if own_stdin:
        job.stdin_fd = PIPE
    process = IsolatedProcess(job, size)
    process.start(pool, stock)
    try:
        await process.until_started()
        yield process
        await process.aclose()
    finally:
        process.close_streams()
        await shielded(process.give_up)
