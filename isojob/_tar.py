"""Tar archives whose author is hostile: what tarfile reads at once is bounded before it does.

It reads extended headers, long names and maps of sparse files into memory, keeps global records
for ever, and goes where a size says. Images have no sparse files: layer.md of the OCI image
specification does not know them. Records of pax headers are read here: tarfile's own patterns take
time that grows by the square, and without the fix of CVE-2024-6232 memory, too.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal, NoReturn, Self

from typing_extensions import override

from isojob.errors import ImageError

__all__ = ["BROKEN", "COMPRESSED", "Allowance", "Archive", "Ended", "decompressed"]

_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
COMPRESSED = (_GZIP, _BZIP2, _XZ, _ZSTD)
"""How what is compressed begins."""
BROKEN = (
    *(tarfile.TarError, EOFError, OSError, ValueError, IndexError, OverflowError),
    *(RecursionError, zlib.error, lzma.LZMAError),
)
"""What reading a broken archive raises."""
_MAX_SIZE = 1 << 50
_MAX_PAX = 256 << 10  # an extended attribute may have 64 KiB, and libarchive writes it twice
_MAX_NAME = 64 << 10
_MAX_HEADER = {
    **dict.fromkeys((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), _MAX_PAX),
    **dict.fromkeys((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK), _MAX_NAME),
}
_MAX_XZ = 256 << 20  # of memory: xz -9 needs 65 MiB
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")
_FIELDS = (b"path", b"linkpath", b"size", b"mtime")
"""What matters of a pax header: images are unpacked without owners and attributes."""


class Allowance:
    """Bytes of extended headers that may still be read.

    Args:
        left: How many.
    """

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, size: int) -> None:
        """Some of them.

        Raises:
            ImageError: There are not so many.
        """
        self._left -= size
        if self._left < 0:
            raise ImageError("it has headers of unlikely size together")


class Header(tarfile.TarInfo):
    """A member whose headers are bounded, together with those before it."""

    def _proc_member(self, archive: Archive) -> Any:
        # The size that is stored: a record may give another, but this one is gone by.
        if not 0 <= self.size < _MAX_SIZE:
            raise ImageError(f"{self.name!r} has an unlikely size")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse()
        if self.type in _MAX_HEADER:
            if self.size > _MAX_HEADER[self.type]:
                raise ImageError("it has headers of unlikely size")
            archive.headers.take(tarfile.BLOCKSIZE + self.size)
        return super()._proc_member(archive)  # type: ignore[misc]

    def _refuse(self) -> NoReturn:
        raise ImageError(f"{self.name!r} is a sparse file, which images do not have")

    def _proc_pax(self, archive: Archive) -> Any:
        fields = self._fields(archive)
        try:
            member = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header of nothing: {error}") from None
        # Container runtimes pass over global ones.
        if self.type != tarfile.XGLTYPE:
            member._amend(fields, archive)
            member.offset = self.offset
        return member

    def _fields(self, archive: Archive) -> dict[bytes, bytes]:
        """What a pax header gives, the last where it gives it twice."""
        fields = {}
        file: Any = archive.fileobj
        body = file.read(_padded(self.size))[: self.size]
        for key, value in _records(body):
            if key.startswith(b"GNU.sparse."):
                self._refuse()
            if key in _FIELDS and value:  # an empty one gives nothing
                fields[key] = value
        return fields

    def _amend(self, fields: dict[bytes, bytes], archive: Archive) -> None:
        for key, value in fields.items():
            if key == b"path":
                self.name = os.fsdecode(value).rstrip("/")
            elif key == b"linkpath":
                self.linkname = os.fsdecode(value)
            elif key == b"mtime":
                self.mtime = _time(value)
            else:
                self.size = _size(value)
                if self.isreg() or self.type not in tarfile.SUPPORTED_TYPES:
                    archive.offset = self.offset_data + _padded(self.size)


def _padded(size: int) -> int:
    """To whole blocks, as files and headers are stored."""
    return size + -size % tarfile.BLOCKSIZE


def _records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header, one after the other, with nothing left over but NULs."""
    at = 0
    while body[at : at + 1].strip(b"\0"):
        match = _RECORD.match(body, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(body) or body[end - 1] != ord("\n"):
            raise ImageError("it has broken records in its headers")
        yield match[2], body[match.end() : end - 1]
        at = end
    if body[at:].strip(b"\0"):
        raise ImageError("it has broken records in its headers")


def _size(value: bytes) -> int:
    if not value.isdigit() or len(value) > 16 or int(value) >= _MAX_SIZE:
        raise ImageError("it has a file of unlikely size")
    return int(value)


def _time(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return 0


class Archive(tarfile.TarFile):
    """An archive whose extended headers are read out of an allowance."""

    tarinfo = Header

    def __init__(self, *args: Any, headers: Allowance, **options: Any) -> None:
        self.headers = headers  # first: a member is read at once
        super().__init__(*args, **options)

    @classmethod
    def over(cls, stream: IO[bytes] | Ended, mode: Literal["r:", "r|"], headers: Allowance) -> Self:
        """One that is read from its start, by seeking or without."""
        options: dict[str, Any] = {"headers": headers}
        return cls.open(fileobj=stream, mode=mode, **options)


class Ended(io.RawIOBase):
    """An archive with its end: umoci leaves out the last block's padding, and the end's blocks."""

    def __init__(self, plain: IO[bytes]) -> None:
        super().__init__()
        self._plain = plain
        self._total = 0
        self._end: bytes | None = None

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        data = self._plain.read(len(buffer)) if self._end is None else b""
        self._total += len(data)
        if not data:
            if self._end is None:
                self._end = bytes(-self._total % 512 + 1024)
            if not self._end:  # tarfile would look for a far offset for ever
                raise EOFError("it ends before its last file does")
            data, self._end = self._end[: len(buffer)], self._end[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Xz(io.RawIOBase):
    """What all streams of xz in a file hold, by bounded memory: a block may ask for 4 GiB."""

    def __init__(self, packed: IO[bytes]) -> None:
        super().__init__()
        self._packed = packed
        self._stream = self._begun()

    @staticmethod
    def _begun() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ)

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._beyond()
                if not packed:
                    return 0
                self._stream = self._begun()
            elif self._stream.needs_input:
                packed = self._packed.read(io.DEFAULT_BUFFER_SIZE)
                if not packed:
                    raise EOFError("it ends before its last stream does")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _beyond(self) -> bytes:
        """The start of the next stream, behind NULs that fill up; nothing at the end."""
        packed = self._stream.unused_data.lstrip(b"\0")
        while not packed and (more := self._packed.read(io.DEFAULT_BUFFER_SIZE)):
            packed = more.lstrip(b"\0")
        return packed


def decompressed(stream: IO[bytes]) -> IO[bytes]:
    """What is in it, compressed or not.

    Raises:
        ImageError: It is compressed in a way that the standard library cannot read.
    """
    if isinstance(stream, io.BufferedReader):
        buffered = stream
    else:
        buffered = io.BufferedReader(stream, 1 << 16)  # pyright: ignore[reportArgumentType]
    start = buffered.peek(6)
    if start.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered)  # type: ignore[return-value]
    if start.startswith(_BZIP2):
        return bz2.BZ2File(buffered)
    if start.startswith(_XZ):
        return io.BufferedReader(_Xz(buffered), 1 << 16)
    if start.startswith(_ZSTD):
        raise ImageError("it is compressed by zstd: write the image with gzip")
    return buffered
