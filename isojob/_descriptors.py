"""Descriptors on their way to another process."""

from __future__ import annotations

import array
import errno
import os
import socket
import sys
from collections.abc import Iterable

if sys.platform != "win32":
    import fcntl

__all__ = ["close_all", "receive_fds", "sealed_memfd", "send_fds"]

_INT = array.array("i").itemsize
# Windows has no CMSG_SPACE, and nobody who receives anything.
_ROOM = socket.CMSG_SPACE(4 * _INT) if hasattr(socket, "CMSG_SPACE") else 0
"""For four descriptors."""


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
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def send_fds(over: socket.socket, message: bytes, fds: list[int]) -> None:
    """One message, with descriptors or without (SCM_RIGHTS, unix(7)).

    Everything is sent this way, not by `send` or socket.send_fds, which drops its flags: a host
    with SIGPIPE at its default would die of a cell that is gone.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    over.sendmsg([message], rights, socket.MSG_NOSIGNAL)


def receive_fds(over: socket.socket, size: int) -> tuple[bytes, list[int], int]:
    """One message of at most so many bytes, its descriptors (close-on-exec), and the flags."""
    message, control, flags, _ = over.recvmsg(size, _ROOM, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % _INT
            fds.extend(memoryview(data[:whole]).cast("i"))
    return message, fds, flags


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
