"""Reading along as two jobs talk: the host passes each piece on, and notes it."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Protocol, TypeAlias

import anyio

from isojob._ends import CHUNK, Receiver, Sender
from isojob._streams import Capture, Feed, Meter

if sys.platform != "win32":
    import fcntl

__all__ = ["Relay", "Side", "Talker", "Transcript"]

Side: TypeAlias = Literal["solution", "interactor"]


_OTHER: dict[Side, Side] = {"solution": "interactor", "interactor": "solution"}


class Talker(Protocol):
    """A job that has its streams from us."""

    at_end: list[Callable[[], None]]

    def reads(self, fd: int) -> None:
        """Makes a pipe its stdin."""
        ...

    def writes(self, fd: int) -> None:
        """Makes a pipe its stdout."""
        ...


class Transcript:
    """What two jobs say to each other, read along."""

    def __init__(self, most: int) -> None:
        self.truncated = False
        self.ends: list[Side] = []
        """Whose streams were seen to end, in this order."""
        self._left = most
        self._said: list[tuple[Side, bytearray]] = []

    @property
    def said(self) -> tuple[tuple[Side, bytes], ...]:
        """What they said, in order; what one says in a row is one piece."""
        return tuple((side, bytes(piece)) for side, piece in self._said)

    def note(self, side: Side, data: bytes) -> None:
        """Keeps it as far as there is room."""
        self.truncated = self.truncated or len(data) > self._left
        data = data[: self._left]
        self._left -= len(data)
        if not data:
            return
        if self._said and self._said[-1][0] == side:
            self._said[-1][1].extend(data)
        else:
            self._said.append((side, bytearray(data)))


class Relay:
    """Passes on what one job writes to the other, and notes it."""

    def __init__(self, source: Talker, target: Talker, side: Side, transcript: Transcript) -> None:
        pipe = Capture()
        try:
            feed = Feed(b"")
        except BaseException:
            pipe.close()
            raise
        self._from = Receiver(pipe.read_end, Meter(None), lambda: None)
        self._to = Sender(feed.write_end)
        self._side: Side = side
        self._transcript = transcript
        self._pipe = pipe.read_end
        source.writes(pipe.write_end)
        target.reads(feed.read_end)
        target.at_end.append(self.hang_up)

    def hang_up(self) -> None:
        """Nobody reads any more: who writes is to see that now, not at the second next write.

        What is in the pipe was said before; what comes while we read was not, and could go on.
        """
        if not self._from.is_open:
            return
        both = False
        with suppress(OSError):
            left = fcntl.fcntl(self._pipe, fcntl.F_GETPIPE_SZ)
            # One takes a page at least, which may be a packet of one byte (O_DIRECT, pipe(2)); and
            # one finds the end.
            reads = left // mmap.PAGESIZE + 1
            while left > 0 and reads > 0 and not both:
                reads -= 1
                data = os.read(self._pipe, min(CHUNK, left))
                both = not data
                self._transcript.note(self._side, data)
                left -= len(data)
        if not both:  # else who writes has ended, too, and nobody saw who did first
            self._transcript.ends.append(_OTHER[self._side])
        self.close()

    async def run(self) -> None:
        """Until one of them closes: then the other sees it, as it would without us between."""
        try:
            while True:
                data = await self._from.receive()
                self._transcript.note(self._side, data)
                await self._to.send(data)
        except anyio.EndOfStream:
            self._transcript.ends.append(self._side)
        except anyio.BrokenResourceError:
            self._transcript.ends.append(_OTHER[self._side])
        except anyio.ClosedResourceError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Closes both ends. Idempotent."""
        self._from.close()
        self._to.close()
