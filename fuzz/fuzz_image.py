"""Image layers that are broken in small ways: refused by ImageError, or unpacked where they belong.

Archives of valid and hostile members with bytes changed, cut and doubled. Whatever comes of them,
nothing appears beside the directory, and no other exception leaves. The seed is printed.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from isojob._unpack import Unpacker
from isojob.errors import ImageError

SECONDS = float(os.environ.get("ISOJOB_FUZZ_SECONDS", "60"))
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
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
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
                        )
                    ): chance.choice(("-5", "1e9", "../../x", "1,2,3", "\0", "9" * 30))
                }
            try:
                tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
            except (ValueError, OSError):
                continue
    return out.getvalue()


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
    if chance.random() < 0.1:
        del out[chance.randrange(len(out)) :]
    if chance.random() < 0.5:  # so that the damage is read at all
        for at in range(0, len(out) - 511, 512):
            block = out[at : at + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


def main() -> None:
    """For so many seconds."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    top = Path(tempfile.mkdtemp(prefix="fuzz-image-"))
    done = refused = 0
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            root = top / "root"
            root.mkdir()
            (top / "beside").write_text("untouched")
            unpacker = Unpacker(str(root), max_bytes=1 << 20, max_entries=1000)
            try:
                for _ in range(chance.choice((1, 2))):
                    unpacker.layer(io.BytesIO(damage(archive(chance), chance)))
            except ImageError:
                refused += 1
            finally:
                unpacker.close()
            done += 1
            assert sorted(os.listdir(top)) == ["beside", "root"], f"round {done}"
            assert (top / "beside").read_text() == "untouched", f"round {done}"
            shutil.rmtree(root)
    finally:
        shutil.rmtree(top)
    print(f"{done} images, {refused} refused")
    assert 0 < refused < done


if __name__ == "__main__":
    main()
