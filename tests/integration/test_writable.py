"""Roots that a job may write to: a copy-on-write view of its own, capped, gone with the job."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import anyio
import pytest
from environment import PATIENT, PYTHON
from pydantic import ValidationError

from isojob import (
    HostNotSupportedError,
    Mount,
    Pool,
    PythonPool,
    Root,
    Sandbox,
    Status,
    run_isolated,
)

LINKS = {name: f"usr/{name}" for name in ("bin", "lib", "lib64", "sbin")}


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A root file system; programs are the host's, bound over its /usr."""
    tmp_path.chmod(0o755)
    for name, text in {
        "opt/tool/a": "first",
        "opt/tool/b": "second",
        "etc/passwd": "root:x:0:0::/root:/bin/sh\njob:x:1000:1000::/box:/bin/sh\n",
        "root/.secret": "of root",
        "usr/local/x": "hidden by the mount",
        "tmp/x": "hidden by the job's own",
    }.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, target in LINKS.items():
        (tmp_path / "root" / name).symlink_to(target)
    (tmp_path / "root/root").chmod(0o700)
    (tmp_path / "root/root/.secret").chmod(0o600)
    return tmp_path / "root"


def sandbox(root: Root, *mounts: Mount, **fields: str) -> Sandbox:
    return Sandbox.model_validate(
        {"root": root, "mounts": (Mount.bind("/usr", "/usr"), *mounts), **fields}
    )


