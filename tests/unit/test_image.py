"""Container images: what is read, and what is refused. No job runs here."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import re
import shutil
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from isojob import Image, ImageError, Root, Sandbox, _image_source
from isojob._image_source import opened
from isojob._image_store import locked
from isojob._unpack import Unpacker

MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
Entry = tuple[str, Any]


def layer(*entries: Entry) -> bytes:
    """A tar archive: names to bytes, or to the fields of a header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                continue
            for key, value in content.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return out.getvalue()


def link(target: str) -> dict[str, Any]:
    return {"type": tarfile.SYMTYPE, "linkname": target}


def hard(target: str) -> dict[str, Any]:
    return {"type": tarfile.LNKTYPE, "linkname": target}


DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}
CONFIG = {
    "Env": ["PATH=/bin", "X=1=2"],
    "Entrypoint": ["/run"],
    "Cmd": ["-v"],
}


class Layout:
    """An OCI image layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def image(
        self,
        *layers: bytes,
        name: str = "",
        settings: dict[str, Any] | None = None,
        **platform_of: str,
    ) -> Path:
        described = {"config": CONFIG if settings is None else settings, "architecture": MACHINE}
        config = self.blob(json.dumps(described).encode())
        manifest = {"config": config, "layers": [self.blob(data) for data in layers]}
        entry = self.blob(json.dumps(manifest).encode())
        if name:
            entry["annotations"] = {"org.opencontainers.image.ref.name": name}
        if platform_of:
            entry["platform"] = platform_of
        self.manifests.append(entry)
        (self.path / "index.json").write_text(json.dumps({"manifests": self.manifests}))
        return self.path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "image")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def tree(image: Image) -> dict[str, str]:
    """All names of its root: what a file holds, where a link leads, "/" for a directory."""
    found = {}
    for top, directories, files in os.walk(image.path):
        for name in directories + files:
            path = Path(top, name)
            key = str(path.relative_to(image.path))
            if path.is_symlink():
                found[key] = f"-> {os.readlink(path)}"
            else:
                found[key] = "/" if path.is_dir() else path.read_text()
    return found


def test_layers_deletions_links(layout: Layout, store: Path) -> None:
    """The upper layer adds, replaces, deletes; links inside the image are followed inside it."""
    base = layer(
        ("usr", DIRECTORY), ("usr/lib", DIRECTORY), ("lib", link("usr/lib")), ("abs", link("/usr/lib")),
        ("usr/lib/a", b"a"), ("usr/lib/b", b"b"), ("etc/x", b"1"), ("etc/y", b"2"), ("gone/z", b"3"),
        ("old/1", b"1"), ("old/2", b"2"), ("file", b"f"), ("hard", hard("file")),
    )  # fmt: skip
    top = layer(
        ("lib/c", b"c"), ("abs/d", b"d"), ("./etc/x", b"new"), ("etc/.wh.y", b""), (".wh.gone", b""),
        ("old/3", b"3"), ("old/.wh..wh..opq", b""), ("file", DIRECTORY), ("file/in", b"in"),
        ("up", link("../../../../etc")), ("up/z", b"z"),
    )  # fmt: skip
    image = Image.load(layout.image(base, gzip.compress(top), name="some:tag"), store=store)
    assert tree(image) == {
        "usr": "/", "usr/lib": "/", "lib": "-> usr/lib", "abs": "-> /usr/lib",
        "usr/lib/a": "a", "usr/lib/b": "b", "usr/lib/c": "c", "usr/lib/d": "d",
        "etc": "/", "etc/x": "new", "etc/z": "z", "old": "/", "old/3": "3",
        "file": "/", "file/in": "in", "hard": "f", "up": "-> ../../../../etc",
    }  # fmt: skip
    assert (image.name, image.workdir) == ("some:tag", "/")
    assert (image.entrypoint, image.cmd) == (("/run",), ("-v",))
    assert image.command() == ["/run", "-v"]
    assert image.size == len(b"abcd") + len(b"12123z") + len(b"fnew3in")
    assert image.command("a", "b") == ["/run", "a", "b"]
    assert image.env == {"PATH": "/bin", "X": "1=2"}
    sandbox = image.sandbox(env={"X": "3"})
    assert sandbox.root == image.root == Root.oci(layout.path, store=store)
    assert sandbox.root.path == image.path
    assert dict(sandbox.env) == {"X": "3"}
    assert {"PATH": "/bin", "X": "3", "HOME": "/box"}.items() <= sandbox.environment().items()
    assert Image.model_validate_json(image.model_dump_json()) == image
    assert hash(Image.load(layout.path, store=store)) == hash(image)


def test_root_brings_the_variables(layout: Layout, store: Path) -> None:
    """A root of an image has them, writable or not; the sandbox's and the call's own are over them."""
    path = layout.image(layer(("a", b"1")))
    for writable in (False, True):
        root = Root.oci(path, store=store, writable=writable)
        assert root == Image.load(path, store=store).sandbox(writable=writable).root
        assert (root.env, root.writable) == ({"PATH": "/bin", "X": "1=2"}, writable)
        sandbox = Sandbox(root=root, env={"X": "2"})
        assert sandbox.environment()["X"] == "2"
        assert sandbox.environment({"X": "3"})["X"] == "3"
        assert (sandbox.environment()["PATH"], sandbox.environment()["LANG"]) == ("/bin", "C.UTF-8")
        assert Sandbox.model_validate_json(sandbox.model_dump_json()) == sandbox
        assert hash(Sandbox(root=root, env={"X": "2"})) == hash(sandbox)
    assert Root.directory(Image.load(path, store=store).path).env == {}


def test_unpacked_once(layout: Layout, store: Path) -> None:
    """The second time nothing is written; what a killed import left is swept."""
    path = layout.image(layer(("a", b"1")))
    digest = layout.manifests[0]["digest"][7:]
    (store / f".isojob-{digest}-killed_1" / "rootfs-1").mkdir(parents=True)
    image = Image.load(path, store=store)
    marker = Path(image.path) / "marker"
    marker.write_text("")
    assert Image.load(path, store=store) == image
    assert marker.exists()
    assert sorted(entry.name for entry in store.iterdir()) == [image.digest[7:]]
    assert Image.stored(store) == [image]
    assert Image.prune(keep=1, store=store) == []
    assert Image.prune(store=store) == [image]
    assert Image.stored(store) == [] and list(store.iterdir()) == []
    assert Image.stored(store / "none") == Image.prune(store=store / "none") == []
    for no_store in (Image.stored, partial(Image.prune, 0)):
        with pytest.raises(NotADirectoryError):
            no_store(path / "index.json")


def test_a_store_that_is_not_ours_alone(layout: Layout, store: Path, tmp_path: Path) -> None:
    """Importing and pruning delete what they have made, however strangers' things are called."""
    path = layout.image(layer(("a", b"1")))
    digest = layout.manifests[0]["digest"][7:]
    elsewhere = Path(Image.load(path, store=tmp_path / "other").path).parent
    named = json.dumps({"digest": f"sha256:{digest}", "path": "/x"})
    for name in ("tmp-thesis", "tmp-ab_1", ".isojob-notes", f".isojob-{digest}", "ab" * 32):
        (store / name).mkdir(parents=True)
        (store / name / "image.json").write_text(named)
    (store / f".isojob-{digest}-abcdef_1").symlink_to(tmp_path / "other")
    (store / "link").symlink_to(elsewhere)
    before = sorted(store.rglob("*"))
    image = Image.load(path, store=store)
    assert Image.stored(store) == Image.prune(store=store) == [image]
    assert sorted(store.rglob("*")) == before
    (store / digest).symlink_to(elsewhere)
    assert len(Image.prune(store=store)) == 1 and not (store / digest).is_symlink()
    (store / digest).mkdir()
    (store / digest / "mine").write_text("")
    with pytest.raises(OSError, match=digest):
        Image.load(path, store=store)
    (store / digest / "image.json").write_text("")
    with pytest.raises(ImageError, match=digest):
        Image.load(path, store=store)
    assert (store / digest / "mine").exists() and (elsewhere / "image.json").exists()


