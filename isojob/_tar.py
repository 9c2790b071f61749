"""Tar archives whose author is hostile: what tarfile reads at once is bounded before it does.

It reads extended headers, long names and maps of sparse files into memory, keeps global records
for ever, and goes where a size says. Images have no sparse files: layer.md of the OCI image
specification does not know them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, NoReturn

from typing_extensions import override

from isojob.errors import ImageError

__all__ = ["BROKEN", "COMPRESSED", "Archive", "Ended", "decompressed"]

_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
COMPRESSED = (_GZIP, _BZIP2, _XZ, _ZSTD)
"""How what is compressed begins."""
BROKEN = (
    *(tarfile.TarError, EOFError, OSError, ValueError, IndexError, OverflowError),
    *(RecursionError, zlib.error, lzma.LZMAError),
)
"""What reading a broken archive raises."""
_MAX_SIZE = 1 << 50
_MAX_HEADER = 1 << 20
_MAX_HEADERS = 256 << 20
_MAX_GLOBAL = 4096
_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class Header(tarfile.TarInfo):
    """A member whose headers are bounded, together with those before it."""

    def _proc_member(self, archive: Archive) -> Any:
        # The size that is stored: a record may give another, but this one is gone by.
        if not 0 <= self.size < _MAX_SIZE:
            raise ImageError(f"{self.name!r} has an unlikely size")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse()
        if self.type in _HEADERS:
            archive.headers_left -= tarfile.BLOCKSIZE + self.size
            if self.size > _MAX_HEADER or archive.headers_left < 0:
                raise ImageError("it has headers of unlikely size")
            if self.type == tarfile.XGLTYPE:
                archive.global_left -= self.size
                if archive.global_left < 0:
                    raise ImageError("it has global headers of unlikely size")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _refuse(self, *_: Any) -> NoReturn:
        raise ImageError(f"{self.name!r} is a sparse file, which images do not have")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse

    def _apply_pax_info(self, pax_headers: Mapping[str, str], encoding: str, errors: str) -> None:
        if any(name.startswith("GNU.sparse.") for name in pax_headers):
            self._refuse()
        super()._apply_pax_info(pax_headers, encoding, errors)  # type: ignore[misc]


class Archive(tarfile.TarFile):
    """An archive that knows how much of its headers was read."""

    tarinfo = Header
    headers_left = _MAX_HEADERS
    global_left = _MAX_GLOBAL


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
        return lzma.LZMAFile(buffered)
    if start.startswith(_ZSTD):
        raise ImageError("it is compressed by zstd: write the image with gzip")
    return buffered
