"""The doctor's look at cgroups: makes real ones, writes real limits, puts a real process in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from isojob.cgroups import Driver, Subtree, find
from isojob.errors import HostNotSupportedError
from isojob.host.doctor_check import Check, cgroup_cure
from isojob.host.rootfs import block_devices
from isojob.limits import Limits
from isojob.sandbox import Sandbox

__all__ = ["examine_cgroups"]

SECTION = "cgroup"
_ATTACH = "a process in it"
_CELL = "doctor"
_SHOWN = 40


@dataclass(frozen=True)
class _Controller:
    """One controller, by the names that v1 and v2 give to its files."""

    name: str
    prefixes: tuple[str, ...]
    protection: str
    needed_for: str
    required: bool


_CONTROLLERS = (
    _Controller("memory", ("memory.",), "memory_limit", "limits.memory", required=True),
    _Controller("pids", ("pids.",), "process_limit", "limits.processes", required=True),
    _Controller("cpu", ("cpu.",), "cpus", "limits.cpus", required=False),
    _Controller("cpuset", ("cpuset.",), "cpuset", "limits.cpuset", required=False),
    _Controller("io", ("io.", "blkio."), "io_limit", "limits.io_*", required=False),
)

Prober = Callable[..., dict[str, tuple[int, str]]]


def examine_cgroups(probe: Prober) -> Iterator[Check]:
    """Tries everything that the cgroups of this process are needed for; leaves none behind.

    Args:
        probe: Runs a group of `doctor_probes`.
    """

    def check(name: str, ok: bool | None, found: str, needed: str, cure: str = "") -> Check:
        return Check(section=SECTION, name=name, found=found, needed_for=needed, ok=ok, cure=cure)

    try:
        driver = find()
    except HostNotSupportedError as error:
        yield check("version", False, error.missing, "every limit", cgroup_cure(error.cure))
        return
    where = _own(driver)
    yield check("version", True, f"v{driver.version}, ours is {where}", "every limit")
    with ExitStack() as stack:
        try:
            subtree = driver.create()
        except HostNotSupportedError as error:
            yield check(
                "delegated to us",
                False,
                error.missing,
                "every limit",
                cgroup_cure(error.cure, driver.version),
            )
            return
        stack.callback(subtree.remove)
        stack.callback(subtree.release)
        cell = _Cell(driver, subtree)
        stack.callback(cell.remove)
        cell.make()
        yield check("delegated to us", True, "one below it was made", "every limit")
        for controller in _CONTROLLERS:
            yield _controller(driver, cell, controller, check)
        yield from _counters(driver, cell, check)
        yield _attach(driver, cell, probe, check)


Maker = Callable[..., Check]


def _own(driver: Driver) -> str:
    own = getattr(driver, "own", None)
    if isinstance(own, Path):
        return str(own)
    return ", ".join(sorted(own)) if isinstance(own, dict) else "somewhere"


@dataclass
class _Cell:
    """A cell's cgroup, made as the zygote makes it."""

    driver: Driver
    subtree: Subtree
    directories: dict[int, Path] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()

    def make(self) -> None:
        """Makes the directories and writes every limit; nothing is raised."""
        self.devices = block_devices(Sandbox()) or _any_disk()
        limits = Limits(
            cpus=0.5,
            cpuset=str(min(os.sched_getaffinity(0))),
            io_read_bps="1GiB" if self.devices else None,
        )
        usable = {name for name in ("cpus", "cpuset", "io_limit") if self._has(name)}
        limits = limits.model_copy(
            update={
                name: None
                for name, protection in (
                    ("cpus", "cpus"),
                    ("cpuset", "cpuset"),
                    ("io_read_bps", "io_limit"),
                )
                if protection not in usable
            }
        )
        mask, writes = self.driver.cell(limits, self.devices)
        for index, base in enumerate(self.subtree.directories):
            if mask & (1 << index):
                with suppress(OSError):
                    (base / _CELL).mkdir()
                    self.directories[index] = base / _CELL
        for write in writes:
            text = write.value.decode()
            try:
                (self.directories[write.hierarchy] / write.file).write_bytes(write.value)
            except KeyError:
                self.failed[write.file] = "its directory could not be made"
            except OSError as error:
                if not write.optional:
                    self.failed[write.file] = f"{text}: {error.strerror}"
            else:
                self.written[write.file] = text

    def _has(self, protection: str) -> bool:
        return protection not in self.driver.missing

    def exists(self, file: str) -> bool:
        """Whether the cgroup has a file of this name that can be read."""
        for directory in self.directories.values():
            with suppress(OSError):
                (directory / file).read_bytes()
                return True
        return False

    def remove(self) -> None:
        """Takes the directories away."""
        for directory in self.directories.values():
            with suppress(OSError):
                directory.rmdir()


