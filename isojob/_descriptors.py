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

__all__ = ["close_all", "sealed_memfd", "send_fds"]


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
    """One message with descriptors (SCM_RIGHTS, unix(7)).

    Not socket.send_fds: it drops its flags, and a host with SIGPIPE at its default would die.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    over.sendmsg([message], rights, socket.MSG_NOSIGNAL)


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
