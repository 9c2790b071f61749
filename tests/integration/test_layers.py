"""Root.layers: directories one over the other, shared by all jobs, changed by none."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environment import settle, write_image
from pydantic import ValidationError

from isojob import (
    HostNotSupportedError,
    Image,
    Mount,
    Pool,
    Root,
    Sandbox,
    SandboxSetupError,
    run_isolated,
)


def tree(top: Path, files: dict[str, str]) -> Path:
    """A layer, readable by every job."""
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    top.chmod(0o755)
    return top


def sandbox(*layers: Path, writable: bool = False) -> Sandbox:
    """With the host's programs in the lowest layer."""
    for name in ("bin", "lib", "lib64", "sbin"):
        if (host := Path("/", name)).is_symlink() and not (layers[0] / name).is_symlink():
            (layers[0] / name).symlink_to(os.readlink(host))
    root = Root.layers(layers, writable=writable)
    return Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),))


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, ...]:
    tmp_path.chmod(0o755)
    (tmp_path / "odd,na:me\\").mkdir()
    return (
        tree(tmp_path / "base", {"opt/a": "base", "opt/b": "base", "srv/deep/c": "base", "f": "1"}),
        tree(tmp_path / "odd,na:me\\" / "tool", {"opt/b": "tool", "opt/t": "tool"}),
        tree(tmp_path / "app", {"opt/t": "app", "app/main": "app"}),
    )


async def test_the_highest_wins(layers: tuple[Path, ...]) -> None:
    """Files of each layer, and those of the lower ones where no other has them."""
    script = "cat /opt/a /opt/b /opt/t /srv/deep/c /app/main /f; ls -A /dev | grep layers; ls -d /proc/1 /box"
    for _ in range(2):
        result = await run_isolated(["sh", "-c", script], sandbox=sandbox(*layers))
        assert result.stdout == b"basetoolappbaseapp1/box\n", result.stderr


async def test_nothing_can_be_changed(layers: tuple[Path, ...]) -> None:
    """Not by the job, whoever owns the files; mount flags are those of other binds."""
    script = "for f in /opt/a /opt/new /f /app/main; do echo x >$f; rm -f $f; done; cat /opt/a /f; grep -E ' /(opt|f|app) ' /proc/self/mounts"
    result = await run_isolated(["sh", "-c", script], sandbox=sandbox(*layers))
    lines = (result.stdout or b"").decode().splitlines()
    assert lines[0].startswith("base1isojob "), lines
    assert len(lines) == 3
    for line in lines:
        options = line.split()[3].split(",")
        assert {"ro", "nosuid", "nodev"} <= set(options), line
    assert (layers[0] / "opt/a").read_text() == "base"
    assert not (layers[2] / "opt/new").exists()


async def test_one_layer(layers: tuple[Path, ...]) -> None:
    """A single one is a root, too."""
    result = await run_isolated(["cat", "/opt/b"], sandbox=sandbox(layers[0]))
    assert result.stdout == b"base"


@pytest.mark.parametrize("writable", [False, True])
async def test_marks_hide(layers: tuple[Path, ...], *, writable: bool, is_root: bool) -> None:
    """A device 0, 0 hides a file or an entry of the root, an opaque directory all below it."""
    top = layers[2]
    os.mknod(top / "f", stat.S_IFCHR, os.makedev(0, 0))  # which anybody may make since Linux 5.8
    os.mknod(top / "opt/a", stat.S_IFCHR, os.makedev(0, 0))
    (top / "srv").mkdir()
    kind = "trusted" if is_root and not writable else "user"
    os.setxattr(top / "srv", f"{kind}.overlay.opaque", b"y")
    made = sandbox(*layers, writable=writable)
    result = await run_isolated(["ls", "-A", "/opt", "/srv", "/f"], sandbox=made)
    assert result.stdout == b"/opt:\nb\nt\n\n/srv:\n", result.stdout
    assert b"/f" in (result.stderr or b"")


