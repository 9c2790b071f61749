"""Files that hold a whole file system, mounted: squashfs and EROFS, by root alone.

The mount is attached nowhere: it lives by its descriptor, and with it the loop device that it is
read through (loop(4), fsopen(2), fsmount(2)).
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from isojob.errors import HostNotSupportedError, SandboxSetupError

if sys.platform != "win32":
    import fcntl

__all__ = ["filesystem", "mounted_files"]

MAGIC = {"squashfs": (0, b"hsqs"), "erofs": (1024, b"\xe2\xe1\xf5\xe0")}
"""Where each says what it is."""

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # on every architecture
_CLOEXEC, _SET_FLAG, _SET_STRING, _CREATE = 1, 0, 1, 6
_SAFE = 0x1 | 0x2 | 0x4  # MOUNT_ATTR_RDONLY, NOSUID, NODEV
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
# struct loop_config: descriptor, block size, loop_info64, reserved.
_LOOP_CONFIG = struct.Struct("=II 52xI 176x 64x")
_TRIES = 200
MAX_IMAGES = 32


def filesystem(path: Path) -> str | None:
    """The kind of file system in a file; None: it is none that can be a layer.

    Raises:
        SandboxSetupError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(2048)
    except OSError as error:
        raise SandboxSetupError("layer", error.errno or 0, str(path)) from error
    for kind, (at, magic) in MAGIC.items():
        if head[at : at + len(magic)] == magic:
            return kind
    return None


@contextmanager
def mounted_files(paths: Iterable[str]) -> Iterator[dict[str, int]]:
    """Mounts those of the paths that are files; a descriptor of each, closed at the end.

    Raises:
        HostNotSupportedError: We are not root, or the kernel lacks the file system or loop devices.
        SandboxSetupError: It is no such file system, or a broken one.
    """
    mounts: dict[str, int] = {}
    files = [path for path in paths if os.path.isfile(path)]
    if len(files) > MAX_IMAGES:
        raise SandboxSetupError("layer", errno.E2BIG, f"at most {MAX_IMAGES} of them are images")
    try:
        for path in files:
            mounts[path] = _mount(Path(path))
        yield mounts
    finally:
        for fd in mounts.values():
            os.close(fd)


def _mount(path: Path) -> int:
    kind = filesystem(path)
    if kind is None:
        raise SandboxSetupError(
            "layer", errno.ENOTDIR, f"{path}: neither a directory nor squashfs or EROFS"
        )
    if os.geteuid() != 0:
        raise HostNotSupportedError(
            f"{kind} images as layers ({path}): only root can mount them",
            "run as root, or unpack it into a directory (unsquashfs, fsck.erofs --extract)",
        )
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, name = _loop(file, kind)
        try:
            return _mount_device(kind, name, path)
        finally:
            os.close(device)  # the mount holds it from now on, or it is free again
    finally:
        os.close(file)


def _loop(file: int, kind: str) -> tuple[int, str]:
    """A loop device that is freed with its last user."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_TRIES):
                name = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
                device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(
                        device, _CONFIGURE, _LOOP_CONFIG.pack(file, 0, _READ_ONLY | _AUTOCLEAR)
                    )
                except OSError as error:
                    os.close(device)
                    if error.errno != errno.EBUSY:
                        raise
                    time.sleep(0.005)  # somebody else took it meanwhile
                else:
                    return device, name
        finally:
            os.close(control)
    except OSError as error:
        raise _unsupported(kind, "a loop device", error.errno) from error
    raise _unsupported(kind, "a loop device", errno.EBUSY)


def _mount_device(kind: str, device: str, path: Path) -> int:
    try:
        context = _call(_FSOPEN, kind.encode(), _CLOEXEC)
    except OSError as error:
        raise _unsupported(kind, kind, error.errno) from error
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"source", device.encode(), 0)
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _SAFE)
    except OSError as error:
        if error.errno == errno.EPERM:  # root of a container's user namespace
            raise _unsupported(kind, kind, error.errno) from error
        raise SandboxSetupError("mount of a layer", error.errno or 0, str(path)) from error
    finally:
        os.close(context)


def _unsupported(kind: str, what: str, number: int | None) -> HostNotSupportedError:
    return HostNotSupportedError(
        f"{kind} images as layers: {what} is not to be had ({os.strerror(number or 0)})",
        f"modprobe loop {kind}; in a container give it CAP_SYS_ADMIN, /dev/loop-control and "
        "/dev/loop*; or unpack the image into a directory",
    )


@cache
def _library() -> tuple[Any, Any]:
    from cffi import FFI

    ffi = FFI()
    ffi.cdef("long syscall(long number, ...);")
    return ffi, ffi.dlopen(None)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call that glibc of Debian 12 does not wrap.

    Raises:
        OSError: It failed.
    """
    ffi, library = _library()

    def word(value: int | bytes | None) -> Any:
        if isinstance(value, int):
            return ffi.cast("long", value)
        return ffi.NULL if value is None else ffi.new("char[]", value)

    words = list(map(word, arguments))  # kept: cffi frees what nobody holds
    value = int(library.syscall(word(number), *words))
    if value < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return value
