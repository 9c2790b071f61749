"""The attack suite itself, without a sandbox: is it whole, and would it tell?"""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import anyio
import pytest
from environment import PYTHON, result_of

from isojob import Image, ImageError, Limits
from isojob._models import Status
from isojob.attack import ATTACKS, Attack, _scene
from isojob.attack._attack import KINDS
from isojob.attack._doors import Asked, _in_turn, _until_ready
from isojob.attack._images import IMAGES, import_image
from isojob.attack._scene import Scene
from isojob.result import Result

PROGRAMS = Path(str(files("isojob.attack") / "programs"))
NAMES = [one.name for one in ATTACKS]


def functions(module: str) -> set[str]:
    tree = ast.parse((PROGRAMS / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_are_unique() -> None:
    """A finding names its attack."""
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("one", ATTACKS, ids=NAMES)
def test_every_program_exists(one: Attack) -> None:
    """Each attack names functions that are there, and says what it tries."""
    for program in (one.program, one.before, one.beside):
        if program and one.door != "image":
            assert program[1] in functions(program[0])
    assert one.title
    assert one.kind in KINDS


def test_every_program_is_used() -> None:
    """No attack is written and never run."""
    used = {p[:2] for one in ATTACKS for p in (one.program, one.before, one.beside) if p}
    helpers = {("clocks", "burn")}
    for path in PROGRAMS.glob("*.py"):
        if path.stem != "attacker":
            there = {(path.stem, n) for n in functions(path.stem) if not n.startswith("_")}
            assert there - used - helpers == set()


@pytest.mark.parametrize(
    "one", [one for one in ATTACKS if one.harmless], ids=[o.name for o in ATTACKS if o.harmless]
)
def test_without_a_sandbox_it_tells(one: Attack) -> None:
    """Run by an ordinary user of the host, each attack that harms nothing reports what it reached."""
    with Scene() as scene, tempfile.TemporaryDirectory(prefix="attack-") as name:
        # The installed ones may be below a home that only its owner reads.
        directory = Path(name)
        shutil.copytree(PROGRAMS, directory / "programs")
        directory.chmod(0o755)
        module, function, *arguments = one.program
        done = subprocess.run(
            [
                *(PYTHON, "-B", "-S", f"{directory}/programs/{module}.py", function, "token"),
                *(word.format_map(scene.words) for word in arguments),
            ],
            capture_output=True,
            text=True,
            check=False,
            user=65534 if os.geteuid() == 0 else None,
            group=65534 if os.geteuid() == 0 else None,
            extra_groups=[] if os.geteuid() == 0 else None,
            timeout=120,
            cwd="/",
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
        )
    assert "ESCAPED" in done.stdout, (done.stdout, done.stderr)


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_is_made_and_stopped(name: str, tmp_path: Path) -> None:
    """By each Python's own tarfile, which does not write all that lies."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    (tmp_path / "work").mkdir()
    told = dict(import_image(name, secret, tmp_path / "work"))
    assert set(told) == {"stopped"}
    assert secret.read_text() == "of the host"


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone writes where these images lead")
@pytest.mark.parametrize("name", ["climb", "absolute", "through_a_link", "whiteout", "bomb"])
def test_a_careless_import_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unpacked as tar does by default, hostile images reach what they aim at, and it is seen."""

    def load(source: Path, *, store: Path, max_bytes: int) -> Image:
        root = store / "x" / "rootfs"
        root.mkdir(parents=True)
        (entry,) = json.loads((source / "index.json").read_text())["manifests"]
        blobs = source / "blobs/sha256"
        manifest = json.loads((blobs / entry["digest"][7:]).read_text())
        for row in manifest["layers"]:
            done = subprocess.run(
                ["tar", "-P", "-C", root, "-xf", blobs / row["digest"][7:]],
                stderr=subprocess.DEVNULL,
                check=False,
            )
            for mark in [] if done.returncode else _whiteouts(blobs / row["digest"][7:]):
                (root / mark.parent / mark.name[4:]).unlink()
        if name == "bomb":
            raise ImageError("x", "too late")
        return Image(digest="x", path=str(root))

    monkeypatch.setattr(Image, "load", load)
    with Scene() as scene:
        told = dict(import_image(name, Path(scene.words["secret"]), tmp_path))
        assert list(scene.damage()) or "escaped" in told


def _whiteouts(archive: Path) -> list[Path]:
    with tarfile.open(archive) as members:
        names = [Path(name) for name in members.getnames()]
    return [name for name in names if name.name.startswith(".wh.") and ".opq" not in name.name]


def test_the_scene_tells_damage() -> None:
    """A killed process, a changed file, a connection are seen."""
    with Scene() as scene:
        assert list(scene.damage()) == []
        assert scene.survivors(scene.marker) == [scene.words["pid"]]
        os.kill(int(scene.words["pid"]), 9)
        scene._victim.wait()
        Path(scene.words["secret"]).write_text("owned")
        with socket.create_connection(("127.0.0.1", int(scene.words["port"]))):
            damage = list(scene.damage())
        assert len(damage) == 3


def test_the_scene_tells_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So are a child of this process and a mount."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text("1 0 0:1 / / rw - ext4 /dev/vda rw\n")
    monkeypatch.setattr(_scene, "_MOUNTS", str(mounts))
    monkeypatch.setattr(_scene, "_PLACES", (str(mounts),))
    with Scene() as scene:
        assert (scene.processes_left(), list(scene.damage())) == ([], [])
        with subprocess.Popen(["sleep", "60"]) as child:
            assert scene.processes_left() == [str(child.pid)]
            child.kill()
        with mounts.open("a") as file:
            file.write("2 1 0:2 / /tmp/x rw - tmpfs isojob rw\n")
        assert list(scene.damage()) == [f"{mounts} has changed"]


async def answers(before: Result | None, beside: bytes | None, last: bytes) -> Result:
    """What is judged of an attack by several jobs."""
    asked = Asked(
        command=["last"],
        before=["before"] if before else [],
        beside=["beside"] if beside else [],
        limits=Limits(),
        keep=True,
        collect=(),
        rest={},
    )

    async def first(_: Sequence[str]) -> Result:
        assert before is not None
        return before

    async def meanwhile(_: Sequence[str], stdout: int) -> Result:
        os.write(stdout, beside or b"")
        await anyio.sleep_forever()
        raise AssertionError

    async def final(_: Sequence[str], collect: object) -> Result:
        return result_of(last)

    return await _in_turn(asked, first, meanwhile, final)


async def test_what_other_jobs_reached() -> None:
    """It counts, whichever job says it."""
    found = await answers(result_of(b"NOTE a\nESCAPED one\n"), b"ESCAPED two\nREADY\n", b"last\n")
    assert found.stdout == b"ESCAPED one\nESCAPED two\nlast\n"
    assert (await answers(result_of(b"STOPPED x: y\n"), b"READY\n", b"last\n")).stdout == b"last\n"
    assert (await answers(None, None, b"last\n")).stdout == b"last\n"


@pytest.mark.parametrize(
    "status", ["nonzero_exit", "signaled", "seccomp_violation", "memory_limit"]
)
async def test_a_preparation_that_did_not_end_well(status: str) -> None:
    """Then the other job would look for what nobody has tried."""
    before = result_of(b"half\n", status=Status(status))
    assert await answers(before, None, b"") == before


def test_the_one_beside_is_waited_for() -> None:
    """Until it says that it is ready, whatever it says before, or until it is gone."""
    for last in (b"READY\n", b""):
        reading, writing = os.pipe()
        with open(writing, "wb") as job:
            job.write(b"STOPPED x: y\nNOTE READY\n" + last)
            if last:  # it stays
                job.flush()
                assert _until_ready(reading) == b"STOPPED x: y\nNOTE READY\n"
        if not last:
            assert _until_ready(reading) == b"STOPPED x: y\nNOTE READY\n"
        os.close(reading)