@pytest.mark.parametrize("kind", ["directory", "layers"])
async def test_a_working_directory_of_the_image(
    layers: tuple[Path, ...], kind: str, is_root: bool
) -> None:
    """It takes nothing else away: the root has the directory, or nothing at its top."""
    lower, upper = layers[0], layers[2]
    (lower / "app" / "src").mkdir(parents=True)
    (lower / "app" / "src" / "old").touch()
    (lower / "home").mkdir()
    for closed in ("closed/job", "app/closed/job"):
        (lower / closed).mkdir(parents=True)
        (lower / closed).parent.chmod(0o700)
    top = lower if kind == "directory" else upper
    tree(top, {"app/other": "there"})
    made = sandbox(lower, upper)
    root = Root.directory(lower) if kind == "directory" else made.root
    for workdir in ("/app/src", "/home/job", "/new/job", "/srv", "/closed/job"):
        one = Sandbox(root=root, mounts=made.mounts, workdir=workdir)
        async with Pool(sandbox=one) as pool, pool.session() as session:
            command = ["sh", "-c", "pwd; ls; cat /app/other; echo 1 > new"]
            for run in (pool.run, session.run):
                result = await run(command)
                assert result.ok and result.stdout == f"{workdir}\nthere".encode(), result
    for workdir, words in (("/app/new", "nothing can be made"), ("/app/other", "a directory is")):
        one = Sandbox(root=root, mounts=made.mounts, workdir=workdir)
        with pytest.raises(SandboxSetupError, match=f"mkdir {workdir}: .*{words}"):
            await run_isolated(["true"], sandbox=one)
    if is_root:
        one = Sandbox(root=root, mounts=made.mounts, workdir="/app/closed/job")
        with pytest.raises(SandboxSetupError, match="closed to the job's user"):
            await run_isolated(["true"], sandbox=one)
    writable = Root.directory(lower, writable=True)
    one = Sandbox(root=writable, mounts=made.mounts, workdir="/app/new")
    assert (await run_isolated(["pwd"], sandbox=one)).stdout == b"/app/new\n"


async def test_many_layers(tmp_path: Path) -> None:
    """As many as are allowed."""
    tmp_path.chmod(0o755)
    many = [tree(tmp_path / str(n), {f"opt/{n}": "", "opt/x": str(n)}) for n in range(60)]
    async with Pool(sandbox(*many)) as pool:
        result = await pool.run(["sh", "-c", "ls /opt | wc -l; cat /opt/x"])
        assert (result.stdout or b"").split() == [b"61", b"59"]


@pytest.mark.parametrize("paths", [[], ["relative"], ["/"], ["/proc"], ["/a/../b"], ["/x"] * 61])
def test_bad_layers(paths: Any) -> None:
    """Refused as the root is described."""
    with pytest.raises(ValidationError):
        Root.layers(paths)
    with pytest.raises(TypeError):
        Root.layers("/usr")


async def test_missing_layers(tmp_path: Path) -> None:
    """Named before anything starts."""
    tmp_path.chmod(0o755)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for bad in ("none", "file"):
        with pytest.raises((SandboxSetupError, OSError)):
            await run_isolated(["true"], sandbox=sandbox(tmp_path / "there", tmp_path / bad))
    (tmp_path / "proc").symlink_to("/proc/1")
    with pytest.raises((ValueError, SandboxSetupError)):
        await run_isolated(["true"], sandbox=sandbox(tmp_path / "there", tmp_path / "proc"))


@pytest.mark.parametrize("writable", [False, True])
async def test_layers_that_overlap(tmp_path: Path, *, writable: bool) -> None:
    """Overlayfs takes none that holds another: both are named before anything starts."""
    tmp_path.chmod(0o755)
    (tmp_path / "p/q").mkdir(parents=True)
    (tmp_path / "p-q").mkdir()
    (tmp_path / "same").symlink_to("p")
    (tmp_path / "inner").symlink_to("p/q")
    for names in (("p", "p/q"), ("p/q", "p"), ("p", "same"), ("p-q", "inner", "same")):
        paths = [tmp_path / name for name in names]
        told = f"layers: {paths[-1]} .*{paths[-2]}|layers: {paths[-2]} .*{paths[-1]}"
        with pytest.raises(ValueError, match=told):
            await run_isolated(["true"], sandbox=sandbox(*paths, writable=writable))
    made = sandbox(tmp_path / "p", tmp_path / "p-q", writable=writable)
    assert (await run_isolated(["true"], sandbox=made)).ok


