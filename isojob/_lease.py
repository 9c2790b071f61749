"""The host's end of one cell's socket: whoever holds it owns the job.

Shutting its write side tells init to end the job and report; closing it, in whatever way, ends the
cell. End of file on it means that every process, mount and cgroup of the cell is gone.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

import anyio

from isojob import wire
from isojob._descriptors import close_all, receive_fds, sealed_memfd, send_fds
from isojob._loop import serve
from isojob._maker import Maker
from isojob._shield import shielded
from isojob._spec import CellSpec
from isojob._streams import Capture, Feed, FileFeed
from isojob._watch import Watched
from isojob.wire import Writer

__all__ = ["Lease"]

GONE_SECONDS = 5.0
"""How long a cancelled call waits for the end of its cell; 500 processes take 23 ms."""
WORDS = 64
"""Messages that are read before others have their turn."""


class Lease(Watched):
    """The host's end of one cell.

    Attributes:
        zygote: Whose cell it is.
        cell: Its number there.
        asked_ns: When it was asked for (CLOCK_MONOTONIC).
        out: The pipe that its stdout came with, as long as no job has it; None: it has none.
        err: The same for stderr.
        pipes: All of its pipes, which end with it.
        unread: The cell was gone when the job was sent, or ended without having read it.
    """

    __slots__ = (
        "_collect",
        "_stopped",
        "asked_ns",
        "cell",
        "err",
        "out",
        "pipes",
        "socket",
        "unread",
        "zygote",
    )

    def __init__(
        self,
        made: tuple[socket.socket, int],
        zygote: Maker,
        out: Capture | None,
        err: Capture | None,
    ) -> None:
        self.socket, self.cell = made
        super().__init__(self.socket.fileno())
        self._stopped = False
        self._collect = False
        self.unread = False
        self.asked_ns = time.monotonic_ns()
        self.zygote = zygote
        self.out = out
        self.err = err
        self.pipes: list[Capture | Feed | FileFeed] = [pipe for pipe in (out, err) if pipe]

    @classmethod
    def make(cls, zygote: Maker, spec: CellSpec, *, piped: bool) -> Lease:
        """Asks for a cell; a job can be sent at once.

        Args:
            zygote: Whom to ask.
            spec: What kind of cell.
            piped: Give it pipes for stdout and stderr now: a job that is captured starts sooner.

        Raises:
            BlockingIOError: Too many requests are under way; try again in a moment.
            PoolBrokenError: The zygote is dead.
            OSError: No descriptor was free.
        """
        if not piped:
            return cls(zygote.make(spec), zygote, None, None)
        made: list[Capture] = []
        try:
            made += [Capture()]
            made += [Capture()]
            out, err = made
            made_cell = zygote.make(spec, [out.write_end, err.write_end])
        except BaseException:
            for pipe in made:
                pipe.close()
            raise
        out.close_write()
        err.close_write()
        return cls(made_cell, zygote, out, err)

    def send(self, out: Writer, fds: list[int]) -> None:
        """Sends the job; never blocks: the socket is empty and takes a whole message."""
        try:
            if out.length > wire.INLINE_MAX:
                body = sealed_memfd("isojob-job", out.body())
                try:
                    send_fds(self.socket, out.header(memfd=True), [body, *fds])
                finally:
                    os.close(body)
            else:
                send_fds(self.socket, out.message(), fds)
        except (BrokenPipeError, ConnectionResetError):
            self.unread = True  # what init said before it went is still to be read

    def send_collect(self, message: bytes) -> None:
        """Leaves init its errand; it reads it when the job is over."""
        try:
            send_fds(self.socket, message, [])
            self._collect = True
        except ConnectionResetError:  # it died, and has not read the job
            self.unread = True
        except BrokenPipeError:  # what it said before is still to be read
            pass

    def read(self) -> tuple[bytes, list[int]] | None:
        """The next datagram with its descriptors, or None at end of file.

        Raises:
            BlockingIOError: Nothing there yet.
            wire.WireError: It was longer than anything we are told.
        """
        while True:
            try:
                datagram, fds, cut = receive_fds(self.socket)
            except ConnectionResetError:
                # An unread message of ours died with the cell (unix(7)): the job, unless init's
                # errand lay behind it. The cell's last words are still there.
                self.unread |= not self._collect
                continue
            if not datagram and not fds:
                return None
            # MSG_CTRUNC is no reason: no descriptor was free for the file that came with it.
            if cut or len(datagram) > wire.RECEIVE_SIZE:
                close_all(fds)
                raise wire.WireError("a message was cut off")
            return datagram, fds

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
        left = max(0.0, deadline - anyio.current_time())
        return await serve(self.socket.fileno(), self._at_end_of_file, left)

    def _at_end_of_file(self) -> bool:
        for _ in range(WORDS):  # an init that somebody has taken over may speak for ever
            try:
                received = self.read()
            except BlockingIOError:
                return False
            except wire.WireError:
                continue
            if received is None:
                return True
            close_all(received[1])
        return False

    def close(self) -> None:
        """Lets go; whatever still runs in the cell ends. Idempotent, from any thread."""
        self.unwatch()
        self.socket.close()
        while self.pipes:
            self.pipes.pop().close()
