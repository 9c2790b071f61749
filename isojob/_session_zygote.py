"""The zygote of a session, and the cells that it makes."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from typing_extensions import override

from isojob import wire
from isojob._descriptors import close, close_all, receive_fds
from isojob._maker import Maker
from isojob._spec import CellSpec
from isojob._stock import Stock
from isojob._zygote import START_SECONDS, STOP_SECONDS, Zygote
from isojob.cgroups.base import kill_processes, remove_tree
from isojob.errors import PoolBrokenError, PoolClosedError
from isojob.host import failures
from isojob.limits import Limits
from isojob.wire import MessageType, Tag, Writer

__all__ = ["SessionStock", "SessionZygote", "ask", "hear"]

_REMEMBERED = 4096
"""Cells whose cgroups nobody looks for yet: more than a zygote has requests in its queue."""

_GONE = "the session's directory went with the pool's zygote"


def ask(parent: Zygote, message: bytes) -> socket.socket:
    """`Zygote.ask`, patiently (blocking).

    Raises:
        PoolBrokenError: It is dead, was closed, or does not answer.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return parent.ask(message)
        except BlockingIOError:  # so many requests are under way
            if time.monotonic() > deadline:
                raise PoolBrokenError("the pool's zygote does not answer") from None
            time.sleep(0.001)


def hear(control: socket.socket) -> wire.Message:
    """The next message, waited for as the socket does (blocking); descriptors are not wanted.

    Raises:
        TimeoutError: None came in time.
        PoolBrokenError: The other end is gone.
    """
    try:
        datagram, fds, _ = receive_fds(control)
    except ConnectionResetError:
        datagram, fds = b"", []
    close_all(fds)
    if not datagram:
        raise PoolBrokenError("the pool's zygote died")
    return wire.decode(datagram)


class SessionZygote(Maker):
    """The zygote of a session, a child of the pool's."""

    def __init__(self, parent: Zygote, disk: int, inodes: int) -> None:
        super().__init__(parent.driver, own_ids=parent.own_ids)
        self.disk = disk
        self.inodes = inodes
        self._parent = parent
        self._pidfd = -1
        self._made: deque[int] = deque()
        """Cells whose cgroups may be there."""
        self.numbers = parent.numbers
        self.subtree = parent.subtree
        message = Writer(MessageType.SESSION)
        message.number(Tag.DISK, disk)
        message.number(Tag.INODES, inodes)
        self._control = control = ask(parent, message.message())
        try:
            control.settimeout(START_SECONDS)
            self._await_ready(control)
            control.setblocking(False)
        except BaseException:
            self.let_go()
            raise

    def _await_ready(self, control: socket.socket) -> None:
        try:
            message = hear(control)
        except TimeoutError:
            raise PoolBrokenError("the pool's zygote does not answer") from None
        if message.kind is not MessageType.READY:
            raise failures.to_exception(wire.parse_failure(message))
        self._pid = wire.parse_ready(message)
        # It cannot be another's yet: it just spoke, and its parent is the zygote.
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except ProcessLookupError:
            raise PoolBrokenError(_GONE) from None

    @property
    @override
    def pid(self) -> int:
        return self._pid

    @property
    @override
    def alive(self) -> bool:
        return not self.broken and self._control is not None and self._parent.alive

    @override
    def make(self, spec: CellSpec | None, output: Sequence[int] = ()) -> tuple[socket.socket, int]:
        lease, number = super().make(spec, output)
        self._made.append(number)
        if len(self._made) > _REMEMBERED and self._there(oldest := self._made.popleft()):
            self._made.append(oldest)
        return lease, number

    def _there(self, cell: int) -> bool:
        return any(directory.exists() for directory in self.cell_directories(cell))

    def sweep(self) -> None:
        """Removes the cgroups that one who was killed has left: the pool may be open for long.

        Blocking, bounded; its leases are closed or told to stop.
        """
        while self._made:
            if self._there(cell := self._made.pop()):
                for directory in self.cell_directories(cell):
                    kill_processes(directory)
                    remove_tree(directory)

    @override
    def kill(self) -> None:
        self.broken = True
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    @override
    def close(self) -> None:
        control, self._control = self._control, None
        if control is None:
            return
        try:
            with suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)
            control.close()
            # Not its end of the socket: its namespace, and the directory with it, go after that.
            if self._pidfd >= 0:
                dead = select.poll()
                dead.register(self._pidfd, select.POLLIN)
                if not dead.poll(STOP_SECONDS * 1000):
                    self.kill()
        finally:
            self._close_pidfd()

    @override
    def let_go(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            close(self._pidfd)
            self._pidfd = -1


class SessionStock(Stock):
    """The cells of a session that change its directory, or those that copy it."""

    closed = "the session is closed"

    def __init__(
        self,
        of: Stock,
        zygote: SessionZygote,
        limits: Limits,
        *,
        private: bool,
        parked: bool = True,
    ) -> None:
        super().__init__(of.sandbox, limits, of.wanted_range if parked else (0, 0), of.uid_range)
        self._private = private
        self._open_beside(of, zygote)

    @override
    def start(self) -> Maker:
        if not self.open:
            raise PoolClosedError(self.closed)
        raise PoolBrokenError(_GONE)

    def make_anew(self) -> None:
        """Lets go of the parked cells: what they copied has changed."""
        for shelf in self._shelves():
            shelf.empty()
