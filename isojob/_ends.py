"""The caller's ends of the streams of a job that it talks to: anyio's byte streams."""

from __future__ import annotations

import array
import errno
import os
import select
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream
from typing_extensions import override

from isojob._descriptors import close
from isojob._streams import Meter, write_some

if sys.platform != "win32":
    import fcntl
    import termios

__all__ = ["CHUNK", "Receiver", "Sender", "drop_after_fork"]

CHUNK = 65536
TERMINAL_HOLDS = 1 << 20
"""Bytes: many times what a pseudoterminal buffers (8 KiB, and a page or two; drivers/tty/pty.c)."""


class _Droppable(Protocol):
    def drop(self) -> None: ...


_held: weakref.WeakSet[_Droppable] = weakref.WeakSet()


def drop_after_fork(holder: _Droppable) -> None:
    """Has its descriptors closed in forked children: they would keep a job from an end of file."""
    _held.add(holder)


def _after_fork_in_child() -> None:
    for holder in list(_held):
        holder.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _End:
    """One descriptor of ours; -1: closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        drop_after_fork(self)

    @property
    def is_open(self) -> bool:
        """Whether it was not closed."""
        return self._fd >= 0

    def drop(self) -> None:
        """In a forked child: closes the copy, without a word to the parent's event loop."""
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1

    async def aclose(self) -> None:
        """Closes it; who waits for it gets `anyio.ClosedResourceError`."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`."""
        if self._fd >= 0:
            with suppress(RuntimeError):  # no event loop any more
                anyio.notify_closing(self._fd)
            close(self._fd)
            self._fd = -1


def _is_hung_up(terminal: int) -> bool:
    """Whether no job has it open. Writing does not tell: it is taken, or EAGAIN for ever."""
    poll = select.poll()
    poll.register(terminal, 0)  # POLLHUP is always asked for
    return bool(poll.poll(0))


class Sender(_End, ByteSendStream):
    """What the job reads as its stdin."""

    def __init__(self, fd: int, *, is_terminal: bool = False) -> None:
        super().__init__(fd)
        self._is_terminal = is_terminal

    @override
    async def send(self, item: bytes) -> None:
        """Writes all of it, waiting while the job does not read.

        Raises:
            anyio.BrokenResourceError: The job has closed its stdin, or ended. A terminal: no
                process has it open; one that opens ``/dev/tty`` again can be sent to again.
            anyio.ClosedResourceError: This stream is closed.
            TypeError: It is no buffer, or one with gaps; nothing is sent.
        """
        left = memoryview(item).cast("B")  # sliced by bytes, whatever its items are
        await anyio.lowlevel.checkpoint()
        while left:
            if self._fd < 0:
                raise anyio.ClosedResourceError
            if self._is_terminal and _is_hung_up(self._fd):
                raise anyio.BrokenResourceError
            try:
                left = left[write_some(self._fd, left) :]
            except BlockingIOError:
                pass
            except OSError as error:  # EPIPE
                raise anyio.BrokenResourceError from error
            if left:  # always: a job that reads as fast must not keep the event loop
                await anyio.wait_writable(self._fd)


class Receiver(_End, ByteReceiveStream):
    """What the job writes."""

    def __init__(self, fd: int, meter: Meter, too_much: Callable[[], None]) -> None:
        super().__init__(fd)
        self._meter = meter
        self._count = 0
        self._left = bytearray()
        """What a terminal still held at the end, to be received first."""
        self._too_much = too_much

    @override
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """At least one byte, as soon as there is one.

        Raises:
            anyio.EndOfStream: Nobody can write any more, or the job wrote more than its limit:
                what came before was received. A terminal: no process has it open; what one writes
                that opens ``/dev/tty`` again counts, and can be received then.
            anyio.ClosedResourceError: This stream is closed.
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await anyio.lowlevel.checkpoint()
        meter = self._meter
        while True:
            if self._fd < 0:
                raise anyio.ClosedResourceError
            # One byte beyond the cap is enough to know.
            room = max_bytes if meter.cap is None else min(max_bytes, meter.cap + 1 - self._count)
            if room <= 0:
                raise anyio.EndOfStream
            try:
                data = self._read(room)
            except BlockingIOError:
                await anyio.wait_readable(self._fd)
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # of a terminal that nobody has open any more
                    raise
                data = b""
            if not data:
                raise anyio.EndOfStream
            self._count += len(data)
            meter.total = max(meter.total, self._count)
            if meter.cap is not None and self._count > meter.cap:
                self._too_much()
                data = data[: meter.cap - self._count]
                if not data:
                    raise anyio.EndOfStream
            return data

    def _read(self, room: int) -> bytes:
        if not self._left:
            return os.read(self._fd, room)
        data = bytes(self._left[:room])
        del self._left[:room]
        return data

    @override
    def close(self) -> None:
        """As `aclose`. What is in there counts, though nobody will read it."""
        self.measure()
        if self._meter.exceeded:
            self._too_much()
        super().close()

    def measure(self) -> None:
        """Counts what nobody has read yet."""
        if self._fd < 0:
            return
        left = array.array("i", [0])
        with suppress(OSError):  # of a terminal: there is no more
            if os.isatty(self._fd):
                # FIONREAD tells of 4095 bytes at most, of some 20 KB that can be there. More is
                # somebody else's, whom the job has given the terminal, and who may never stop.
                while len(self._left) < TERMINAL_HOLDS and (data := os.read(self._fd, CHUNK)):
                    self._left += data
            else:
                fcntl.ioctl(self._fd, termios.FIONREAD, left)
        self._meter.total = max(self._meter.total, self._count + left[0] + len(self._left))
