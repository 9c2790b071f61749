"""Asking a zygote for cells: what the pool's zygote and those of its sessions have in common."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio

from isojob import wire
from isojob._descriptors import send_fds
from isojob._spec import CellSpec
from isojob.cgroups import Driver, Subtree
from isojob.errors import IsojobError, PoolBrokenError
from isojob.host import failures
from isojob.wire import MessageType, Writer

__all__ = ["Maker"]

_PING = Writer(MessageType.READY).message()


# The last: another thread has just closed our end.
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.EBADF)


class Maker:
    """The host's end of the control socket of something that makes cells.

    Args:
        driver: Of the cgroups that they are made in.
        own_ids: Whether their jobs have uids that are not their inits'.
    """

    def __init__(self, driver: Driver, *, own_ids: bool) -> None:
        self.driver = driver
        self.own_ids = own_ids
        self.broken = False
        """Known to be dying: to be replaced, whatever waitpid says yet."""
        self.subtree: Subtree | None = None
        self.numbers = itertools.count()
        """For its cells, and those of its sessions."""
        self._control: socket.socket | None = None

    @property
    def alive(self) -> bool:
        """Whether it makes cells; a dead one is to be replaced."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Host pid of the process."""
        raise NotImplementedError

    def kill(self) -> None:
        """Ends it at once, for it does not answer; its parked cells go with it."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends it with all its cells, and waits for that (bounded). Idempotent."""
        raise NotImplementedError

    def let_go(self) -> None:
        """In a forked child: closes the descriptors; the process is the parent's to end."""
        raise NotImplementedError

    def make(self, spec: CellSpec | None, output: Sequence[int] = ()) -> tuple[socket.socket, int]:
        """Asks for a cell; its lease can be used at once, even before the cell exists.

        Args:
            spec: What kind of cell; None for none at all, just a sign of life.
            output: Nothing, or descriptors for the job's stdout and stderr.

        Returns:
            The lease, and the number of the cell: its cgroups are ``cell-N`` in the subtree.

        Raises:
            BlockingIOError: Too many requests are under way; try again in a moment.
            PoolBrokenError: The zygote is dead.
            OSError: No descriptor was free.
        """
        number = next(self.numbers)
        lease, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            message = _PING if spec is None else spec.message(number)
            self.send(message, [theirs.fileno(), *output])
        except BaseException:
            lease.close()
            raise
        finally:
            theirs.close()
        return lease, number

    def send(self, message: bytes, fds: list[int]) -> None:
        """Sends a request with descriptors.

        Raises:
            BlockingIOError: Too many requests are under way; try again in a moment.
            PoolBrokenError: The zygote is dead.
        """
        control = self._control
        if control is None:
            raise PoolBrokenError
        try:
            send_fds(control, message, fds)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.broken = True
            raise PoolBrokenError from error

    def cell_directories(self, cell: int) -> list[Path]:
        """The cgroups of a cell, one in each hierarchy; they may not exist, or no more."""
        subtree = self.subtree
        return [] if subtree is None else [d / f"cell-{cell}" for d in subtree.directories]

    async def answers(self, seconds: float) -> bool:
        """Whether it takes a request within so many seconds; a dead one is as good an answer."""
        unasked = False
        with anyio.move_on_after(seconds):
            while True:
                try:
                    asked, _ = self.make(None)
                    break
                except PoolBrokenError:
                    return True
                except OSError as error:
                    # Its queue is full: its fault. No descriptor is free here: not its fault.
                    unasked = not isinstance(error, BlockingIOError)
                    await anyio.sleep(0.05)
            unasked = False
            with asked:
                # The zygote closes its end of what it does not know.
                await anyio.wait_readable(asked)
                return True
        return unasked

    @property
    def listens(self) -> bool:
        """Whether its end of the control socket is open: it may be about to end."""
        if self._control is None:
            return False
        try:
            return bool(self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def diagnose(self) -> IsojobError:
        """Why a lease ended without a word: the zygote's last one, if it left one."""
        if self._control is not None:
            with suppress(OSError, wire.WireError):  # it does not block
                if datagram := self._control.recv(wire.RECEIVE_SIZE):
                    return failures.to_exception(wire.parse_failure(wire.decode(datagram)))
        if not self.alive:
            return PoolBrokenError("the pool's zygote died")
        return PoolBrokenError("the cell's init died: nothing true can be said about the job")