def test_archives(layout: Layout, store: Path, tmp_path: Path) -> None:
    """The same as a tar, compressed or not; and as docker save wrote it of old."""
    image = Image.load(layout.image(layer(("a", b"1"))), store=store)
    for mode, name in (("w", "plain.tar"), ("w:gz", "packed.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as archive:  # type: ignore[call-overload]
            archive.add(layout.path, arcname=".")
        assert Image.load(tmp_path / name, store=store) == image
    data = layer(("a", b"docker"))
    names = ["0/layer.tar", "y/layer.tar"]
    made = docker(tmp_path / "docker.tar", data, digests=[data, data], names=names)
    with tarfile.open(made, "a") as archive:
        same = tarfile.TarInfo("y/layer.tar")
        same.type, same.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        archive.addfile(same)
    saved = Image.load(made, store=store)
    assert tree(saved) == {"a": "docker"}
    assert (saved.name, saved.workdir, saved.entrypoint) == ("r:1", "/", ())
    with pytest.raises(ImageError, match="reference"):
        Image.load(made, store=store, reference="r:2")


def docker(path: Path, *layers: bytes, digests: Sequence[bytes], names: Any = None) -> Path:
    """An archive as `docker save` made it; `digests` are those of these bytes."""
    diff_ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in digests]
    names = names or [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "c.json", "RepoTags": ["r:1"], "Layers": names}]
    config = {"config": {}, "rootfs": {"diff_ids": diff_ids}}
    parts = {"manifest.json": manifest, "c.json": config}
    path.write_bytes(
        layer(
            *((name, json.dumps(value).encode()) for name, value in parts.items()),
            *((f"{number}/layer.tar", data) for number, data in enumerate(layers)),
        )
    )
    return path


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_layers_of_docker(store: Path, tmp_path: Path, pack: Any) -> None:
    """Crane, kaniko and Jib pack them: the digests are of what is inside, to its very end."""
    plain = [layer(("a", b"1")), layer(("b", b"2"))]
    padded = [plain[0], plain[1] + bytes(3 << 20)]
    made = tmp_path / "docker.tar"
    for layers in (plain, padded):
        docker(made, *map(pack, layers), digests=layers)
        assert tree(Image.load(made, store=store)) == {"a": "1", "b": "2"}
    with pytest.raises(ImageError, match="too large"):
        Image.load(made, store=tmp_path / "small", max_bytes=2 << 20)
    end = pack(padded[1])[:-9] + bytes(9)
    for last, digest in ((pack(plain[1]), b""), (pack(padded[1]), plain[1]), (end, padded[1])):
        docker(made, pack(plain[0]), last, digests=[plain[0], digest])
        with pytest.raises(ImageError, match=r"1/layer.tar has another digest|no tar archive"):
            Image.load(made, store=tmp_path / "broken")


