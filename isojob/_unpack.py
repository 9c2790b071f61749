"""Unpacking the layers of a container image into one directory, as if their author were hostile.

Every name is walked from the directory's descriptor, one component at a time; links on the way are
followed as a process inside would, and so never lead out. Sizes and counts are bounded before they
are used. What a layer deletes (``.wh.`` names of the OCI image specification, layer.md) is deleted.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeAlias

from isojob._tar import BROKEN, Allowance, Archive, Ended, decompressed
from isojob.errors import ImageError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "Unpacker"]

MAX_BYTES = 16 << 30
"""Of all files of an image together."""
MAX_ENTRIES = 2_000_000
_MAX_HEADERS = 1 << 30  # each entry may have a short one
_MAX_LINKS = 40
_MAX_DEPTH = 200
_MAX_TIME = 2**32
_THEIRS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ELOOP)
"""Errors of the file system that a name brings about."""
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
Made: TypeAlias = dict[str, "Made"]
"""What a layer has put there: names, and what is below each."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Unpacker:
    """Puts layers on top of each other.

    Args:
        directory: An empty directory of ours.
        max_bytes: Of all files together.
        max_entries: Names in all layers together.
        max_headers: Bytes of extended headers in all layers together.
    """

    def __init__(
        self,
        directory: str,
        *,
        max_bytes: int = MAX_BYTES,
        max_entries: int = MAX_ENTRIES,
        max_headers: int = _MAX_HEADERS,
    ) -> None:
        self._root = os.open(directory, _DIRECTORY)
        self._bytes = max_bytes
        self._entries = max_entries
        self._headers = Allowance(max_headers)
        self._emptied: set[int] = set()
        """Inodes of directories that hold nothing but what the layer at hand has put there."""
        self.used = 0
        """Bytes of files in the layers so far."""

    def close(self) -> None:
        """Closes the directory."""
        os.close(self._root)

    def layer(self, stream: IO[bytes]) -> None:
        """Unpacks one layer, a tar archive, compressed by gzip, bzip2 or xz or not at all.

        Args:
            stream: It is read to its end.

        Raises:
            ImageError: It is no such archive, or holds what an image must not.
        """
        made: Made = {}
        self._emptied.clear()
        try:
            # Not by tarfile itself: it reads the first of several gzip members, which pgzip writes.
            with (
                decompressed(stream) as plain,
                Archive.over(Ended(plain), "r|", self._headers) as archive,
            ):
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # kept for ever before 3.13
                    self._take(1, member.size + len(member.name))
                    self.used += member.size
                    self._member(archive, member, made)
                while data := stream.read(1 << 20):
                    self._take(0, len(data))
        except ImageError:
            raise
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno not in (None, *_THEIRS):
                raise
            raise ImageError(f"a layer is no tar archive: {error}") from error

    def directory(self, path: str) -> None:
        """Makes a directory where there is none, as container runtimes do for a working directory.

        Args:
            path: Absolute and normal.

        Raises:
            ImageError: Something else is there.
        """
        try:
            os.close(self._parent([*_parts(path.lstrip("/")), "."]))
        except OSError as error:
            if error.errno in _THEIRS:
                raise ImageError(f"{path}: {error.strerror}") from error
            raise

    def _take(self, entries: int, size: int) -> None:
        self._entries -= entries
        self._bytes -= size
        if self._entries < 0 or self._bytes < 0:
            raise ImageError("its files are too many, or too large, together")

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, made: Made) -> None:
        parts = _parts(member.name)
        if not parts:
            return  # the root itself
        parent = self._parent(parts)
        try:
            name = parts[-1]
            with _mtime_kept(parent):
                if name.startswith(_WHITEOUT):
                    for part in parts[:-1]:
                        made = made.get(part, {})
                    if name == _OPAQUE:
                        self._empty(parent, made)
                    else:
                        self._delete(parent, name[len(_WHITEOUT) :], made)
                else:
                    self._put(archive, member, parent, name)
                    for part in parts:
                        made = made.setdefault(part, {})
        finally:
            os.close(parent)

    def _put(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str
    ) -> None:
        mode = member.mode & 0o777  # a set-id bit has no force in a sandbox
        if member.isdir():
            _make_directory(parent, name)
            _chmod(parent, name, mode | 0o700, _mtime(member))
            return
        if not (member.isreg() or member.issym() or member.islnk()):
            kind = "a FIFO" if member.isfifo() else "a device"
            raise ImageError(f"{member.name!r} is {kind}")
        _remove(parent, name)
        if member.issym():
            if "\0" in member.linkname or not member.linkname:
                raise ImageError(f"{member.name!r} is a link to nothing")
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            self._link(member, parent, name)
        else:
            self._write(archive, member, parent, name, mode)

    @staticmethod
    def _write(
        archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str, mode: int
    ) -> None:
        source = archive.extractfile(member)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            while source is not None and (data := source.read(1 << 20)):
                while data:
                    data = data[os.write(fd, data) :]
            os.fchmod(fd, mode | 0o400)
            mtime = _mtime(member)
            os.utime(fd, (mtime, mtime))
        finally:
            os.close(fd)

    def _link(self, member: tarfile.TarInfo, parent: int, name: str) -> None:
        parts = _parts(member.linkname)
        if not parts:
            raise ImageError(f"{member.name!r} is a hard link to the root")
        other = self._parent(parts)
        try:
            info = os.stat(parts[-1], dir_fd=other, follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode) and not stat.S_ISLNK(info.st_mode):
                raise ImageError(f"{member.name!r} is a hard link to no file")
            os.link(parts[-1], name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            raise ImageError(f"{member.name!r} is a hard link to nothing") from None
        finally:
            os.close(other)

    def _parent(self, parts: list[str]) -> int:
        """The directory that holds the last part, made as needed; links stay inside the root."""
        todo = list(reversed(parts[:-1]))
        path = [os.dup(self._root)]
        links = 0
        try:
            while todo:
                part = todo.pop()
                if part == "..":
                    if len(path) > 1:
                        os.close(path.pop())
                    continue
                try:
                    target = os.readlink(part, dir_fd=path[-1])
                except FileNotFoundError:
                    self._take(1, 0)
                    with _mtime_kept(path[-1]):
                        _make_directory(path[-1], part)
                except OSError:  # no link
                    pass
                else:
                    links += 1
                    if links > _MAX_LINKS:
                        raise ImageError(f"{'/'.join(parts)!r}: too many links")
                    # A name of a few bytes could lead to 60,000 more on its way, for each entry.
                    self._take(1 + target.count("/"), 0)
                    if target.startswith("/"):
                        while len(path) > 1:
                            os.close(path.pop())
                    todo += [
                        piece for piece in reversed(target.split("/")) if piece not in ("", ".")
                    ]
                    continue
                if len(path) > _MAX_DEPTH:
                    raise ImageError(f"{'/'.join(parts)[:80]!r}: too deep")
                try:
                    path.append(os.open(part, _DIRECTORY, dir_fd=path[-1]))
                except NotADirectoryError:
                    raise ImageError(f"{'/'.join(parts)!r}: {part!r} is no directory") from None
            return path.pop()
        finally:
            for fd in path:
                os.close(fd)

    def _empty(self, directory: int, made: Made) -> None:
        """An opaque directory: nothing of lower layers is left, but what this one has put there.

        Once in a layer, so that all these looks together are no more than the names that were put.
        """
        inode = os.stat(directory).st_ino
        if inode in self._emptied:
            return
        self._emptied.add(inode)
        for name in os.listdir(directory):
            self._delete(directory, name, made)

    def _delete(self, directory: int, name: str, made: Made) -> None:
        """What lower layers have there, but nothing that this one has put there."""
        if name not in made:
            _remove(directory, name)
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            fd = os.open(name, _DIRECTORY, dir_fd=directory)
            try:
                self._empty(fd, made[name])
            finally:
                os.close(fd)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise ImageError(f"{name!r} leads out of the image")
    if len(parts) > _MAX_DEPTH or any(len(os.fsencode(part)) > 255 for part in parts):
        raise ImageError(f"{name[:80]!r}: too long")
    return parts


def _make_directory(parent: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o755, dir_fd=parent)
            _chmod(parent, name, 0o755)
    else:
        _chmod(parent, name, 0o755)  # whatever our umask


def _mtime(member: tarfile.TarInfo) -> float:
    """Compiled files know their source by it. Bounded, and no NaN."""
    return min(max(0, member.mtime), _MAX_TIME)


@contextmanager
def _mtime_kept(directory: int) -> Iterator[None]:
    """A directory has the time that a layer says, whatever is put there later."""
    before = os.stat(directory).st_mtime_ns
    yield
    os.utime(directory, ns=(before, before))


def _chmod(parent: int, name: str, mode: int, mtime: float | None = None) -> None:
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        os.fchmod(fd, mode)
        if mtime is not None:
            os.utime(fd, (mtime, mtime))
    finally:
        os.close(fd)


def _remove(parent: int, name: str) -> None:
    """Whatever has that name, with all below; links are not followed."""
    if name in ("", ".", "..") or "/" in name:
        raise ImageError(f"{name!r} cannot be deleted")
    try:
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        with suppress(OSError):
            os.fchmod(fd, 0o700)
        for entry in os.listdir(fd):
            _remove(fd, entry)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
