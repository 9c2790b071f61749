"""Writes files on the host, whole or not at all: collected ones are named and filled by the job."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

__all__ = ["write_file", "write_files"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_file(path: Path, content: bytes) -> None:
    """Writes a file of the caller's choice, in the place of an older one; into a device or a FIFO.

    Raises:
        OSError: It cannot be written: an older one is as it was.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    whole = Path(os.path.realpath(path))
    parent = os.open(whole.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _replace(parent, whole.name, content)
    finally:
        os.close(parent)


def write_files(contents: Mapping[str, bytes], to: Path, *, force: bool) -> dict[str, str]:
    """Writes files below a directory, following no link in it and leaving it nowhere.

    Every step of a name is opened from the one before with O_NOFOLLOW (open(2)). A file is always
    a new one, mode 0644: with `force` it takes the place of an older one of that name, which is
    never written to, so that what it was linked with stays as it is.

    Args:
        contents: Relative names to contents.
        to: The directory, made if it is not there; the path itself may have links in it.
        force: Whether older files may be replaced.

    Returns:
        What could not be written, with the reason.

    Raises:
        OSError: The directory cannot be made or opened.
    """
    to.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    top = os.open(to, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, content in contents.items():
            try:
                _write(top, name, content, force=force)
            except OSError as error:
                failed[name] = _reason(error)
    finally:
        os.close(top)
    return failed


def _reason(error: OSError) -> str:
    if error.errno == errno.EEXIST:
        return "is there already (--force replaces it)"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "a link or a file is where a directory is needed"
    return error.strerror or str(error)


def _write(top: int, name: str, content: bytes, *, force: bool) -> None:
    *directories, last = name.split("/")
    if any(part in ("", ".", "..") for part in (*directories, last)):
        raise OSError(errno.EINVAL, "a name that leads away")
    with ExitStack() as opened, ExitStack() as made:
        at = top
        for directory in directories:
            with suppress(FileExistsError):
                os.mkdir(directory, 0o755, dir_fd=at)
                made.callback(_remove, directory, at)
            at = os.open(directory, _DIRECTORY, dir_fd=at)
            opened.callback(os.close, at)
        (_replace if force else _make)(at, last, content)
        made.pop_all()


def _remove(directory: str, at: int) -> None:
    with suppress(OSError):
        os.rmdir(directory, dir_fd=at)


def _make(at: int, name: str, content: bytes) -> None:
    file = os.open(name, _NEW_FILE, 0o644, dir_fd=at)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
    except BaseException:
        # Half a file is worse than none. Ours: it was not there before.
        with suppress(OSError):
            os.unlink(name, dir_fd=at)
        raise


def _replace(at: int, name: str, content: bytes) -> None:
    """The older one goes when the new one is there: not before it is known to fit on the disk."""
    beside = f".isojob-{secrets.token_hex(8)}"
    _make(at, beside, content)
    try:
        os.rename(beside, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside, dir_fd=at)
        raise