def test_times(layout: Layout, store: Path) -> None:
    """What was compiled in an image stays as new as its source, and unlikely times do no harm."""
    unlikely = {"nan": "nan", "inf": "inf", "huge": "1e300", "below": "-1e300"}
    base = layer(
        ("d", {**DIRECTORY, "mtime": 1_500_000_000}), ("d/a", {"mtime": 1_600_000_000.25}),
        ("d/sub/b", {"mtime": 5}), ("l", link("d")), ("d/gone", b""), ("hard", hard("d/a")),
        *((name, {"pax_headers": {"mtime": time}}) for name, time in unlikely.items()),
    )  # fmt: skip
    top = layer(("l/c", {"mtime": 7}), ("d/.wh.gone", b""))
    image = Image.load(layout.image(base, top), store=store)
    times = {name: Path(image.path, name).stat().st_mtime for name in tree(image)}
    assert times["d"] == times["l"] == 1_500_000_000
    assert times["d/a"] == times["hard"] == 1_600_000_000.25
    assert (times["d/sub/b"], times["d/c"], times["nan"], times["below"]) == (5, 7, 0, 0)
    assert times["inf"] == times["huge"] >= 2**31 - 1


def test_compressions(layout: Layout, store: Path) -> None:
    """By several gzip members, bzip2, xz; zstd is told."""
    data = layer(("a", b"1" * 100_000))
    half = len(data) // 2
    for packed in (
        gzip.compress(data[:half]) + gzip.compress(data[half:]),
        bz2.compress(data),
        lzma.compress(data),
        data.rstrip(b"\0"),  # as umoci ends it
    ):
        layout.manifests.clear()
        assert tree(Image.load(layout.image(packed), store=store)) == {"a": "1" * 100_000}
    layout.manifests.clear()
    with pytest.raises(ImageError, match="zstd"):
        Image.load(layout.image(b"\x28\xb5\x2f\xfd" + data), store=store)


def test_bad_arguments(layout: Layout, store: Path) -> None:
    """Refused before anything is read."""
    for most in (-1, "much", True, 1.5):
        with pytest.raises((TypeError, ValueError)):
            Image.load(layout.path, store=store, max_bytes=most)  # type: ignore[arg-type]
    for keep in (-1, True, "1"):
        with pytest.raises(ValueError, match="no number of images"):
            Image.prune(keep, store=store)  # type: ignore[arg-type]
    assert not store.exists()


def test_which(layout: Layout, store: Path) -> None:
    """By name and by machine; an index in an index."""
    layout.image(layer(("a", b"1")), name="one")
    layout.image(layer(("a", b"other")), name="one", architecture="s390x", os="linux")
    layout.image(layer(("a", b"2")), name="docker.io/library/two", architecture=MACHINE)
    layout.image(layer(("a", b"3")), name="one", architecture=MACHINE, os="windows")
    assert tree(Image.load(layout.path, store=store, reference="two")) == {"a": "2"}
    assert tree(Image.load(layout.path, store=store, reference="one")) == {"a": "1"}
    for reference in (None, "three"):
        with pytest.raises(ImageError, match="images for"):
            Image.load(layout.path, store=store, reference=reference)
    nested = layout.blob(json.dumps({"manifests": [layout.manifests[2]]}).encode())
    (layout.path / "index.json").write_text(json.dumps({"manifests": [nested]}))
    assert tree(Image.load(layout.path, store=store)) == {"a": "2"}


def test_two_tags_of_one_image(layout: Layout, store: Path) -> None:
    """As docker save lists them: by digest they are one, called by its whole name."""
    layout.image(layer(("a", b"1")))
    (entry,) = layout.manifests
    tags = [
        {
            "io.containerd.image.name": f"docker.io/library/app:{tag}",
            "org.opencontainers.image.ref.name": tag,
        }
        for tag in ("1", "latest")
    ]
    listed = [{**entry, "annotations": one} for one in tags]
    (layout.path / "index.json").write_text(json.dumps({"manifests": listed}))
    assert Image.load(layout.path, store=store).name == "docker.io/library/app:1"
    assert Image.load(layout.path, store=store, reference="app:latest").digest == entry["digest"]


@pytest.mark.parametrize("variants", [("", "v3"), ("v9", "v1"), ("v2", "v3")])
def test_variants(layout: Layout, store: Path, variants: tuple[str, str]) -> None:
    """Of one image for several generations of processors it is the one that runs on all."""
    for variant in variants:
        data = layer(("a", variant.encode()))
        layout.image(data, name="app", architecture=MACHINE, os="linux", variant=variant)
    if "v2" in variants:
        with pytest.raises(ImageError, match="2 images for"):
            Image.load(layout.path, store=store)
    else:
        (first,) = {"", "v1"}.intersection(variants)
        assert tree(Image.load(layout.path, store=store)) == {"a": first}


def test_which_of_docker(store: Path, tmp_path: Path) -> None:
    """All tags are named to choose from."""
    entries = [
        {"Config": "c.json", "RepoTags": ["r:1", "r:2"], "Layers": []},
        {"Config": "d.json", "RepoTags": ["q:1"], "Layers": []},
    ]
    config = json.dumps({"config": {}, "rootfs": {"diff_ids": []}}).encode()
    path = tmp_path / "two.tar"
    manifest = json.dumps(entries).encode()
    path.write_bytes(layer(("manifest.json", manifest), ("c.json", config), ("d.json", config)))
    with pytest.raises(ImageError, match=re.escape("one of ['q:1', 'r:1', 'r:2']")):
        Image.load(path, store=store)
    assert Image.load(path, store=store, reference="r:2").name == "r:1"


