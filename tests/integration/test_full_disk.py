"""What isojob writes on the host, where it does not fit: an error, nothing in part, nothing lost."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from environment import dedent, run_python

SWEEP = dedent("""
    import contextlib, ctypes, io, os, pathlib, shutil
    from isojob import Image, IsojobError
    from isojob.cli import main
    from isojob.cli._collected import write_files
    from isojob.host import ids

    place, images = pathlib.Path(PLACE), pathlib.Path(IMAGES)
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(flags, options):
        done = libc.mount(b"full", bytes(place), b"tmpfs", flags, options.encode())
        assert done == 0, (os.strerror(ctypes.get_errno()), options)

    own = os.getuid(), os.getgid()
    assert libc.unshare(0x00020000 if own[0] == 0 else 0x10020000) == 0  # NEWNS, NEWUSER
    if own[0]:
        pathlib.Path("/proc/self/setgroups").write_text("deny")
        for file, number in zip(("uid_map", "gid_map"), own):
            pathlib.Path("/proc/self", file).write_text(f"0 {number} 1")
    assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
    mount(0, "size=4m,nr_inodes=1000")
    store = place / "store"
    store.mkdir()
    old = place / "old"
    old.write_bytes(b"precious")
    ids.LOCKS = place

    def load(name):
        Image.load(images / name, store=store)

    def collect(name, force):
        for reason in write_files({name: bytes(9000)}, place, force=force).values():
            raise OSError(28, reason)

    def compile(name):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            if main(["seccomp", "compile", "default", "-o", str(place / name)]):
                raise OSError(28, " ".join(said.getvalue().split()))

    def tree():
        return {
            str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
            for path in place.rglob("*")
            if path.is_file() or path.parent in (store, place)
        }

    def limited(option, room):
        is_ = os.statvfs(place)
        used = is_.f_blocks - is_.f_bfree if option == "size" else is_.f_files - is_.f_ffree
        mount(0x20, f"{option}={(used + room) * (4096 if option == 'size' else 1)}")  # REMOUNT

    before, seen = tree(), set()
    for option in ("size", "nr_inodes"):
        for room in range(40):
            for full in (True, False):
                limited(option, room if full else 500)
                try:
                    ATTEMPT
                    seen.add("ok")
                except (IsojobError, OSError) as error:
                    assert full
                    seen.add(f"{type(error).__name__}: {error}")
                    assert tree() == before, (option, room, sorted(tree()))
                limited(option, 500)
                for path in (*store.iterdir(), *place.iterdir()):
                    if path not in (store, old):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                old.write_bytes(b"precious")
    print(*seen, sep="\\n")
""")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image as `docker save` writes it: unpacked, as an archive, and that compressed."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as layer:
        for number in range(8):
            member = tarfile.TarInfo(f"d{number}/file")
            member.size = 5000 + number
            layer.addfile(member, io.BytesIO(bytes(member.size)))
    digest = f"sha256:{hashlib.sha256(packed.getvalue()).hexdigest()}"
    top = tmp_path_factory.mktemp("images")
    directory = top / "directory"
    directory.mkdir()
    (directory / "layer.tar").write_bytes(packed.getvalue())
    (directory / "config.json").write_text(json.dumps({"rootfs": {"diff_ids": [digest]}}))
    entry = {"Config": "config.json", "RepoTags": ["a:b"], "Layers": ["layer.tar"]}
    (directory / "manifest.json").write_text(json.dumps([entry]))
    with tarfile.open(top / "archive", "w") as archive:
        archive.add(directory, "")
    (top / "compressed").write_bytes(gzip.compress((top / "archive").read_bytes()))
    return top


@pytest.mark.parametrize(
    ("attempt", "error"),
    [
        ("load('directory')", r"OSError: .*No space left on device: '/.*/store'"),
        ("load('archive')", r"OSError: .*No space left on device: '/.*/store'"),
        ("load('compressed')", r"OSError: .*No space left on device: '/.*/store'"),
        ("collect('new', False)", "OSError: .*No space left on device"),
        ("collect('deep/new', False)", "OSError: .*No space left on device"),
        ("collect('old', True)", "OSError: .*No space left on device"),
        ("compile('new')", r"OSError: .*/new': No space left on device"),
        ("compile('old')", r"OSError: .*/old': No space left on device"),
        ("ids.claim(2).release()", r"HostNotSupportedError: .*No space left .* remove files from"),
    ],
)
def test_full_disk(attempt: str, error: str, images: Path, tmp_path: Path) -> None:
    """At whatever step bytes or inodes run out."""
    program = SWEEP.replace("ATTEMPT", attempt)
    done = run_python(f"PLACE, IMAGES = {str(tmp_path)!r}, {str(images)!r}", program)
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    print(done.stdout)
    seen = set(done.stdout.splitlines())
    assert "ok" in seen
    assert len(seen) > 1
    assert [line for line in seen - {"ok"} if not re.match(error, line)] == []