def everything(top: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that a job could change of a tree."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        info = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (info.st_mode, info.st_uid, info.st_mtime_ns, data)
    return found


async def test_changes_are_its_own(top: Path) -> None:
    """A job owns the root and changes it at will; the next one, and the directory, see nothing."""
    script = """
        set -e
        cat /opt/tool/a; echo more >>/opt/tool/a; rm /opt/tool/b; cat /opt/tool/a
        mkdir -p /new/deep; echo made >/new/deep/f; cat /new/deep/f /root/.secret; echo
        mv /opt/tool/a /etc/moved; ln -s /etc/moved /link; cat /link
        chmod 700 /opt; rm -r /etc; mkdir /etc; ls -A /opt/tool /etc
        stat -c %u:%a /opt /new / /root
    """
    before = everything(top)
    async with Pool(sandbox(Root.directory(top, writable=True))) as pool:
        for _ in range(3):
            result = await pool.run(["sh", "-c", script])
            assert result.status is Status.OK, result.stderr
            assert (result.stdout or b"").decode().splitlines() == [
                *("firstfirstmore", "made", "of root", "firstmore"),
                *("/etc:", "", "/opt/tool:", "1000:700", "1000:755", "1000:755", "1000:700"),
            ]
    assert everything(top) == before


async def test_side_by_side(top: Path) -> None:
    """Jobs at once have a root each."""
    script = "echo $0 >/opt/tool/a; sleep 0.3; cat /opt/tool/a; ls /opt/tool | wc -l; >/opt/tool/$0"
    async with Pool(sandbox(Root.directory(top, writable=True)), max_jobs=4) as pool:
        seen: dict[int, bytes | None] = {}

        async def one(number: int) -> None:
            seen[number] = (await pool.run(["sh", "-c", script, str(number)])).stdout

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(one, number)
    assert seen == {number: f"{number}\n2\n".encode() for number in range(8)}


async def test_it_is_capped(top: Path) -> None:
    """What is written counts as the job's disk and inodes, with /tmp and the working directory."""
    limits = PATIENT.model_copy(update={"disk": 8 * 2**20, "inodes": 100})
    script = """
        head -c 20000000 /dev/zero >/opt/fill; stat -c %s /opt/fill
        head -c 1000000 /dev/zero >/tmp/fill; stat -c %s /tmp/fill; rm /opt/fill /tmp/fill
        i=0; while mkdir /opt/$i; do i=$((i+1)); done; test $i -gt 50 && test $i -lt 100 && echo $i
    """
    for _ in range(2):
        result = await run_isolated(
            ["sh", "-c", script],
            sandbox=sandbox(Root.directory(top, writable=True)),
            limits=limits,
        )
        lines = (result.stdout or b"").split()
        assert 7_000_000 < int(lines[0]) <= 8 * 2**20, result.stderr
        assert int(lines[1]) < 200_000
        assert len(lines) == 3
        assert b"No space left on device" in (result.stderr or b"")


async def test_layers(top: Path, tmp_path: Path) -> None:
    """The highest wins, what a mark hides stays hidden, and the view is over all of them."""
    app = tmp_path / "app"
    (app / "opt/tool").mkdir(parents=True)
    (app / "opt/tool/b").write_text("of the app")
    (app / "opt").chmod(0o755)
    if os.geteuid() == 0:
        os.mknod(app / "root", stat.S_IFCHR, os.makedev(0, 0))
    root = Root.layers([top, app], writable=True)
    script = "cat /opt/tool/a /opt/tool/b; rm -r /opt/tool; mkdir /opt/tool; ls -A /opt/tool; test -e /root; echo $?"
    for _ in range(2):
        result = await run_isolated(["sh", "-c", script], sandbox=sandbox(root))
        expected = b"firstof the app" + (b"1" if os.geteuid() == 0 else b"0") + b"\n"
        assert result.stdout == expected, result.stderr
    assert (app / "opt/tool/b").read_text() == "of the app"


async def test_most_layers(tmp_path: Path) -> None:
    """As many as are allowed."""
    tmp_path.chmod(0o755)
    paths = [tmp_path / str(number) for number in range(60)]
    for path in paths:
        (path / "opt").mkdir(parents=True)
        (path / "opt" / path.name).write_text("")
        (path / "opt/x").write_text(path.name)
    for name, target in LINKS.items():
        (paths[0] / name).symlink_to(target)
    (paths[30] / "usr").mkdir()
    result = await run_isolated(
        ["sh", "-c", "ls /opt | wc -l; cat /opt/x; echo y >/opt/x"],
        sandbox=sandbox(Root.layers(paths, writable=True)),
    )
    assert (result.stdout or b"").split() == [b"61", b"59"], result.stderr
    assert result.ok


async def test_mounts_files_and_directories(top: Path, tmp_path: Path) -> None:
    """Mounts are made in each job's root, also where there is nothing; the working directory works."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/f").write_text("data")
    made = sandbox(
        Root.directory(top, writable=True),
        Mount.bind(tmp_path / "data", "/opt/data/deep"),
        Mount.tmpfs("/scratch", size="1MiB"),
        workdir="/home/me/work",
    )
    script = """
        pwd; cat in; cat /opt/data/deep/f; echo x 2>/dev/null >/opt/data/deep/f || echo refused
        echo y >/scratch/y; echo out >out; mv /home/me /home/you; ls /home
        mkdir -p /home/me/work; echo other >/home/me/work/out
    """
    async with Pool(made) as pool:
        for _ in range(2):
            result = await pool.run(
                ["sh", "-c", script], files={"in": b"input "}, collect=["out", "none"]
            )
            assert result.stdout == b"/home/me/work\ninput datarefused\nyou\n", result.stderr
            # It has put another directory in the place of the one it was asked to leave files in.
            assert result.files == {"out": b"out\n"}
            assert set(result.uncollected) == {"none"}
    assert (tmp_path / "data/f").read_text() == "data"
    assert not (top / "opt/data").exists()


async def test_session(top: Path) -> None:
    """The directory of a session is kept, the root is fresh for each of its jobs."""
    async with (
        Pool(sandbox(Root.directory(top, writable=True))) as pool,
        pool.session(files={"f": b"0"}) as session,
    ):
        script = "printf 1 >>f; printf 1 >>/opt/tool/a; cat f /opt/tool/a"
        assert (await session.run(["sh", "-c", script])).stdout == b"01first1"
        assert (await session.run(["sh", "-c", script], keep=False)).stdout == b"011first1"
        assert (await session.run(["sh", "-c", script])).stdout == b"011first1"
        assert (await session.collect("f")).files == {"f": b"011"}


async def test_nothing_more_than_a_view(top: Path) -> None:
    """No way back to the template's root, no path of the host, no set-id bit, no device."""
    program = """
import ctypes, os, stat, sys
assert sorted(os.listdir("/")) == sorted([*"bin box dev etc lib lib64 opt proc root sbin tmp usr".split()]), os.listdir("/")
assert os.stat("/..").st_ino == os.stat("/").st_ino and os.listdir("/tmp") == []
os.chdir("/"); [os.chdir("..") for _ in range(9)]
assert not os.path.exists("/.lower") and not os.path.exists("/.root") and not os.path.exists("/dev/.lower")
mounts = open("/proc/self/mountinfo").read()
print([line for line in mounts.splitlines() if " / / " in line][0])
assert sys.argv[1] not in mounts, mounts
os.mkdir("/bin2"); os.close(os.open("/bin2/f", os.O_CREAT | os.O_WRONLY, 0o755)); os.chmod("/bin2/f", 0o6755)
options = [line for line in mounts.splitlines() if line.split()[4] == "/"][0].split()[5].split(",")
assert {"rw", "nosuid", "nodev"} <= set(options), options
try:
    os.mknod("/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
except OSError: pass
else: sys.exit("a device")
try: os.listdir("/proc/1/root")
except OSError: pass
else: sys.exit("init's root")
libc = ctypes.CDLL(None)
for target in (b"/", b"/opt", b"/proc", b"/box"):
    assert libc.mount(b"/usr", target, None, 4096, None) == -1
    assert libc.umount2(target, 2) == -1
try: os.chroot("/opt")
except PermissionError: pass
else: sys.exit("chroot")
try: os.rename("/proc", "/gone")
except OSError: pass
else: sys.exit("moved a mount")
"""
    result = await run_isolated(
        [PYTHON, "-c", program, str(top)], sandbox=sandbox(Root.directory(top, writable=True))
    )
    assert result.ok, result.stderr
    assert re.search(rb" / / rw", result.stdout or b"")


async def test_whose_it_is(top: Path) -> None:
    """Only root can give the layers to another id than the caller's, and the posture says so."""
    async with Pool(sandbox(Root.directory(top, writable=True))) as pool:
        result = await pool.run(["stat", "-c", "%u:%g", "/opt", "/opt/tool/a"])
        assert result.stdout == b"1000:1000\n1000:1000\n"
        privilege = result.posture.privilege
        assert privilege == ("root" if os.geteuid() == 0 else "user")


async def test_others_files_stay_theirs(top: Path) -> None:
    """What neither root nor the caller owns in there is read as its mode says, and not written."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (top / "opt" / name).write_text(name)
        (top / "opt" / name).chmod(mode)
        os.chown(top / "opt" / name, 33, 33)
    (top / "opt/group").write_text("group")
    os.chown(top / "opt/group", 0, 42)
    script = """
        stat -c %u /opt/open; cat /opt/open /opt/closed /opt/group
        for f in open closed group; do
            echo x >>/opt/$f && echo written; chmod 777 /opt/$f && echo changed
            rm -f /opt/$f && echo removed; mv /opt/$f /opt/new && echo renamed
        done
    """
    result = await run_isolated(
        ["sh", "-c", script], sandbox=sandbox(Root.directory(top, writable=True))
    )
    assert result.stdout == b"65534\nopengroup"
    assert (top / "opt/open").read_text() == "open"


async def test_an_etc_of_its_own(tmp_path: Path) -> None:
    """Where the layers have none, or hide it: isojob's, which mounts can go below, and the job's."""
    tmp_path.chmod(0o755)
    for name, target in LINKS.items():
        (tmp_path / "root" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / name).symlink_to(target)
    (tmp_path / "certificates").write_text("certificate")
    layers = [tmp_path / "root"]
    if os.geteuid() == 0:
        layers = [tmp_path / "with", *layers, tmp_path / "without"]
        (tmp_path / "with/etc").mkdir(parents=True)
        (tmp_path / "without").mkdir()
        os.mknod(tmp_path / "without/etc", stat.S_IFCHR, os.makedev(0, 0))
    made = sandbox(
        Root.layers(layers, writable=True),
        Mount.bind(tmp_path / "certificates", "/etc/ssl/certs/all"),
    )
    script = "id -un; cat /etc/ssl/certs/all; echo x >/etc/new; rm /etc/passwd; id -un; ls /etc/new"
    for _ in range(2):
        result = await run_isolated(["sh", "-c", script], sandbox=made)
        assert result.stdout == b"job\ncertificate1000\n/etc/new\n", result.stderr


async def test_what_cannot_be_mapped(top: Path, tmp_path: Path) -> None:
    """A layer on an overlay, as in a container: refused as root, with the way out."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount an overlay")
    merged = tmp_path / "merged"
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={top},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", merged], check=True)
    try:
        with pytest.raises(HostNotSupportedError, match="does not let its files belong to jobs"):
            await run_isolated(["true"], sandbox=sandbox(Root.directory(merged, writable=True)))
        assert (await run_isolated(["true"], sandbox=sandbox(Root.directory(merged)))).ok
    finally:
        subprocess.run(["umount", merged], check=True)


