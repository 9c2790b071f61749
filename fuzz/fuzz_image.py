"""Image layers that are broken in small ways: refused by ImageError, or unpacked where they belong.

Archives of valid and hostile members with bytes changed, cut and doubled. Whatever comes of them,
nothing appears beside the directory, and no other exception leaves.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import random
import shutil
import struct
import tarfile
import tempfile
from pathlib import Path

import campaign

from isojob._unpack import Unpacker
from isojob.errors import ImageError

LENGTH = struct.Struct("<I")
NAMES = (
    "a",
    "b",
    "d",
    "d/a",
    "d/e/f",
    "l",
    "l/x",
    ".wh.a",
    "d/.wh..wh..opq",
    "/x",
    "../x",
    "d/../..",
    "é\udcff",
    "n" * 120,
)
TARGETS = ("a", "d", "/d", "..", "../..", "/", "l", "d/e/../../..", "/tmp", "x" * 200)


def archive(chance: random.Random) -> bytes:
    """Some members, in one of tar's three formats."""
    out = io.BytesIO()
    form = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    said = {"comment": "c", "size": "3"} if chance.random() < 0.1 else {}
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers=said) as tar:
        for _ in range(chance.randrange(1, 12)):
            member = tarfile.TarInfo(chance.choice(NAMES))
            member.type = chance.choice(
                (tarfile.REGTYPE,) * 4
                + (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
                + (tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)
            )
            member.linkname = chance.choice(TARGETS)
            member.mode = chance.choice((0, 0o644, 0o755, 0o4755))
            data = b"x" * chance.choice((0, 1, 511, 512, 5000))
            if member.isreg():
                member.size = len(data)
            if chance.random() < 0.1 and form == tarfile.PAX_FORMAT:
                member.pax_headers = {
                    chance.choice(
                        (
                            "size",
                            "path",
                            "linkpath",
                            "GNU.sparse.map",
                            "GNU.sparse.realsize",
                            "mtime",
                            "SCHILY.xattr.user.x",
                        )
                    ): chance.choice(
                        ("-5", "1e9", "../../x", "1,2,3", "\0", "9" * 30, "", "x" * 900)
                    )
                }
            try:
                tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
            except (ValueError, OSError):
                continue
    end = tar.offset + 1024  # not the padding to a tape's record
    return out.getvalue()[:end]


def damage(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, a block doubled or left out, the end cut."""
    out = bytearray(data)
    for _ in range(chance.choice((0, 0, 1, 1, 3, 10))):
        out[chance.randrange(len(out))] = chance.choice((0, 0xFF, 0x2F, chance.randrange(256)))
    if chance.random() < 0.2:
        at = chance.randrange(0, len(out), 512)
        out[at:at] = out[at : at + 512]
    if chance.random() < 0.2:
        at = chance.randrange(0, len(out), 512)
        del out[at : at + 512]
    if out and chance.random() < 0.1:
        del out[chance.randrange(len(out)) :]
    if chance.random() < 0.5:  # so that the damage is read at all
        for at in range(0, len(out) - 511, 512):
            block = out[at : at + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


def make(chance: random.Random) -> bytes:
    """One layer or two, each with its length before it."""
    layers = [damage(archive(chance), chance) for _ in range(chance.choice((1, 2)))]
    packing = chance.random()
    if packing < 0.5:
        layers = [gzip.compress(layer, mtime=0) for layer in layers]
    elif packing < 0.6:
        layers = [lzma.compress(layer, preset=0) for layer in layers]
    if layers[-1] and chance.random() < 0.1:
        layers[-1] = damage(layers[-1], chance)
    return b"".join(LENGTH.pack(len(layer)) + layer for layer in layers)


def check(data: bytes, top: Path) -> bool:
    """Unpacks the layers into a directory of `top`; whether none was refused."""
    root = top / "root"
    root.mkdir()
    unpacker = Unpacker(str(root), max_bytes=1 << 20, max_entries=1000)
    try:
        while data:
            (length,) = LENGTH.unpack_from(data)
            layer, data = data[LENGTH.size :][:length], data[LENGTH.size + length :]
            unpacker.layer(io.BytesIO(layer))
    except ImageError:
        return False
    finally:
        unpacker.close()
        shutil.rmtree(root)
        assert os.listdir(top) == ["beside"]
        assert (top / "beside").read_text() == "untouched"
    return True


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    with tempfile.TemporaryDirectory(prefix="fuzz-image-") as folder:
        top = Path(folder)
        (top / "beside").write_text("untouched")
        tried, whole = campaign.run("image", make, lambda data: check(data, top))
    print(f"{tried} images, {whole} of them whole")


if __name__ == "__main__":
    main()
