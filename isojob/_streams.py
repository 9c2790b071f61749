"""The host's ends of a job's pipes: bounded capture, patient feeding, never a byte decoded."""

from __future__ import annotations

import array
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from isojob._descriptors import close, read_into
from isojob.host import failures
from isojob.wire import Failure

if sys.platform != "win32":
    import fcntl
    import termios

__all__ = [
    "JOBS_BOTH",
    "JOBS_READ",
    "JOBS_WRITE",
    "Capture",
    "Feed",
    "FileFeed",
    "Meter",
    "open_pipe",
    "write_some",
]

WIDE = 1 << 20
TURN, TURN_CALLS = 4 << 20, 1024
"""Bytes that a pipe takes of one turn of the host's loop, and system calls: a job decides how much
comes with each. With O_DIRECT a pipe gives one packet at a time (pipe(2)), of a byte if need be."""
JOBS_READ, JOBS_WRITE, JOBS_BOTH = 0o444, 0o222, 0o666
"""What jobs do with a pipe."""


def open_pipe(jobs: int) -> tuple[int, int]:
    """A pipe, read end first, that jobs may open anew.

    That is what /dev/stdin and /dev/stdout do, and as another uid. A pipe is one inode of its own:
    the mode is for both ends, and no name leads to it but below /proc/PID/fd of who has it open.
    Where both ends are for jobs each may read and write: it can take back what it wrote, or answer
    itself, which is its own loss. To a pipe of the caller's nothing is done.

    Args:
        jobs: `JOBS_READ`, `JOBS_WRITE` or `JOBS_BOTH`.
    """
    ends = os.pipe2(os.O_CLOEXEC)
    with suppress(OSError):  # then only a job of our own uid can
        os.fchmod(ends[0], jobs)
    return ends


