"""cgroup v2 (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from typing_extensions import override

from isojob.cgroups.base import (
    LEAF,
    NUMBER,
    CellFiles,
    Counters,
    Driver,
    EvidenceFile,
    Subtree,
    Write,
    exhausted,
    flat,
    host_has_swap,
    kill_processes,
    known,
    make_subtree,
    number,
    sweep,
    table,
    unless_whole,
)
from isojob.errors import HostNotSupportedError
from isojob.limits import Limits

__all__ = ["V2"]

PERIOD = 100_000
_EVENTS = ("low", "high", "max", "oom", "oom_kill", "oom_group_kill")
_CPU = ("user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec", "usage_usec")
_STALLS = (("some ", "total="), ("full ", "total="))
_EVIDENCE = (
    EvidenceFile(0, "memory.events", flat(*_EVENTS)),
    EvidenceFile(0, "memory.peak", NUMBER),
    EvidenceFile(0, "pids.events", flat("max")),
    EvidenceFile(0, "pids.peak", NUMBER),
    EvidenceFile(0, "cpu.stat", flat(*_CPU)),
    EvidenceFile(0, "cpu.pressure", _STALLS),
    EvidenceFile(0, "memory.pressure", _STALLS),
    EvidenceFile(0, "io.pressure", _STALLS),
    EvidenceFile(0, "io.stat", raw=True),
)
_KILLS = (_EVENTS.index("oom_kill"), _EVENTS.index("oom_group_kill"))
_USAGE_USEC = 14
_IO = 8
_NEEDED = {"memory_limit": "memory", "process_limit": "pids", "cpus": "cpu"}
_WANTED = {"cpuset": "cpuset", "io_limit": "io"}


def _maximum(value: int | None) -> bytes:
    return b"max" if value is None else str(value).encode()


def _write(file: Path, text: str) -> None:
    """Names the file when the write fails, not only when the open does."""
    try:
        file.write_text(text)
    except OSError as error:
        error.filename = str(file)
        raise


class V2(Driver):
    """The unified hierarchy, delegated to us at `own` (our own cgroup's directory)."""

    version = 2
    kills = _KILLS

    def __init__(self, own: Path) -> None:
        # A pool that moved the caller's processes into the leaf before: its parent is the base.
        self.base = own.parent if own.name == LEAF else own
        self.own = own
        available = set(self._read("cgroup.controllers").split())
        self.controllers = {*_NEEDED.values(), *_WANTED.values()} & available
        self.missing = {
            name: f"delegate the {controller} controller (systemd: Delegate=yes)"
            for name, controller in {**_NEEDED, **_WANTED}.items()
            if controller not in available
        }
        self._look_for_swap(self.base)
        limits = (("memory.max", "memory"), ("pids.max", "pids"))
        self.files = CellFiles(
            limits=tuple((0, name) for name, controller in limits if controller in available),
            evidence=_EVIDENCE,
            cpu=(_USAGE_USEC, 1000),
            kill=(0, "cgroup.kill"),
            into=True,
        )

    def _read(self, name: str) -> str:
        return (self.base / name).read_text()

    def _look_for_swap(self, cgroup: Path) -> None:
        """Without the file there is no swap, or swapaccount=0 took it away (older kernels)."""
        limited = (cgroup / "memory.max").exists()  # the root has neither
        if limited and not (cgroup / "memory.swap.max").exists() and host_has_swap():
            self.missing["swap_limit"] = "boot without swapaccount=0, or turn swap off"

    def create(self) -> Subtree:
        try:
            self._enable()
            sweep(self.base, kill_processes)
            subtree = make_subtree({0: self.base})
            names = " ".join(f"+{name}" for name in sorted(self.controllers))
            with unless_whole(subtree):
                _write(subtree.directories[0] / "cgroup.subtree_control", names)
                self._look_for_swap(subtree.directories[0])
        except OSError as error:
            if (problem := exhausted(error)) is not None:
                raise problem from error
            raise HostNotSupportedError(
                f"cgroup {self.base} is not delegated to this process "
                f"({error.strerror}: {error.filename})",
                "run it in a delegated cgroup: systemd-run --scope -p Delegate=yes (with --user "
                "as an ordinary user), Delegate=yes in its unit, or see docs/hosts.md",
            ) from error
        return subtree

    def _enable(self) -> None:
        """Turns the controllers on for our children.

        A cgroup with controllers for its children may hold no processes itself (no internal
        processes; the root is exempt): all of them move to a leaf first, and any that is born
        meanwhile makes the kernel say EBUSY, so it is tried again.
        """
        enabled = set(self._read("cgroup.subtree_control").split())
        wanted = "".join(f" +{name}" for name in sorted(self.controllers - enabled)).strip()
        if not wanted and not self._needs_leaf():
            self._check_writable()
            return
        for attempt in range(20):
            try:
                if self._needs_leaf():
                    self._move_to_leaf()
                if wanted:
                    _write(self.base / "cgroup.subtree_control", wanted)
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == 19:
                    raise
            else:
                return

    def _check_writable(self) -> None:
        if not os.access(self.base, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.base))

    def _needs_leaf(self) -> bool:
        is_root = not (self.base / "cgroup.type").exists()
        return not is_root and bool(self._read("cgroup.procs").split())

    def _move_to_leaf(self) -> None:
        leaf, pids = self.base / LEAF, self._read("cgroup.procs").split()
        if "0" in pids:  # has no number here; written, it would mean ourselves
            raise HostNotSupportedError(
                f"cgroup {self.base} holds a process of another pid namespace, which cannot be "
                f"moved to a leaf from here",
                "let a process enter the pid namespace first and a cgroup of its own then, so "
                "that who started it stays outside",
            )
        with suppress(FileExistsError):
            leaf.mkdir()
        for pid in pids:
            with suppress(ProcessLookupError):  # gone meanwhile
                _write(leaf / "cgroup.procs", pid)

    @override
    def processors(self) -> str:
        return self._read("cpuset.cpus.effective").strip()

    def cell(self, limits: Limits, devices: tuple[str, ...]) -> tuple[int, tuple[Write, ...]]:
        writes = []
        if "memory" in self.controllers:
            writes += [
                Write(0, "memory.max", _maximum(limits.memory)),
                # Absent where the kernel cannot swap.
                Write(0, "memory.swap.max", b"0", optional=True),
                Write(0, "memory.oom.group", b"1"),
            ]
        if "pids" in self.controllers:
            writes.append(Write(0, "pids.max", _maximum(limits.processes)))
        if limits.cpus is not None and "cpu" in self.controllers:
            quota = max(1000, round(limits.cpus * PERIOD))
            writes.append(Write(0, "cpu.max", f"{quota} {PERIOD}".encode()))
        if limits.cpuset is not None and "cpuset" in self.controllers:
            writes.append(Write(0, "cpuset.cpus", limits.cpuset.encode()))
        rates = {
            "rbps": limits.io_read_bps,
            "wbps": limits.io_write_bps,
            "riops": limits.io_read_iops,
            "wiops": limits.io_write_iops,
        }
        rule = " ".join(f"{name}={value}" for name, value in rates.items() if value is not None)
        if rule and "io" in self.controllers:
            writes += [Write(0, "io.max", f"{device} {rule}".encode()) for device in devices]
        return 1, tuple(writes)

    @override
    def lift(self, limits: Limits) -> Write | None:
        if limits.cpus is None or "cpu" not in self.controllers:
            return None
        return Write(0, "cpu.max", b"max")

    def job(self, limits: Limits, parked: Limits) -> tuple[tuple[int, bytes], ...]:
        writes = []
        for index, (_, name) in enumerate(self.files.limits):
            attribute = "memory" if name == "memory.max" else "processes"
            value = getattr(limits, attribute)
            if value != getattr(parked, attribute):
                writes.append((index, _maximum(value)))
        return tuple(writes)

    def counters(self, values: Sequence[int], files: Mapping[int, bytes]) -> Counters:
        user, system = values[9], values[10]
        return Counters(
            memory_events=table(_EVENTS, values[:6]),
            memory_peak=known(values[6]),
            pids_events_max=known(values[7]),
            pids_peak=known(values[8]),
            cpu_stat=table(_CPU, values[9:15]),
            user_ns=None if user < 0 else user * 1000,
            system_ns=None if system < 0 else system * 1000,
            pressure=_pressure(values[15:21]),
            io=_io(files.get(_IO)) if "io" in self.controllers else None,
        )


def _io(data: bytes | None) -> dict[str, dict[str, int]] | None:
    """Reads the nested-keyed format: "8:0 rbytes=1 wbytes=2 ..."."""
    if data is None:
        return {}  # a cgroup that did no I/O has an empty file
    if not data:
        return None  # it was too long
    out = {}
    for line in data.decode("ascii", "replace").splitlines():
        counts: dict[str, int] = {}
        device, _, pairs = line.partition(" ")
        for pair in pairs.split():
            key, _, value = pair.partition("=")
            if (count := number(value)) is not None:
                counts[key] = count
        out[device] = counts
    return out


def _pressure(totals: Sequence[int]) -> dict[str, dict[str, float]] | None:
    """Microseconds of stalls, some and full of each kind (accounting/psi.rst), in seconds."""
    out: dict[str, dict[str, float]] = {}
    for at, kind in enumerate(("cpu", "memory", "io")):
        stalls = table(("some_total", "full_total"), totals[2 * at : 2 * at + 2])
        if stalls:
            out[kind] = {name: total / 1_000_000 for name, total in stalls.items()}
    return out or None
