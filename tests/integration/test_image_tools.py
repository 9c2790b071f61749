"""Images as Debian's own tools make them: umoci, skopeo, debootstrap; and a root without glibc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environment import SLOW, WHOLE

from isojob import Image, Root, Sandbox, run_isolated

pytestmark = pytest.mark.skipif(SLOW > 1, reason="takes minutes on an emulated CPU")

PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv)
{
    char line[100] = "";
    FILE *f = fopen("/etc/motto", "r");
    printf("%s %s %s", argv[1], getenv("GREETING"), f ? fgets(line, sizeof(line), f) : "none\\n");
    f = fopen("/opt/removed", "r");
    printf("%s\\n", f ? "there" : "gone");
    return 0;
}
"""


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def tool(*command: str | Path, **options: Any) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600, **options)


def layout(directory: Path) -> Path:
    """An OCI image of two layers, the second of which removes a file of the first."""
    image = directory / "image"
    (directory / "main.c").write_text(PROGRAM)
    tool("gcc", "-static", "-o", directory / "main", directory / "main.c")
    tool("umoci", "init", "--layout", image)
    tool("umoci", "new", "--image", f"{image}:app")
    options = [] if os.geteuid() == 0 else ["--rootless"]
    bundle = directory / "bundle"
    tool("umoci", "unpack", *options, "--image", f"{image}:app", bundle)
    root = bundle / "rootfs"
    for name in ("etc", "opt", "bin"):
        (root / name).mkdir()
    (root / "etc/motto").write_text("first")
    (root / "opt/removed").write_text("")
    shutil.copy(directory / "main", root / "bin/main")
    tool("umoci", "repack", "--refresh-bundle", "--image", f"{image}:app", bundle)
    (root / "etc/motto").write_text("second\n")
    (root / "opt/removed").unlink()
    tool("umoci", "repack", "--image", f"{image}:app", bundle)
    entry = ["--config.entrypoint", "/bin/main", "--config.cmd", "hello"]
    tool("umoci", "config", "--image", f"{image}:app", *entry, "--config.env", "GREETING=world")
    return image


async def test_umoci_and_skopeo(tmp_path: Path) -> None:
    """A layout, and both kinds of archive, give the same root, variables and entry point."""
    need("umoci", "skopeo", "gcc")
    tmp_path.chmod(0o755)
    made = layout(tmp_path)
    tool("skopeo", "copy", f"oci:{made}:app", f"oci-archive:{tmp_path}/oci.tar:app")
    tool("skopeo", "copy", f"oci:{made}:app", f"docker-archive:{tmp_path}/docker.tar:app:latest")
    for path in (made, tmp_path / "oci.tar", tmp_path / "docker.tar"):
        image = Image.load(path, store=tmp_path / f"store-{path.name}")
        for writable in (False, True):
            result = await run_isolated(image.command(), sandbox=image.sandbox(writable=writable))
            assert result.stdout == b"hello world second\ngone\n", (path, result)


async def test_musl(tmp_path: Path) -> None:
    """A program and its loader of another C library than the host's, and nothing else."""
    need("musl-gcc")
    tmp_path.chmod(0o755)
    (tmp_path / "main.c").write_text(PROGRAM)
    root = tmp_path / "root"
    (root / "lib").mkdir(parents=True)
    tool("musl-gcc", "-o", root / "main", tmp_path / "main.c")
    loader = next(Path("/lib").glob("ld-musl-*.so.1"))
    shutil.copy(loader, root / "lib" / loader.name)
    for writable in (False, True):
        result = await run_isolated(
            ["/main", "musl"], sandbox=Sandbox(root=Root.directory(root, writable=writable))
        )
        assert result.stdout == b"musl (null) none\ngone\n", result


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of a whole Debian."""
    need("debootstrap")
    if os.geteuid() != 0:
        pytest.skip("needs root, to run debootstrap")
    if not WHOLE:
        pytest.skip("takes minutes and a mirror: in the whole tests")
    directory = tmp_path_factory.mktemp("debian")
    directory.chmod(0o755)
    tool("debootstrap", "--variant=minbase", "bookworm", directory / "root")
    return directory / "root"


async def test_debootstrap(debian: Path) -> None:
    """A whole Debian: its package manager works on a root of the job's own."""
    script = """
        set -e
        PATH=$PATH:/usr/sbin:/sbin
        . /etc/os-release; echo $ID; dpkg -l | grep -c ^ii >/box/count; perl -e 'print 6*7, "\\n"'
        mkdir -p /tmp/p/DEBIAN /tmp/p/opt
        printf 'Package: made\\nVersion: 1\\nArchitecture: all\\nMaintainer: x\\nDescription: x\\n' >/tmp/p/DEBIAN/control
        echo installed >/tmp/p/opt/made
        dpkg-deb --root-owner-group -b /tmp/p /tmp/made.deb >&2
        dpkg --force-not-root -i /tmp/made.deb >&2
        cat /opt/made; rm -r /usr/share/doc; ls -d /usr/share/doc 2>/dev/null || echo removed
    """
    for _ in range(2):
        result = await run_isolated(
            ["sh", "-c", script],
            sandbox=Sandbox(root=Root.directory(debian, writable=True)),
            collect=["count"],
        )
        assert result.stdout == b"debian\n42\ninstalled\nremoved\n", result.stderr
        assert int(result.files["count"]) > 50
    assert not (debian / "opt/made").exists()
