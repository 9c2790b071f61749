"""What there is of isojob on this machine: what a test, a kill or the end of a host has left."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def children() -> set[tuple[int, str]]:
    """Our own children, dead or alive, by pid and name."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                stat = os.fsdecode(file.read())
        except OSError:
            continue
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        if int(stat[stat.rindex(")") + 2 :].split()[1]) == os.getpid():
            found.add((int(pid), name))
    return found


def living() -> set[tuple[int, str]]:
    """Our own children without the dead ones, which are reaped: nobody else may wait for them."""
    return {(pid, name) for pid, name in children() if os.waitpid(pid, os.WNOHANG) == (0, 0)}


@contextmanager
def adopting() -> Iterator[None]:
    """Whoever loses its parent below us becomes our child, not that of an init who hides it."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        living()


def cgroups(pid: int | None = None) -> set[str]:
    """Directories of pools of a process, of this one by default."""
    prefix = f"isojob-{pid or os.getpid()}-"
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
