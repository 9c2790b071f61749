"""The caller's ends of the streams of a job that it talks to: anyio's byte streams."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream
from typing_extensions import override

from isojob._streams import Meter, write_some

__all__ = ["Receiver", "Sender"]

CHUNK = 65536


class _End:
    """One descriptor of ours; -1: closed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def aclose(self) -> None:
        """Closes it; who waits for it gets `anyio.ClosedResourceError`."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`."""
        if self._fd >= 0:
            with suppress(RuntimeError):  # no event loop any more
                anyio.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = -1


class Sender(_End, ByteSendStream):
    """What the job reads as its stdin."""

    @override
    async def send(self, item: bytes) -> None:
        """Writes all of it, waiting while the job does not read.

        Raises:
            anyio.BrokenResourceError: The job has closed its stdin, or ended.
            anyio.ClosedResourceError: This stream is closed.
        """
        left = memoryview(item)
        await anyio.lowlevel.checkpoint()
        while left:
            if self._fd < 0:
                raise anyio.ClosedResourceError
            try:
                left = left[write_some(self._fd, left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._fd)
            except OSError as error:  # EPIPE; EIO of a terminal
                raise anyio.BrokenResourceError from error


class Receiver(_End, ByteReceiveStream):
    """What the job writes."""

    def __init__(self, fd: int, meter: Meter, too_much: Callable[[], None]) -> None:
        super().__init__(fd)
        self._meter = meter
        self._too_much = too_much

    @override
    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """At least one byte, as soon as there is one.

        Raises:
            anyio.EndOfStream: Nobody can write any more, or the job wrote more than its limit:
                what came before was received.
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
            room = max_bytes if meter.cap is None else min(max_bytes, meter.cap + 1 - meter.total)
            if room <= 0:
                raise anyio.EndOfStream
            try:
                data = os.read(self._fd, room)
            except BlockingIOError:
                await anyio.wait_readable(self._fd)
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # of a terminal that nobody has open any more
                    raise
                data = b""
            if not data:
                raise anyio.EndOfStream
            meter.total += len(data)
            if meter.exceeded:
                self._too_much()
                data = data[: meter.cap - meter.total] if meter.cap is not None else data
                if not data:
                    raise anyio.EndOfStream
            return data