def _any_disk() -> tuple[str, ...]:
    """Some disk, to try the controller with, where /usr is on none."""
    for device in sorted(Path("/sys/block").glob("[sv]d*")) + sorted(
        Path("/sys/block").glob("nvme*")
    ):
        with suppress(OSError):
            return ((device / "dev").read_text().strip(),)
    return ()


def _controller(driver: Driver, cell: _Cell, controller: _Controller, check: Maker) -> Check:
    lost = False if controller.required else None
    name = f"{controller.name} controller"
    if controller.protection in driver.missing:
        cure = driver.missing[controller.protection]
        return check(
            name, lost, "not there", controller.needed_for, cgroup_cure(cure, driver.version)
        )
    for file, reason in cell.failed.items():
        if file.startswith(controller.prefixes):
            cure = cgroup_cure(
                f"delegate the {controller.name} controller to this user", driver.version
            )
            return check(name, lost, f"{file} = {reason}", controller.needed_for, cure)
    taken = [
        f"{file} = {value}"
        for file, value in cell.written.items()
        if file.startswith(controller.prefixes)
    ]
    if not taken:
        return check(
            name, None, "no disk to try it with", controller.needed_for, "bind a directory of one"
        )
    found = taken[0] if len(taken[0]) <= _SHOWN else taken[0].partition(" ")[0]
    if controller.name == "io" and not block_devices(Sandbox()):
        found += "; /usr is on no disk, so bind a directory of one"
    return check(name, True, found, controller.needed_for)


def _counters(driver: Driver, cell: _Cell, check: Maker) -> Iterator[Check]:
    swap = any("swap.max" in file or "memsw" in file for file in cell.written)
    no_swap = not _swap_in_use()
    cure = driver.missing.get("swap_limit", "boot with swapaccount=1, or swapoff -a")
    yield check(
        "swap limit",
        True if swap or no_swap else False if "swap_limit" in driver.missing else None,
        "accepted" if swap else "not there, but no swap is in use" if no_swap else "not there",
        "memory never leaves for the disk",
        "" if swap or no_swap else cure,
    )
    if driver.version == 2:
        stat = cell.exists("cpu.stat")
    else:
        stat = "cpu_accounting" not in driver.missing and cell.exists("cpuacct.usage")
    yield check(
        "CPU account",
        stat,
        "cpu.stat" if driver.version == 2 and stat else "cpuacct.usage" if stat else "not there",
        "limits.cpu_time",
        "" if stat else driver.missing.get("cpu_accounting", "upgrade the kernel"),
    )
    peaks = ("memory.peak", "memory.max_usage_in_bytes", "pids.peak")
    seen = [name for name in peaks if cell.exists(name)]
    whole = len(seen) == 2
    yield check(
        "peaks",
        whole or None,
        ", ".join(seen) or "not there",
        "usage.memory_peak, usage.processes_peak",
        "" if whole else "Linux 5.19 has memory.peak, 6.1 pids.peak for v2",
    )
    pressure = cell.exists("memory.pressure")
    yield check(
        "pressure (PSI)",
        pressure or None,
        "memory.pressure" if pressure else "not there",
        "usage.pressure",
        "" if pressure else "cgroup v2, and a kernel booted with psi=1",
    )


def _swap_in_use() -> bool:
    with suppress(OSError):
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    return True


def _attach(driver: Driver, cell: _Cell, probe: Prober, check: Maker) -> Check:
    if driver.version == 2 and 0 in cell.directories:
        directory = cell.directories[0]
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            answers = probe("cgroup2", str(fd), str(directory), pass_fds=(fd,))
        finally:
            os.close(fd)
        how = "born there (CLONE_INTO_CGROUP), ended by cgroup.kill"
    else:
        answers = probe("cgroup1", *map(str, cell.directories.values()))
        how = "moved there"
    early = (-1, "the attempt ended early")
    number, detail = answers.get("attach", answers.get("", early))
    needed = "every limit"
    if number == 0:
        return check(_ATTACH, True, how, needed)
    cure = "the cgroup above must be delegated as well: cgroup.procs there must be writable for us"
    reason = detail or os.strerror(number)
    return check(_ATTACH, False, reason, needed, cgroup_cure(cure, driver.version))
