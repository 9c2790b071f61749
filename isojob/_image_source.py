"""The files that an image comes in: a directory, or an archive."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from typing_extensions import override

from isojob._tar import BROKEN, COMPRESSED, Allowance, Archive, decompressed
from isojob.errors import ImageError

__all__ = ["MAX_JSON", "Hashed", "Source", "opened"]

MAX_JSON = 8 << 20
_MAX_PARTS = 10_000
_MAX_HEADERS = 8 << 20


class Source:
    """The files of an image, by name."""

    def open(self, name: str) -> IO[bytes]:
        """One of them.

        Raises:
            ImageError: It is missing.
        """
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether it is there."""
        raise NotImplementedError

    def json(self, name: str, digest: str | None = None) -> Any:
        """One that is JSON, of that digest."""
        with self.open(name) as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ImageError(f"{name} is too long")
        if digest is not None and f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise ImageError(f"{name} has another digest")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{name} is no JSON: {error}") from error


class Hashed(io.RawIOBase):
    """A stream that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._digest = hashlib.sha256()

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._digest.update(data)
        return len(data)

    @override
    def close(self) -> None:
        """Not what it wraps: who reads layers closes what is given."""

    @property
    def digest(self) -> str:
        """Of what was read."""
        return f"sha256:{self._digest.hexdigest()}"


class _Directory(Source):
    def __init__(self, path: Path) -> None:
        self._path = path

    @override
    def open(self, name: str) -> IO[bytes]:
        if ".." in name.split("/") or name.startswith("/"):
            raise ImageError(f"{name!r} leads out of the image")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = open(os.open(self._path / name, flags), "rb")  # noqa: SIM115
        except OSError as error:
            raise ImageError(f"{name}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise ImageError(f"{name} is no file")
        return file

    @override
    def has(self, name: str) -> bool:
        return (self._path / name).is_file()


class _Archive(Source):
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        for number, member in enumerate(archive, 1):
            if number > _MAX_PARTS:  # not names: tarfile keeps the members of one name, too
                raise ImageError("too many files in the archive")
            self._members[member.name.removeprefix("./")] = member

    @override
    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(name)
        for _ in range(8):  # docker save links layers that are the same
            if member is None or not (member.issym() or member.islnk()):
                break
            name = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
            member = self._members.get(name)
        file = None if member is None or not member.isreg() else self._archive.extractfile(member)
        if file is None:
            raise ImageError(f"there is no {name}")
        return file

    @override
    def has(self, name: str) -> bool:
        return name in self._members


@contextmanager
def opened(path: Path, store: Path, max_bytes: int) -> Iterator[Source]:
    """The files of an image.

    Args:
        path: A directory, or an archive, which may be compressed.
        store: Where there is room for what such an archive holds.
        max_bytes: Of that.

    Raises:
        ImageError: It is no image, or larger than that.
    """
    if path.is_dir():
        yield _Directory(path)
        return
    with path.open("rb") as file, TemporaryFile(dir=store) as room:
        try:
            plain = _plain(file, room, max_bytes)
            archive = Archive.over(plain, "r:", Allowance(_MAX_HEADERS))
            source = _Archive(archive)
        except BROKEN as error:
            # gzip and bz2 say OSError, without a number, of what they cannot read; and a seek that
            # no file system could follow is an invalid one.
            if isinstance(error, ImageError):
                raise
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise ImageError(f"{path} is no image: {error}") from error
        with archive:
            try:
                yield source
            except tarfile.TarError as error:
                raise ImageError(f"{path} is no image: {error}") from error


def _plain(file: IO[bytes], room: IO[bytes], most: int) -> IO[bytes]:
    """The archive as it is, or what it holds: its parts are read in any order."""
    start = file.read(max(map(len, COMPRESSED)))
    file.seek(0)
    if not start.startswith(COMPRESSED):
        return file
    stream = decompressed(file)
    while data := stream.read(1 << 20):
        most -= len(data)
        if most < 0:
            raise ImageError("the archive holds more than is allowed")
        room.write(data)
    room.seek(0)
    return room