def image(kind: str, directory: Path) -> Path:
    """An image of that kind with the directory's files."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount images")
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-qa", "loop", kind], check=False)
    if kind not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"needs {kind} in the kernel")
    if shutil.which({"squashfs": "mksquashfs", "erofs": "mkfs.erofs"}[kind]) is None:
        pytest.skip(f"needs the tools of {kind}")
    made = directory.with_suffix(f".{kind}")
    if kind == "squashfs":
        command: list[str | Path] = ["mksquashfs", directory, made]
    else:
        command = ["mkfs.erofs", made, directory]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def loops(path: Path) -> list[str]:
    """Loop devices on that file."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [str(file) for file in files if file.read_text().strip() == str(path)]


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
async def test_image_files(layers: tuple[Path, ...], kind: str, *, writable: bool) -> None:
    """A layer may be a file with a file system: mounted with the pool, gone with it, however it ends."""
    lowest = sandbox(layers[0]).root.lower[0]
    packed = image(kind, Path(lowest))
    root = Root.layers([packed, *layers[1:]], writable=writable)
    made = Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),))
    script = "cat /opt/a /opt/b /opt/t /f; echo x >/opt/a; cat /opt/a; ls -A /dev | grep images"
    async with Pool(made) as pool:
        for _ in range(2):
            result = await pool.run(["sh", "-c", script])
            expected = b"basetoolapp1" + (b"x\n" if writable else b"base")
            assert result.stdout == expected, result.stderr
        assert len(loops(packed)) == 1
        assert pool.stock.zygote is not None
        os.kill(pool.stock.zygote.pid, signal.SIGKILL)
        assert (await pool.run(["cat", "/opt/a"])).stdout == b"base"
    assert not settle(lambda: loops(packed))


async def test_bad_image_files(layers: tuple[Path, ...], tmp_path: Path) -> None:
    """Named before anything runs, and no loop device stays."""
    (tmp_path / "text").write_text("text")
    with pytest.raises(SandboxSetupError, match="neither a directory nor squashfs or EROFS"):
        await run_isolated(["true"], sandbox=sandbox(layers[0], tmp_path / "text"))
    with pytest.raises(SandboxSetupError, match="images are for Root.layers"):
        await run_isolated(["true"], sandbox=Sandbox(root=Root.directory(tmp_path / "text")))
    (tmp_path / "broken").write_bytes(b"hsqs" + bytes(100_000))
    wanted = "mount of a layer" if os.geteuid() == 0 else "only root can mount them"
    if "squashfs" not in Path("/proc/filesystems").read_text().split():
        wanted += "|is not to be had"
    with pytest.raises((SandboxSetupError, HostNotSupportedError), match=wanted):
        await run_isolated(["true"], sandbox=sandbox(layers[0], tmp_path / "broken"))
    assert not settle(lambda: loops(tmp_path / "broken"))


async def test_json(layers: tuple[Path, ...]) -> None:
    """The description survives a round trip."""
    made = sandbox(*layers)
    assert Sandbox.model_validate_json(made.model_dump_json()) == made
    assert hash(made) == hash(sandbox(*layers))


async def test_image(tmp_path: Path) -> None:
    """A container image as a root, with its variables and its entry point."""
    config = {"Env": ["GREETING=hello"], "WorkingDir": "/app", "Entrypoint": ["/bin/sh", "main.sh"]}
    tmp_path.chmod(0o755)
    files = {
        "app/main.sh": b"echo $GREETING $1; ls -ld /app; id -un",
        "etc/passwd": b"imaged:x:1000:1000::/:/bin/sh\n",
    }
    write_image(tmp_path / "image", config, files)
    image = Image.load(tmp_path / "image", store=tmp_path / "store")
    result = await run_isolated(
        image.command("world"),
        cwd=image.workdir,
        sandbox=image.sandbox(mounts=(Mount.bind("/usr", "/usr"),)),
    )
    lines = (result.stdout or b"").decode().splitlines()
    assert lines[0] == "hello world", result.stderr
    assert lines[1].startswith("drwxr-xr-x")
    assert lines[2] == "imaged"
    root = Root.oci(tmp_path / "image", store=tmp_path / "store")
    result = await run_isolated(
        ["sh", "-c", "echo $GREETING; pwd"],
        sandbox=Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),)),
    )
    assert result.stdout == b"hello\n/box\n", result


async def test_an_image_that_is_loaded_again(tmp_path: Path) -> None:
    """After pruning, jobs run on what is unpacked now, not on what a pool still has mounted."""
    tmp_path.chmod(0o755)
    write_image(tmp_path / "image", {"WorkingDir": "none/has/it"}, {"f": b"here"})
    for _ in range(2):
        image = Image.load(tmp_path / "image", store=tmp_path / "store")
        made = image.sandbox(mounts=(Mount.bind("/usr", "/usr"),))
        result = await run_isolated(["sh", "-c", "cat /f; pwd"], cwd=image.workdir, sandbox=made)
        assert result.stdout == b"here/none/has/it\n", result
        assert Image.prune(store=tmp_path / "store") == [image]
