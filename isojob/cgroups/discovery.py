"""Which cgroups this process is in: /proc/self/cgroup and /proc/self/mountinfo (cgroups(7))."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isojob.cgroups.base import CellFiles, Counters, Driver, Subtree, Write
from isojob.cgroups.v1 import V1
from isojob.cgroups.v2 import V2
from isojob.errors import HostNotSupportedError
from isojob.limits import Limits

__all__ = ["NoCgroups", "find", "locate", "memory_ceiling", "read_text", "unescape"]

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Location:
    """Our own cgroup in one hierarchy."""

    controllers: tuple[str, ...]
    directory: Path


def locate(cgroup: str, mountinfo: str) -> tuple[Path | None, dict[str, Path]]:
    """Finds our own cgroups.

    Args:
        cgroup: Text of /proc/self/cgroup.
        mountinfo: Text of /proc/self/mountinfo.

    Returns:
        Our directory in the unified hierarchy, and by controller in those of v1; only what is
        mounted where we can see our own cgroup: a mount of another part of the tree is no use.
    """
    unified: Path | None = None
    legacy: dict[str, Path] = {}
    mounts = [_mount(line) for line in mountinfo.split("\n")]
    for line in cgroup.split("\n"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for kind, root, point, options in mounts:
            if kind == "cgroup2" and number == "0":
                unified = unified or _below(path, root, point)
            elif kind == "cgroup" and number != "0":
                for name in names.split(","):
                    if name in options and (found := _below(path, root, point)):
                        legacy.setdefault(name, found)
    return unified, legacy


_VISIBLE = (
    "mount cgroup2 on /sys/fs/cgroup; in a container run it with its own cgroup namespace "
    "and a writable /sys/fs/cgroup (docs/hosts.md)"
)


def _locate_own() -> tuple[Path | None, dict[str, Path]]:
    proc = Path("/proc/self")
    return locate(read_text(proc / "cgroup"), read_text(proc / "mountinfo"))


def read_text(path: Path) -> str:
    """A file of /proc with names of directories and mounts, which are any bytes."""
    return os.fsdecode(path.read_bytes())


def _mount(line: str) -> tuple[str, str, Path, tuple[str, ...]]:
    before, _, after = line.partition(" - ")
    words, kind = before.split(" "), after.split(" ")
    if len(words) < 5 or len(kind) < 3:
        return "", "", Path(), ()
    return kind[0], unescape(words[3]), Path(unescape(words[4])), tuple(kind[2].split(","))


def unescape(text: str) -> str:
    """A name as it stands in mountinfo (proc_pid_mountinfo(5))."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def _below(path: str, root: str, point: Path) -> Path | None:
    """`path` is relative to our cgroup namespace; `root` is what the mount shows of the tree."""
    if root not in ("/", path) and not path.startswith(root + "/"):
        return None
    if ".." in path.split("/"):
        return None
    inside = path[len(root) :] if root != "/" else path
    directory = point / inside.lstrip("/")
    try:
        return directory if directory.is_dir() else None
    except OSError:  # below what is mounted over it, and closed to us
        return None


class NoCgroups(Driver):
    """What is left when the caller accepts to have no cgroup: rlimits and namespaces."""

    version = 0
    files = CellFiles()

    def __init__(self, reason: str, cure: str) -> None:
        self.reason = reason
        self.missing = dict.fromkeys(
            (
                "cgroup",
                "memory_limit",
                "swap_limit",
                "process_limit",
                "cpu_accounting",
                "cpus",
                "cpuset",
                "io_limit",
            ),
            cure,
        )

    def create(self) -> Subtree:
        return Subtree((), (), ())

    def cell(self, limits: Limits, devices: tuple[str, ...]) -> tuple[int, tuple[Write, ...]]:
        return 0, ()

    def job(self, limits: Limits, parked: Limits) -> tuple[tuple[int, bytes], ...]:
        return ()

    def counters(self, values: Sequence[int], files: Mapping[int, bytes]) -> Counters:
        return Counters()


def memory_ceiling() -> int | None:
    """The lowest memory limit of the cgroups we are in, bytes; None: there is none we can see.

    v2 shows each ancestor's ``memory.max``, up to the root of our cgroup namespace; v1 tells the
    lowest of them as ``hierarchical_memory_limit`` of ``memory.stat``.
    """
    try:
        return ceiling(*_locate_own())
    except OSError:
        return None


def ceiling(unified: Path | None, legacy: Mapping[str, Path]) -> int | None:
    """The same for what `locate` found."""
    found: list[int] = []
    directory = unified
    while directory is not None and (directory / "cgroup.procs").exists():
        with suppress(OSError, ValueError):  # "max"; the root has none
            found.append(int((directory / "memory.max").read_text()))
        directory = directory.parent
    with suppress(OSError, KeyError, ValueError):
        for line in (legacy["memory"] / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "hierarchical_memory_limit":
                found.append(int(value))
    return min(found, default=None)


def find() -> Driver:
    """The best cgroups of this host: v2 if it has the controllers, else v1.

    Raises:
        HostNotSupportedError: Neither is usable.
    """
    try:
        unified, legacy = _locate_own()
    except OSError as error:
        raise HostNotSupportedError("/proc cannot be read", "mount proc on /proc") from error
    if unified is not None:
        try:
            driver = V2(unified)
        except OSError as error:
            raise HostNotSupportedError(
                f"the cgroup of this process cannot be read ({error})", _VISIBLE
            ) from error
        # Hybrid hosts mount v2 without controllers, for systemd alone.
        if {"memory", "pids"} <= driver.controllers or not legacy:
            return driver
    if "memory" in legacy or "pids" in legacy:
        return V1(legacy)
    raise HostNotSupportedError("no cgroup of this process is visible", _VISIBLE)