def write_some(fd: int, data: memoryview) -> int:
    """os.write, for hosts too that put SIGPIPE back to its default: no job may kill its host.

    Only the thread that writes into a pipe without readers gets the signal (signal(7)).
    """
    if signal.getsignal(signal.SIGPIPE) is not signal.SIG_DFL:
        return os.write(fd, data)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        return os.write(fd, data)
    except BrokenPipeError:
        if signal.SIGPIPE not in before:
            signal.sigtimedwait({signal.SIGPIPE}, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pipe:
    """A pipe to or from a job; -1: that end is closed."""

    __slots__ = ("read_end", "write_end")

    def __init__(self, jobs: int) -> None:
        self.read_end, self.write_end = open_pipe(jobs)

    def close_read(self) -> None:
        """Closes the read end; idempotent."""
        if self.read_end >= 0:
            close(self.read_end)
            self.read_end = -1

    def close_write(self) -> None:
        """Closes the write end; idempotent."""
        if self.write_end >= 0:
            close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Closes both ends; idempotent."""
        self.close_read()
        self.close_write()

    def widen(self) -> None:
        """Fewer wake-ups for a long stream; the per-user limit on pipe pages may refuse it."""
        with suppress(OSError):
            fd = self.write_end if self.read_end < 0 else self.read_end
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, WIDE)


class Capture(_Pipe):
    """One output stream of a job, read by us; made ahead of time, with its cell or for its job."""

    __slots__ = ("_chunks", "_whole", "cap", "total")

    def __init__(self) -> None:
        super().__init__(JOBS_WRITE)
        self.cap: int | None = None
        """Bytes to keep; None: all."""
        self.total = 0
        self._chunks: list[bytes] = []
        self._whole: io.BytesIO | None = None
        # Only our end: a job that writes faster than we read must block, not see EAGAIN.
        os.set_blocking(self.read_end, False)

    @property
    def exceeded(self) -> bool:
        """Whether more came than the cap allows."""
        return self.cap is not None and self.total > self.cap

    def widen(self) -> None:
        """For a long stream: a larger pipe, and one growing block instead of many to be joined."""
        super().widen()
        self._whole = io.BytesIO()
        self._whole.writelines(self._chunks)
        self._chunks.clear()

    def drain(self, budget: int = 1 << 62, calls: int = 1 << 62) -> bool:
        """Reads what is there, without waiting; true at end of file or beyond the cap."""
        while budget > 0 and calls > 0:
            # One byte beyond the cap is enough to know.
            room = WIDE if self.cap is None else self.cap + 1 - self.total
            if room <= 0:
                return True
            try:
                data = read_into(self.read_end, room)
            except BlockingIOError:
                return False
            if not data:
                return True
            self.total += len(data)
            budget -= len(data)
            calls -= 1
            if self._whole is None:
                self._chunks.append(bytes(data))
            else:
                self._whole.write(data)
        return self.exceeded

    def drain_some(self) -> bool:
        """As `drain`, but leaves the others their turn."""
        return self.drain(TURN, TURN_CALLS)

    def drain_now(self) -> None:
        """Reads what there is at this moment, and no more: whoever still writes is no job."""
        there = array.array("i", [0])
        fcntl.ioctl(self.read_end, termios.FIONREAD, there)
        self.drain(there[0])

    def data(self) -> bytes:
        """What was kept."""
        if self._whole is None:
            whole = b"".join(self._chunks)
            return whole if self.cap is None else whole[: self.cap]
        self._whole.truncate(self.cap)
        return self._whole.getvalue()


class Meter:
    """Counts an output stream that the caller reads."""

    __slots__ = ("cap", "total")

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.total = 0

    @property
    def exceeded(self) -> bool:
        """Whether more came than the cap allows."""
        return self.cap is not None and self.total > self.cap

    def data(self) -> None:
        """Nothing: the caller has it."""


class Feed(_Pipe):
    """A job's stdin, written by us from bytes."""

    __slots__ = ("_left",)

    def __init__(self, data: bytes) -> None:
        super().__init__(JOBS_READ)
        self._left = memoryview(data)
        os.set_blocking(self.write_end, False)

    def sent(self) -> None:
        """The launcher has its own copy of the read end by now."""
        self.close_read()

    def start(self) -> bool:
        """Writes what fits without waiting; true when all is written and the pipe closed."""
        done = self.step()
        if done:
            self.close_write()
        return done

    def step(self) -> bool:
        """Writes what fits, for one turn; true when nothing is left, or nobody reads."""
        end, calls = len(self._left) - TURN, TURN_CALLS
        try:
            while self._left:
                if len(self._left) <= end or not calls:
                    return False
                self._left = self._left[write_some(self.write_end, self._left[:WIDE]) :]
                calls -= 1
        except BlockingIOError:
            return False
        except BrokenPipeError:
            pass  # a job that reads no further is no error
        return True


class FileFeed(_Pipe):
    """A job's stdin, copied from a regular file by a thread.

    What is regular may still block for ever (a hung network file system, /proc/kmsg): such a read
    must not keep the call. The thread ends with the file, or when nobody reads any more.

    Args:
        file: Descriptor; read from its current offset, which stays where it is, so that a second
            attempt reads the same; never handed over.
        failed: Called, in the thread, when the file cannot be read: `error` says why.
    """

    __slots__ = ("_at", "_failed", "_file", "_given", "_owner", "error")

    def __init__(self, file: int, failed: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self._failed = failed
        self._owner: int | None = None
        self._given: list[int] = []
        """What the thread has not closed yet."""
        self._at = os.lseek(file, 0, os.SEEK_CUR)
        # The caller may close theirs as soon as the call returns.
        self._file = os.dup(file)
        try:
            super().__init__(JOBS_READ)
        except BaseException:
            os.close(self._file)
            raise

    def sent(self) -> None:
        """The launcher has its own copy of the read end by now."""
        self.close_read()

    def start(self) -> bool:
        """Starts the thread, which owns file and write end from now on; nothing is left to us.

        Raises:
            SandboxSetupError: No thread can be started.
        """
        self.widen()
        # By their numbers: `close` forgets what is the thread's.
        ours = (self._file, self.write_end)
        self._given = list(ours)
        thread = threading.Thread(target=self._copy, args=ours, name="isojob-stdin", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            failure = Failure("start of the thread for stdin", errno.EAGAIN)
            raise failures.to_exception(failure) from error
        self._owner = os.getpid()
        return True

    def _copy(self, file: int, pipe: int) -> None:
        try:
            while data := os.pread(file, WIDE, self._at):
                self._at += len(data)
                left = memoryview(data)
                while left:
                    left = left[write_some(pipe, left) :]
        except BrokenPipeError:
            pass  # a job that reads no further is no error
        except OSError as error:
            self.error = error
            self._failed()
        finally:
            # First forgotten: a fork of ours must not take what has the number then for its copy.
            for fd in (pipe, file):
                self._given.remove(fd)
                os.close(fd)

    def close(self) -> None:
        """Closes what is ours; idempotent."""
        if self._owner is not None:
            self.write_end = self._file = -1
            # A forked child has copies, and no thread.
            while self._given and self._owner != os.getpid():
                close(self._given.pop())
        super().close()
        if self._file >= 0:
            close(self._file)
            self._file = -1