BOMB = {"size": 1 << 20}


@pytest.mark.parametrize(
    "entries",
    [
        [("/etc/passwd", b"x")],
        [("../x", b"x")],
        [("a/../../x", b"x")],
        [("x", hard("../outside"))],
        [("x", hard("/etc/passwd"))],
        [("x", hard("nowhere"))],
        [("d", DIRECTORY), ("x", hard("d"))],
        [("dev/sda", {"type": tarfile.BLKTYPE, "devmajor": 8})],
        [("dev/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
        [("fifo", {"type": tarfile.FIFOTYPE})],
        [("a", link("a")), ("a/b", b"x")],
        [("a", link("b")), ("b", link("a")), ("a/b", b"x")],
        [("a", b"x"), ("a/b", b"x")],
        [("a" * 256, b"x")],
        [("/".join(["d"] * 300), b"x")],
        [("l", link("/".join(["d"] * 150))), ("l/" + "/".join(["e"] * 150), b"x")],
        [(f"big{n}", BOMB) for n in range(12)],
        [(".wh...", b"")],
        [("x\0y", b"")],
    ],
)  # fmt: skip
def test_hostile_layers(layout: Layout, store: Path, tmp_path: Path, entries: list[Entry]) -> None:
    """Refused, with nothing outside written or read, and nothing left in the store."""
    (tmp_path / "outside").write_text("secret")
    before = sorted(path.name for path in tmp_path.iterdir())
    if "\0" in entries[0][0]:
        data = layer(("xAy", b"")).replace(b"xAy", b"x\0y")  # a header that a writer refuses
        data = layer(("ok", b"1")) if data == layer(("xAy", b"")) else data
        path = layout.image(data)
    else:
        path = layout.image(layer(*entries))
    with pytest.raises(ImageError):
        Image.load(path, store=store, max_bytes=10 << 20)
    assert list(store.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "store"])


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_bombs(layout: Layout, store: Path, tmp_path: Path, pack: Any) -> None:
    """What is small only while it is compressed: in a layer, or around the whole archive."""
    large = layer(("a", bytes(20 << 20)))
    with pytest.raises(ImageError, match="too large"):
        Image.load(layout.image(pack(large)), store=store, max_bytes=10 << 20)
    archive = tmp_path / "archive"
    for data in (large, bytes(20 << 20)):
        archive.write_bytes(pack(data))
        with pytest.raises(ImageError, match="holds more than is allowed"):
            Image.load(archive, store=store, max_bytes=10 << 20)
    packed = pack(os.urandom(10_000))
    middle = len(packed) // 2
    for broken in (packed[:-30], packed[:middle] + bytes(100) + packed[middle + 100 :]):
        archive.write_bytes(broken)
        with pytest.raises(ImageError):
            Image.load(archive, store=store)
    assert list(store.iterdir()) == []


def test_directories_that_names_imply(tmp_path: Path) -> None:
    """They count as entries: two million names could imply hundreds of millions."""
    unpacker = Unpacker(str(tmp_path), max_entries=200)
    try:
        names = ["/".join([f"{n}", *(["d"] * 50), "f"]) for n in range(10)]
        with pytest.raises(ImageError, match="too many"):
            unpacker.layer(io.BytesIO(layer(*((name, b"") for name in names))))
    finally:
        unpacker.close()
    assert 1 <= len(list(tmp_path.iterdir())) < 6


def test_late_opaque_mark(layout: Layout, store: Path) -> None:
    """It deletes what lower layers had, wherever it stands among its siblings."""
    base = layer(("d/old", b"1"), ("d/sub/old", b"2"), ("d/sub/deep/old", b"3"))
    top = layer(("d/sub/new", b"4"), ("d/.wh..wh..opq", b""), ("d/later", b"5"))
    assert tree(Image.load(layout.image(base, top), store=store)) == {
        "d": "/", "d/sub": "/", "d/sub/new": "4", "d/later": "5",
    }  # fmt: skip


def test_many_opaque_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is looked through once in a layer, however many marks there are for it or above."""
    looks: list[int] = []
    listed = os.listdir

    def listdir(fd: int) -> list[str]:
        looks.append(fd)
        return listed(fd)

    names = ["d/e/f"[: 2 * depth + 1] for depth in range(3)]
    base = layer(*((f"{name}/old", b"1") for name in names))
    marks = [(f"{name}/.wh..wh..opq", b"") for name in (*reversed(names), *names)]
    top = layer(*((f"{name}/new", b"2") for name in names), ("l", link("d")), *marks * 5,
                ("l/.wh..wh..opq", b""), ("d/later", b"3"), *marks)  # fmt: skip
    unpacker = Unpacker(str(tmp_path))
    try:
        for data in (base, top, base, top):
            monkeypatch.setattr(os, "listdir", listdir)
            unpacker.layer(io.BytesIO(data))
            monkeypatch.undo()
            found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("[!def]*")}
            if data is top:
                assert found == {"l", "d/new", "d/e/new", "d/e/f/new", "d/later"}
    finally:
        unpacker.close()
    assert len(looks) == 2 * len(names)


@pytest.mark.parametrize("target", ["d/../" * 100 + "d", "./" * 100 + "d", "/" * 200 + "d"])
def test_winding_links(tmp_path: Path, target: str) -> None:
    """The detours of links count as entries: each name through them could bring thousands."""
    unpacker = Unpacker(str(tmp_path), max_entries=200)
    try:
        unpacker.layer(io.BytesIO(layer(("d", DIRECTORY), ("l", link(target)), ("x", link("d")))))
        unpacker.layer(io.BytesIO(layer(*((f"x/{n}", b"") for n in range(20)))))
        with pytest.raises(ImageError, match="too many"):
            unpacker.layer(io.BytesIO(layer(("l/a", b""), ("l/b", b""))))
    finally:
        unpacker.close()


def test_deletions_of_what_is_there(layout: Layout, store: Path) -> None:
    """They are of what lower layers have, wherever they stand; not of what their own brings."""
    base = layer(("d/x", b"1"), ("d/y/old", b"2"), ("d/y/z/old", b"3"), ("e", b"4"), ("f/g", b"5"))
    top = layer(
        ("d/x", b"new"), ("d/.wh.x", b""), ("d/y/z/new", b"6"), ("d/.wh.y", b""), (".wh.e", b""),
        ("e", b"7"), ("f/g", b"8"), ("f", b"9"), (".wh.f", b""), ("d/.wh.none", b""),
    )  # fmt: skip
    assert tree(Image.load(layout.image(base, top), store=store)) == {
        "d": "/", "d/x": "new", "d/y": "/", "d/y/z": "/", "d/y/z/new": "6", "e": "7", "f": "9",
    }  # fmt: skip


def test_larger_than_allowed_now(layout: Layout, store: Path) -> None:
    """What somebody else has unpacked with more room is refused to who has less."""
    path = layout.image(layer(("a", bytes(5000))))
    assert Image.load(path, store=store, max_bytes=6000).size == 5000
    with pytest.raises(ImageError, match="5000 bytes"):
        Image.load(path, store=store, max_bytes=4999)
    assert Image.load(path, store=store, max_bytes=5000).size == 5000


def test_working_directory_behind_a_long_link(layout: Layout, store: Path) -> None:
    """A name that no file system takes is the image's fault."""
    settings = {**CONFIG, "WorkingDir": "/app/x"}
    path = layout.image(layer(("app", link("a" * 300))), settings=settings)
    with pytest.raises(ImageError, match="/app/x"):
        Image.load(path, store=store)
    assert list(store.iterdir()) == []


def test_a_fork_while_an_image_is_unpacked(store: Path) -> None:
    """It has a copy of the lock's descriptor, and holds up nobody when we are done."""
    store.mkdir()
    read, write = os.pipe()
    with locked(store):
        if (child := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    os.close(read)
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
        os.close(write)
        os.waitpid(child, 0)


def test_umask(layout: Layout, store: Path) -> None:
    """Directories that no layer names are open to jobs of any id."""
    before = os.umask(0o077)
    try:
        image = Image.load(layout.image(layer(("opt/app/x", b"1"))), store=store)
    finally:
        os.umask(before)
    for name in ("", "opt", "opt/app"):
        assert Path(image.path, name).stat().st_mode & 0o777 == 0o755
    assert Path(image.path, "opt/app/x").stat().st_mode & 0o444 == 0o444


def test_moved_store(layout: Layout, store: Path, tmp_path: Path) -> None:
    """An image is where its store is now, and pruning one store leaves another alone."""
    path = layout.image(layer(("a", b"1")))
    image = Image.load(path, store=store)
    shutil.copytree(store, tmp_path / "copy")
    copy = Image.load(path, store=tmp_path / "copy")
    assert copy.path.startswith(str(tmp_path / "copy")) and tree(copy) == {"a": "1"}
    Image.prune(store=tmp_path / "copy")
    assert tree(image) == {"a": "1"}


def test_hostile_headers(layout: Layout, store: Path, tmp_path: Path) -> None:
    """Sizes below zero, headers of gigabytes, and configurations of the wrong shape."""
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("d")
        member.type, member.pax_headers = tarfile.DIRTYPE, {"size": "-1000000000"}
        archive.addfile(member)
    big = tarfile.TarInfo("x")
    big.type, big.size = tarfile.XHDTYPE, 3 << 30
    header = big.tobuf()
    for data in (evil.getvalue(), header + bytes(10240)):
        layout.manifests.clear()
        with pytest.raises(ImageError):
            Image.load(layout.image(data), store=store)
    (tmp_path / "outer.tar").write_bytes(header)
    os.truncate(tmp_path / "outer.tar", 3 << 30)
    with pytest.raises(ImageError):
        Image.load(tmp_path / "outer.tar", store=store)
    configs: tuple[Any, ...] = (
        [],
        {"config": {"Env": 5}},
        {"config": {"Env": [1]}},
        {"config": []},
        {"config": {"Cmd": "sh"}},
    )
    for config in configs:
        blob = layout.blob(json.dumps(config).encode())
        manifest = layout.blob(json.dumps({"config": blob, "layers": []}).encode())
        (layout.path / "index.json").write_text(json.dumps({"manifests": [manifest]}))
        if config == {"config": []}:
            Image.load(layout.path, store=store)  # as good as none
            continue
        with pytest.raises(ImageError, match="configuration"):
            Image.load(layout.path, store=store)


def header(name: str, kind: bytes, size: int, **fields: Any) -> bytes:
    """A header as it stands; sizes beyond octal digits are written as GNU tar does."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[482] = fields.get("extended", 0)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(kind: bytes, body: bytes) -> bytes:
    """An extended header with whatever in it."""
    return header("x", kind, len(body)) + body + bytes(-len(body) % 512)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def records(kind: bytes, **given: str) -> bytes:
    """A pax header."""
    return extended(kind, b"".join(record(key, value) for key, value in given.items()))


HUGE = 1 << 80
REG, SPARSE, PAX, GLOBAL = tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.XGLTYPE
ENDLESS = {
    "sparse": header("f", SPARSE, HUGE),
    "sparse, of a usual size": header("f", SPARSE, 512) + bytes(512),
    "sparse, extended": header("f", SPARSE, 0, extended=1),
    "stored size": header("f", REG, HUGE),
    "stored size, and a real one": records(PAX, **{"GNU.sparse.realsize": "1"})
    + header("f", REG, HUGE),
    "stored size, and a global one": records(GLOBAL, size="0") + header("f", REG, HUGE),
    "far offset": records(GLOBAL, size="0") + header("f", REG, 1 << 49),
    "sparse 0.0": records(PAX, **{"GNU.sparse.size": "1"}) + header("f", REG, 1),
    "sparse 0.1": records(PAX, **{"GNU.sparse.map": "0,1"}) + header("f", REG, 1),
    "sparse 1.0": records(PAX, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    + header("f", REG, 4)
    + b"999999999\n".ljust(512, b"0"),
    "size below zero": records(PAX, size="-1024") + header("f", REG, 0),
    "size beyond any": records(PAX, size="9" * 5000) + header("f", REG, 0),
    "size that is none": records(PAX, size="1_0") + header("f", REG, 0),
    "long header": extended(PAX, record("k", "v" * (256 << 10))) + header("f", REG, 0),
    "long name": extended(tarfile.GNUTYPE_LONGNAME, b"./" * (33 << 10)) + header("f", REG, 0),
    "headers before headers": extended(PAX, b"") * 5000 + header("f", REG, 0),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_archives(name: str, layout: Layout, store: Path, tmp_path: Path) -> None:
    """Sizes that lead beyond any end, and what is read into memory at once, are refused."""
    data = ENDLESS[name] + bytes(20480)
    with pytest.raises(ImageError):
        Image.load(layout.image(data), store=store)
    for outer in (data, ENDLESS[name]):
        (tmp_path / "outer.tar").write_bytes(outer)
        with pytest.raises(ImageError):
            Image.load(tmp_path / "outer.tar", store=store)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("kind", [PAX, GLOBAL, tarfile.SOLARIS_XHDTYPE])
@pytest.mark.parametrize(
    "body",
    [
        b"2 " * 500 + b"x=",
        b"7 k=v\n" + b"6 k=v\n",
        b"6 k=v\n" + b"99 k=v\n",
        b"6 k=vv",
        b"6 k=v\n" + b"junk",
        b"6 k=v\n" + bytes(3) + b"6 k=v\n",
        b"5 kv\n",
        b"5 =v\n",
        b"0 k=v\n",
        b"-6 k=v\n",
        b"6  k=v\n",
        b"1" * 5000,
        b"1" * 5000 + b" k=v\n",
        b"=",
    ],
)
def test_pax_records_that_are_none(store: Path, layout: Layout, kind: bytes, body: bytes) -> None:
    """Records that overlap, or leave something over: Pythons of before CVE-2024-6232 take them."""
    with pytest.raises(ImageError, match="records"):
        Image.load(layout.image(extended(kind, body) + header("f", REG, 0)), store=store)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("body", [b"1" * 60_000, record("k", "1" * 60_000)])
def test_pax_records_of_digits(layout: Layout, store: Path, body: bytes) -> None:
    """They take no time that grows by the square, broken or whole: tarfile's own patterns do."""
    path = layout.image(extended(PAX, body) + header("f", REG, 0))
    began = time.process_time()
    if body.endswith(b"\n"):
        assert tree(Image.load(path, store=store)) == {"f": ""}
    else:
        with pytest.raises(ImageError, match="records"):
            Image.load(path, store=store)
    assert time.process_time() - began < 1


def test_pax_records(layout: Layout, store: Path) -> None:
    """What writers put there is understood: padding, attributes of any bytes, long and odd names."""
    capability = record("SCHILY.xattr.security.capability", "\1\0\n=\0\n")
    large = "".join(chr(n % 128) for n in range(64 << 10))
    bodies = [
        record("path", "a\nb=c") + bytes(600),
        capability + record("SCHILY.xattr.user.x", large) * 3 + record("path", "attributes"),
        record("hdrcharset", "BINARY") + b"13 path=\xff\xe4/x\n",
        record("path", "") + record("mtime", "5.5"),
        record("path", "linked") + record("comment", "é"),
        b"",
    ]
    data = b"".join(extended(PAX, body) + header(f"f{n}", REG, 0) for n, body in enumerate(bodies))
    data += records(PAX, path="sized", size="3", mtime="no time") + header("s", REG, 0)
    data += b"abc".ljust(512, b"\0") + records(PAX, path="l/l", linkpath="d" * 300 + "/../sized")
    data += header("s", tarfile.SYMTYPE, 0)
    image = Image.load(layout.image(data + bytes(1024)), store=store)
    assert set(tree(image)) == {
        "a\nb=c", "attributes", "\udcff\udce4", "\udcff\udce4/x", "f3", "linked", "f5", "sized",
        "l", "l/l",
    }  # fmt: skip
    assert tree(image)["sized"] == "abc" and tree(image)["l/l"] == "-> " + "d" * 300 + "/../sized"
    assert Path(image.path, "f3").stat().st_mtime == 5.5


def test_global_headers(layout: Layout, store: Path, tmp_path: Path) -> None:
    """As container runtimes do, they are passed over; and so cost nothing with each file below."""
    said = records(GLOBAL, comment="c" * 40, path="g", size="9", mtime="9")
    data = said + header("f", REG, 2) + b"{}".ljust(512, b"\0") + said + header("h", REG, 0)
    image = Image.load(layout.image(data + bytes(1024)), store=store)
    assert tree(image) == {"f": "{}", "h": ""}
    many = extended(GLOBAL, b"".join(record(f"k{n}", "") for n in range(400)))
    (tmp_path / "outer.tar").write_bytes(many + header("f", REG, 0) * 1000 + bytes(1024))
    tracemalloc.start()
    try:
        with opened(tmp_path / "outer.tar", store, 0):
            assert tracemalloc.get_traced_memory()[0] < 3 << 20
    finally:
        tracemalloc.stop()


def test_parts_together(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of an archive count, whatever they are called: tarfile keeps all of them."""
    monkeypatch.setattr(_image_source, "_MAX_PARTS", 100)
    path = tmp_path / "outer.tar"
    for names in (["a"] * 101, [f"{n}" for n in range(101)]):
        path.write_bytes(layer(*((name, b"") for name in names)))
        with pytest.raises(ImageError, match="too many files"):
            Image.load(path, store=store)
    path.write_bytes(layer(*[("a", b"")] * 100))
    with pytest.raises(ImageError, match="neither"):
        Image.load(path, store=store)


def dictionary(packed: bytes, size: int) -> bytes:
    """The same, but that it says it needs a dictionary of that size: 4 GiB by 40."""
    length = (packed[12] + 1) * 4
    block = bytearray(packed[12 : 12 + length - 4])
    block[4] = size
    check = zlib.crc32(block).to_bytes(4, "little")
    return packed[:12] + block + check + packed[12 + length :]


def test_dictionaries(layout: Layout, store: Path, tmp_path: Path) -> None:
    """As large as xz makes any; not the gigabytes that a few bytes may ask for."""
    data = layer(("a", b"1"))
    packed = lzma.compress(data, preset=0)
    assert tree(Image.load(layout.image(dictionary(packed, 28)), store=store)) == {"a": "1"}
    layout.manifests.clear()
    large = dictionary(packed, 40)
    (tmp_path / "outer.tar").write_bytes(large)
    docker(tmp_path / "docker.tar", large, digests=[data])
    for path in (layout.image(large), tmp_path / "outer.tar", tmp_path / "docker.tar"):
        with pytest.raises(ImageError, match="[Mm]emory"):
            Image.load(path, store=tmp_path / "other")


def test_streams_of_xz(layout: Layout, store: Path) -> None:
    """One after the other, with padding or without; cut, or with something else behind, is broken."""
    data = layer(("a", b"1" * 100_000))
    half = len(data) // 2
    first, last = (lzma.compress(part, preset=0) for part in (data[:half], data[half:]))
    empty = lzma.compress(b"") * 1000
    for packed in (first + last, first + bytes(4) + empty + last + bytes(20_000)):
        layout.manifests.clear()
        assert tree(Image.load(layout.image(packed), store=store)) == {"a": "1" * 100_000}
    for broken in (first, first[:-1], first + b"more" + last, first + last[:20]):
        layout.manifests.clear()
        with pytest.raises(ImageError, match="no tar archive"):
            Image.load(layout.image(broken), store=store)


def test_headers_together(tmp_path: Path) -> None:
    """All headers of an image are bounded, however small each is, and in however many layers."""
    some = records(PAX, comment="c" * 900) + header("f", REG, 0)
    unpacker = Unpacker(str(tmp_path), max_headers=100_000)
    try:
        for _ in range(3):
            unpacker.layer(io.BytesIO(some * 20 + bytes(1024)))
        with pytest.raises(ImageError, match="headers of unlikely size"):
            unpacker.layer(io.BytesIO(some * 20 + bytes(1024)))
    finally:
        unpacker.close()


def test_many_layers(layout: Layout, store: Path, tmp_path: Path) -> None:
    """More than any runtime could stack are refused, though a blob may be there but once."""
    data = layer(("a", b"1"))
    assert tree(Image.load(layout.image(*[data] * 500), store=store)) == {"a": "1"}
    layout.manifests.clear()
    made = docker(tmp_path / "docker.tar", data, digests=[data] * 501, names=["0/layer.tar"] * 501)
    for path in (layout.image(*[data] * 501), made):
        with pytest.raises(ImageError, match="501 layers"):
            Image.load(path, store=store)


def test_what_ends_while_it_is_read(store: Path, tmp_path: Path) -> None:
    """Sizes that only a global header gives, and an archive that somebody cuts meanwhile."""
    path = tmp_path / "outer.tar"
    said = records(GLOBAL, size="99999999") + header("index.json", REG, 2)
    path.write_bytes(said + b"{}".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(ImageError):
        Image.load(path, store=store)

    def cut() -> None:
        path.write_bytes(layer(("index.json", bytes(1 << 20))))
        with opened(path, store, 0) as source:
            os.truncate(path, 1024)
            source.json("index.json")

    with pytest.raises(ImageError, match="is no image"):
        cut()


def test_links_do_not_lead_out(layout: Layout, store: Path, tmp_path: Path) -> None:
    """A link to a directory of the host is one inside the image to whoever writes through it."""
    (tmp_path / "host").mkdir()
    for target in (str(tmp_path / "host"), "../../../../../../../.." + str(tmp_path / "host")):
        data = layer(("out", link(target)), ("out/file", target.encode()))
        image = Image.load(layout.image(data), store=store) if not layout.manifests else None
        if image is None:
            layout.manifests.clear()
            image = Image.load(layout.image(data), store=store)
        assert list((tmp_path / "host").iterdir()) == []
        inside = Path(image.path, str(tmp_path / "host").lstrip("/"), "file")
        assert inside.read_text() == target


def test_broken_images(layout: Layout, store: Path, tmp_path: Path) -> None:
    """Wrong digests, cut files, nonsense: a named error, nothing left."""
    data = layer(("a", b"1" * 5000))
    path = layout.image(data)
    blob = layout.path / "blobs/sha256" / hashlib.sha256(data).hexdigest()
    index = (layout.path / "index.json").read_text()
    for bad in (
        data.replace(b"1111", b"1211", 1),
        data[:1000],
        gzip.compress(data)[:-20],
        b"",
        b"\xff" * 5000,
    ):
        blob.write_bytes(bad)
        with pytest.raises(ImageError):
            Image.load(path, store=store)
    blob.unlink()
    with pytest.raises(ImageError, match="No such file"):
        Image.load(path, store=store)
    for text in ("", "[]", "{}", "[" * 100_000, '{"manifests": [{}]}', '{"manifests": [{"digest": "md5:1"}]}',
                 index.replace("sha256:", "sha256:../../"), '{"manifests": 3}'):  # fmt: skip
        (layout.path / "index.json").write_text(text)
        with pytest.raises(ImageError):
            Image.load(path, store=store)
    (layout.path / "index.json").unlink()
    (tmp_path / "no.tar").write_bytes(b"no archive")
    for other in (path, tmp_path / "no.tar"):
        with pytest.raises(ImageError):
            Image.load(other, store=store)
    with pytest.raises(OSError, match="No such file"):
        Image.load(tmp_path / "none", store=store)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [["x"], {}, 5, None, "a\0b", "a\ud800"])
@pytest.mark.parametrize("key", ["Config", "Layers"])
def test_names_that_are_none(
    store: Path, tmp_path: Path, key: str, name: object, packed: bool
) -> None:
    """In the description of an archive: anything that JSON can hold is refused by name."""
    config = json.dumps({"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}}).encode()
    entry = {"Config": "c.json", "Layers": ["l"], key: [name] if key == "Layers" else name}
    path = tmp_path / "image"
    if packed:
        path.write_bytes(layer(("manifest.json", json.dumps([entry]).encode()), ("c.json", config)))
    else:
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps([entry]))
        (path / "c.json").write_bytes(config)
    with pytest.raises(ImageError, match="its description is broken"):
        Image.load(path, store=store)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"Cmd": ["a\ud800"]}, "configuration"),
        ({"Env": ["A\ud800=x"]}, "configuration"),
        ({"Env": ["A\0=x"]}, "configuration"),
        ({"WorkingDir": ["x"]}, "configuration"),
        ({"WorkingDir": "/a\ud800"}, "configuration"),
        ({"WorkingDir": "/a\0"}, "leads out"),
        ({"WorkingDir": "/file/below"}, "no directory"),
        ({"WorkingDir": "d/" * 300}, "too long"),
    ],
)
def test_settings_that_are_none(
    layout: Layout, store: Path, settings: dict[str, Any], told: str
) -> None:
    """What no process can be given, nor be written down, is refused."""
    with pytest.raises(ImageError, match=told):
        Image.load(layout.image(layer(("file", b"1")), settings=settings), store=store)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "workdir"),
    [
        ("", "/"), ("app", "/app"), ("/opt/app/", "/opt/app"), ("//a/../b/./c", "/b/c"),
        ("../../up", "/up"), ("/l/in", "/l/in"), (None, "/"),
    ],
)  # fmt: skip
def test_workdir(layout: Layout, store: Path, given: str | None, workdir: str) -> None:
    """As docker run takes it: from the root, and made where no layer has it; links stay inside."""
    data = layer(("l", link("/../../there")), ("opt", DIRECTORY))
    image = Image.load(layout.image(data, settings={"WorkingDir": given}), store=store)
    assert image.workdir == workdir
    if given == "/l/in":
        workdir = "/there/in"
    assert Path(image.path + workdir).stat().st_mode & 0o777 == 0o755


def test_a_path_of_its_own(layout: Layout, store: Path) -> None:
    """An image that is loaded again is no longer where it was: pools have the old one mounted."""
    path = layout.image(layer(("a", b"1")))
    first = Image.load(path, store=store)
    assert Image.load(path, store=store).path == first.path
    Image.prune(store=store)
    again = Image.load(path, store=store)
    assert (again.path != first.path, tree(again)) == (True, {"a": "1"})


def test_command(layout: Layout, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import prints where the root is; list and prune tell what there is."""
    from isojob.cli._app import invoke

    path = str(layout.image(layer(("a", b"1")), name="evil\x1b[2J"))
    options = ["--store", str(store)]
    assert invoke(["image", "import", path, *options]) == 0
    root = capsys.readouterr().out.strip()
    assert (Path(root) / "a").read_text() == "1"
    assert invoke(["image", "list", *options]) == 0
    listed = capsys.readouterr().out
    assert "sha256:" in listed and "\x1b[2J" not in listed
    assert invoke(["image", "prune", *options]) == 0
    assert "removed sha256:" in capsys.readouterr().out
    assert invoke(["image", "import", "/no/such/image", *options]) == 125
    assert "No such file" in capsys.readouterr().err
