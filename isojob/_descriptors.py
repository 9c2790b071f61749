"""Descriptors on their way to another process."""

from __future__ import annotations

import array
import errno
import os
import socket
import sys
import threading
from collections.abc import Iterable

if sys.platform != "win32":
    import fcntl

__all__ = [
    "close",
    "close_all",
    "read_into",
    "receive_fds",
    "sealed_memfd",
    "send_fds",
    "sized_memfd",
]

_INT = array.array("i").itemsize
# Windows has no CMSG_SPACE, and nobody who receives anything.
_ROOM = socket.CMSG_SPACE(4 * _INT) if hasattr(socket, "CMSG_SPACE") else 0
"""For four descriptors."""
SCRATCH = 1 << 18
"""Bytes that one read takes at most."""
# Plain ints: an operation on an `IntFlag` takes as long as the system call.
_RECEIVE = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0)) | int(getattr(socket, "MSG_DONTWAIT", 0))
_SEND = int(getattr(socket, "MSG_NOSIGNAL", 0))
_TRUNCATED = int(getattr(socket, "MSG_TRUNC", 0))
# As F_SEAL_WRITE where nobody has it mapped. That one looks whether somebody holds a page, as the
# kernel itself may for a moment (migration, batches of another processor): EBUSY after 0.15 s.
_SEAL_FUTURE_WRITE = 0x0010


_process = os.getpid()


def close(fd: int) -> None:
    """os.close, also of what another thread was closing as this process was forked from its own."""
    try:
        os.close(fd)
    except OSError:
        if os.getpid() == _process:
            raise


def sealed_memfd(name: str, data: bytes) -> int:
    """A file of our own that nobody can change any more (memfd_create(2))."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        # MFD_EXEC: since 6.3 a memfd for execution should say so; older kernels do not know it.
        fd = os.memfd_create(name, flags | 0x0010)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sized_memfd(name: str, size: int) -> int:
    """A file of so many zeros, for another process to fill: its size is fixed."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def send_fds(over: socket.socket, message: bytes, fds: list[int]) -> None:
    """One message, with descriptors or without (SCM_RIGHTS, unix(7)); waits as the socket does.

    Everything is sent this way, not by socket.send_fds, which drops its flags: a host with SIGPIPE
    at its default would die of a cell that is gone.
    """
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        over.sendmsg([message], [rights], _SEND)
    else:
        over.send(message, _SEND)


class _Scratch(threading.local):
    """Where bytes arrive, one for each thread.

    A fresh block of such a size for each read is asked of the kernel, given back, and asked for
    again: the page faults cost more than the reading.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(SCRATCH))


_scratch = _Scratch()


def read_into(fd: int, most: int) -> memoryview:
    """What one read(2) gives, in memory that the thread's next read overwrites.

    Raises:
        BlockingIOError: Nothing there yet.
    """
    view = _scratch.view
    return view[: os.readv(fd, (view if most >= SCRATCH else view[:most],))]


def receive_fds(over: socket.socket) -> tuple[bytes, list[int], bool]:
    """One message, its descriptors (close-on-exec), and whether it was cut.

    Raises:
        BlockingIOError: Nothing there yet.
    """
    view = _scratch.view
    size, control, flags, _ = over.recvmsg_into((view,), _ROOM, _RECEIVE)
    message = bytes(view[:size])
    fds: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % _INT
            fds.extend(memoryview(data[:whole]).cast("i"))
    return message, fds, bool(flags & _TRUNCATED)


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