async def test_links_in_the_way(top: Path) -> None:
    """An image's own /tmp may be a link anywhere: a directory is there instead, as in other roots."""
    (top / "tmp/x").unlink()
    (top / "tmp").rmdir()
    (top / "tmp").symlink_to("/opt")
    (top / "dev").symlink_to("nowhere")
    (top / "proc").write_text("no directory")
    before = everything(top)
    script = """
        set -e
        echo 1 >/tmp/f; test ! -L /tmp -a ! -L /dev; ls /opt; : </dev/zero; readlink /proc/self/cwd
    """
    for writable in (False, True):
        made = sandbox(Root.directory(top, writable=writable))
        result = await run_isolated(["sh", "-c", script], sandbox=made)
        assert result.stdout == b"tool\n/box\n", result
    assert everything(top) == before


def test_refused() -> None:
    """The host's own root, and warm interpreters, whose template has the root that its forks have."""
    with pytest.raises(ValidationError, match="the host's own root is never writable"):
        Root.model_validate({"writable": True})
    with pytest.raises(ValueError, match="no writable root"):
        PythonPool(sandbox=Sandbox(root=Root.directory("/srv", writable=True)))
    root = Root.directory("/srv", writable=True)
    for target in ("/home", "/home/me", "/.lower/0", "/.root"):
        with pytest.raises(ValidationError, match=r"working directory|own names"):
            Sandbox(root=root, workdir="/home/me", mounts=(Mount.tmpfs(target, size="1MiB"),))
    with pytest.raises(ValidationError, match="own names"):
        Sandbox(root=root, workdir="/.root/x")
    many = tuple(Mount.tmpfs(f"/m/{number}", size="1MiB") for number in range(65))
    with pytest.raises(ValidationError, match="at most 64"):
        Sandbox(root=root, mounts=many)
    with pytest.raises(ValidationError, match="listed twice"):
        Root.layers(["/srv", "/opt", "/srv"])
    made = Sandbox(root=Root.layers(["/srv", "/opt"], writable=True))
    assert Sandbox.model_validate_json(made.model_dump_json()) == made
    assert made != Sandbox(root=Root.layers(["/srv", "/opt"]))
