"""Hostile container images: what importing them must refuse, or keep inside."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from isojob._image import Image
from isojob.errors import ImageError

__all__ = ["IMAGES", "import_image"]

Entry: TypeAlias = tuple[str, dict[str, Any] | bytes]
_MAX = 4 << 20
_LINK, _HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
_OWNED = b"owned"


def _link(kind: bytes, target: Path | str) -> dict[str, Any]:
    return {"type": kind, "linkname": str(target)}


def _through_two(secret: Path) -> list[list[Entry]]:
    """A link in one layer, a file through it in the next, and a deletion through it in a third."""
    inside = f"l/{secret.name}"
    return [
        [("l", _link(_LINK, secret.parent))],
        [(inside, _OWNED)],
        [(f"l/.wh.{secret.name}", b""), ("l/.wh..wh..opq", b"")],
    ]


_LAYERS: dict[str, tuple[str, Callable[[Path], list[list[Entry]]]]] = {
    "climb": ("an image with names above its root", lambda s: [[("../" * 40 + str(s), _OWNED)]]),
    "absolute": ("an image with absolute names", lambda s: [[(str(s), _OWNED)]]),
    "through_a_link": (
        "an image that writes through a link",
        lambda s: [[("l", _link(_LINK, s)), ("l", _OWNED)], *_through_two(s)],
    ),
    "hard_link": (
        "an image with a hard link to the host's file",
        lambda s: [[("l", _link(_HARD, s)), ("l", _OWNED)]],
    ),
    "climbing_hard_link": (
        "an image with a hard link above its root",
        lambda s: [[("l", _link(_HARD, "../" * 40 + str(s)))]],
    ),
    "device": (
        "an image with a disk of the host",
        lambda _: [[("sda", {"type": tarfile.BLKTYPE, "devmajor": 8, "mode": 0o666})]],
    ),
    "fifo": ("an image with a FIFO", lambda _: [[("f", {"type": tarfile.FIFOTYPE})]]),
    "bomb": ("an image far larger than allowed", lambda _: [[("f", bytes(2 * _MAX))]]),
    "compressed_bomb": (
        "an image that is small until it is unpacked",
        lambda _: [[(f"f{n}", bytes(_MAX // 4)) for n in range(8)]],
    ),
    "deep": (
        "an image with a file 5,000 directories deep",
        lambda _: [[("d/" * 5000 + "f", b"")]],
    ),
    "endless": (
        "an image with a sparse file that ends beyond any disk",
        lambda _: [[("f", {"type": tarfile.GNUTYPE_SPARSE, "size": 1 << 80})]],
    ),
    "whiteout": (
        "an image that deletes above its root",
        lambda s: [[("../" * 40 + f"{s.parent}/.wh.{s.name}", b"")]],
    ),
    "digest": ("an image whose layer is not what its digest says", lambda _: [[("f", b"")]]),
}
_REFUSED = ("device", "fifo", "bomb", "compressed_bomb", "deep", "digest", "endless")
IMAGES = {name: title for name, (title, _) in _LAYERS.items()}
"""Their names, and what each tries."""


def import_image(name: str, secret: Path, directory: Path) -> Iterator[tuple[str, str]]:
    """Makes a hostile image in `directory` and imports it.

    Args:
        name: Which.
        secret: A file of the host that the image tries to reach.
        directory: Empty, and the caller's to remove.

    Yields:
        ``("escaped" | "stopped", what)``.
    """
    layers = [_tar(entries) for entries in _LAYERS[name][1](secret)]
    source, store = directory / "image", directory / "store"
    if name == "compressed_bomb":
        layers = [gzip.compress(layer) for layer in layers]
    _lay_out(source, layers, lie=name == "digest")
    names = {path.name for path in directory.iterdir()} | {"store"}
    try:
        image = Image.load(source, store=store, max_bytes=_MAX)
    except ImageError as error:
        yield "stopped", f"import: {error}"
        if any(path.is_dir() for path in store.iterdir()):
            yield "escaped", "the store keeps a refused image"
    else:
        inside = (path for path in Path(image.path).rglob("*") if not path.is_symlink())
        if any(path.samefile(secret) for path in inside):
            yield "escaped", "the image has a file of the host"
        if name in _REFUSED:
            yield "escaped", "it was imported"
        yield "stopped", "import: names are looked up beneath the image's root"
    for path in directory.iterdir():
        if path.name not in names:
            yield "escaped", f"{path.name} was written beside the store"


def _tar(entries: list[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            member.size = len(data)
            for key, value in (content if isinstance(content, dict) else {}).items():
                setattr(member, key, value)
            if member.size == len(data):
                archive.addfile(member, io.BytesIO(data))
            else:  # a header that lies, which tarfile would not write
                out.write(member.tobuf(tarfile.GNU_FORMAT))
    return out.getvalue()


def _lay_out(path: Path, layers: list[bytes], *, lie: bool) -> None:
    """An OCI image layout."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, kind: str, *, change: bool = False) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data[:-1] + b"\1" if change else data)
        return {"digest": f"sha256:{digest}", "size": len(data), "mediaType": kind}

    kind = "application/vnd.oci.image"
    config = blob(b"{}", f"{kind}.config.v1+json")
    rows = [blob(data, f"{kind}.layer.v1.tar", change=lie) for data in layers]
    manifest = {"schemaVersion": 2, "config": config, "layers": rows}
    entry = blob(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json")
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
