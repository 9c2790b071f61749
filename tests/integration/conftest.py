"""Integration tests run real jobs: as root or as an ordinary user in a delegated cgroup."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from environment import PYTHON, SLOW, cgroup_version, settle

from isojob import Mount, Sandbox, _run
from isojob.host.rootfs import block_devices


def children() -> set[tuple[int, str]]:
    """Our own children, dead or alive, by pid and name."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            name = stat[stat.index("(") + 1 : stat.rindex(")")]
            if int(stat[stat.rindex(")") + 2 :].split()[1]) == os.getpid():
                found.add((int(entry.name), name))
    return found


def cgroups() -> set[str]:
    """Directories of pools of this process."""
    prefix = f"isojob-{os.getpid()}-"
    found: set[str] = set()
    for top, directories, _ in os.walk("/sys/fs/cgroup"):
        found.update(os.path.join(top, name) for name in directories if name.startswith(prefix))
    return found


def mounts() -> set[str]:
    """Mounts of this process that look like ours."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if "isojob" in line.split(" - ")[-1]}


def descriptors() -> dict[str, str]:
    """Open descriptors, without the one that lists them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


def loops() -> set[str]:
    """Files behind loop devices."""
    found = set()
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it may go meanwhile
            found.add(file.read_text().strip())
    return found


def temporary() -> set[str]:
    """What carries our name where programs leave things."""
    places = ("/tmp", "/var/tmp", "/dev/shm")
    return {
        os.path.join(place, name)
        for place in places
        if os.path.isdir(place)
        for name in os.listdir(place)
        if "isojob" in name and "pytest" not in name
    }


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test leaves no process, cgroup, mount, descriptor or file behind."""
    gc.collect()
    before = (children(), temporary(), loops())
    before_fds = descriptors()
    yield
    _run._close_pools()
    gc.collect()
    assert not settle(lambda: children() - before[0]), "processes are left"
    assert not settle(cgroups), "cgroups are left"
    assert not mounts(), "mounts are left"
    assert not settle(lambda: loops() - before[2]), "loop devices are left"
    # Others on this machine may use isojob, too: what they make goes.
    assert not settle(lambda: temporary() - before[1]), "files are left"

    def fds() -> dict[str, str]:
        return {fd: name for fd, name in descriptors().items() if before_fds.get(fd) != name}

    left = settle(fds, 1.0)
    assert not left, f"descriptors are left: {left}"


@pytest.fixture
def python() -> str:
    """An interpreter below /usr, which every cell sees."""
    if not os.path.exists(PYTHON):
        pytest.fail("these tests need /usr/bin/python3")
    return PYTHON


@pytest.fixture
def disk() -> Iterator[Sandbox]:
    """A sandbox with a writable directory of a block device at /disk."""
    directory = tempfile.mkdtemp(prefix="disk-", dir=os.environ.get("SCRATCH_DIR", "/var/tmp"))
    Path(directory).chmod(0o777)
    sandbox = Sandbox(mounts=(Mount.bind(directory, "/disk", read_only=False),))
    assert block_devices(sandbox), "these tests need a directory on a block device"
    yield sandbox
    shutil.rmtree(directory)


@pytest.fixture
def is_root() -> bool:
    """Whether cells get host ids of their own."""
    return os.geteuid() == 0


def pytest_report_header() -> str:
    """Says which of the environments this is."""
    return (
        f"isojob: kernel {os.uname().release}, cgroup v{cgroup_version()}, uid {os.geteuid()}, "
        f"python {sys.version.split()[0]}, slowness {SLOW}"
    )
