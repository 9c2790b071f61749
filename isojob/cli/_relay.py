"""Byte streams between the job and our own descriptors, while the job runs."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import anyio
import anyio.lowlevel

from isojob._streams import JOBS_READ, JOBS_WRITE, open_pipe

__all__ = ["Feed", "Relay"]

_CHUNK = 1 << 16
# A pipe that poll(2) calls writable takes this much without blocking (pipe(7), PIPE_BUF).
_SAFE_WRITE = 4096


async def _ready(fd: int, *, to_write: bool) -> bool:
    """Waits for a descriptor; false if it is of the kind that is always ready (epoll_ctl(2))."""
    try:
        await (anyio.wait_writable(fd) if to_write else anyio.wait_readable(fd))
    except PermissionError:
        await anyio.lowlevel.checkpoint()
        return False
    return True


class Relay:
    """One output stream of the job, passed on to a descriptor of ours.

    Args:
        target: Where the bytes go; stays open.
        cap: Bytes to pass on; None: all.
        over: Called once when the job has written more; what follows is dropped.
        broken: Called once when it takes no more bytes: EPIPE where nobody reads them, ENOSPC;
            what follows is dropped.
    """

    def __init__(
        self,
        target: int,
        cap: int | None,
        over: Callable[[], None],
        broken: Callable[[OSError], None],
    ) -> None:
        self._target = target
        self._cap = cap
        self._over = over
        self._broken = broken
        self._dropping = False
        self.total = 0
        self._read_end, self.write_end = open_pipe(JOBS_WRITE)
        # Our end alone: the job must block, not see EAGAIN, where we are slow.
        os.set_blocking(self._read_end, False)

    @property
    def exceeded(self) -> bool:
        """Whether more came than the cap allows."""
        return self._cap is not None and self.total > self._cap

    async def pump(self) -> None:
        """Passes bytes on until every writer, `write_end` included, is closed."""
        while True:
            await anyio.wait_readable(self._read_end)
            try:
                data = os.read(self._read_end, _CHUNK)
            except BlockingIOError:
                continue
            if not data:
                return
            room = len(data) if self._cap is None else max(0, self._cap - self.total)
            self.total += len(data)
            if not self._dropping:
                await self._write(data[:room])
            if self.exceeded and not self._dropping:
                self._dropping = True
                self._over()

    async def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            polled = await _ready(self._target, to_write=True)
            try:
                written = os.write(self._target, view[:_SAFE_WRITE] if polled else view)
            except BlockingIOError:
                continue
            except OSError as error:
                self._dropping = True
                self._broken(error)
                return
            view = view[written:]

    def close_write(self) -> None:
        """Lets go of the end that the job writes to; idempotent."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Closes both ends; idempotent."""
        self.close_write()
        if self._read_end >= 0:
            os.close(self._read_end)
            self._read_end = -1


class Feed:
    """The job's stdin, from a descriptor of ours.

    A regular file goes to the library as it is. Anything else is copied through a pipe: the job
    gets no descriptor of a terminal, nor of a pipe or socket that others use.

    Args:
        source: Descriptor to read; stays open.

    Attributes:
        error: Why it could not be read to its end; to the job that is the end.
    """

    def __init__(self, source: int) -> None:
        self.error: OSError | None = None
        self._source = source
        self.given = source
        self._write_end = -1
        if not stat.S_ISREG(os.fstat(source).st_mode):
            self.given, self._write_end = open_pipe(JOBS_READ)
            os.set_blocking(self._write_end, False)

    async def pump(self) -> None:
        """Copies until the source ends or the job reads no more."""
        while self._write_end >= 0:
            try:
                await _ready(self._source, to_write=False)
                data = os.read(self._source, _CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                self.error, data = error, b""
            if not data or not await self._pass_on(data):
                os.close(self._write_end)
                self._write_end = -1

    async def _pass_on(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write_end, view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._write_end)
            except BrokenPipeError:
                return False  # a job that reads no further is no error
        return True

    def close(self) -> None:
        """Closes our pipe; idempotent."""
        for fd in {self._write_end, self.given} - {self._source, -1}:
            os.close(fd)
        self._write_end = -1
        self.given = self._source
