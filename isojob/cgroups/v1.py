"""cgroup v1 (Documentation/admin-guide/cgroup-v1/): the legacy branch.

Every controller may be a hierarchy of its own. A cell always has memory, pids and cpuacct; cpu,
cpuset and blkio are made only for a job whose limits ask for them, since each directory costs some
100 microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from typing_extensions import override

from isojob.cgroups.base import (
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

__all__ = ["V1"]

PERIOD = 100_000
_UNLIMITED = b"-1"
_ALWAYS = ("memory", "pids", "cpuacct")
_PROTECTIONS = {
    "memory": "memory_limit",
    "pids": "process_limit",
    "cpuacct": "cpu_accounting",
    "cpu": "cpus",
    "cpuset": "cpuset",
    "blkio": "io_limit",
}
_EVIDENCE = (
    ("memory", "memory.oom_control", flat("oom_kill")),
    ("memory", "memory.max_usage_in_bytes", NUMBER),
    ("pids", "pids.events", flat("max")),
    ("pids", "pids.peak", NUMBER),
    ("cpuacct", "cpuacct.usage", NUMBER),
    ("cpuacct", "cpuacct.usage_user", NUMBER),
    ("cpuacct", "cpuacct.usage_sys", NUMBER),
    ("cpu", "cpu.stat", flat("nr_periods", "nr_throttled", "throttled_time")),
)
_OOM_KILLS, _CPU_USAGE = 0, 4
_RAW = ("blkio.throttle.io_service_bytes", "blkio.throttle.io_serviced")


class V1(Driver):
    """Controllers at `own`: controller name to our own cgroup's directory there."""

    version = 1

    def __init__(self, own: Mapping[str, Path]) -> None:
        self.own = {name: own[name] for name in _PROTECTIONS if name in own}
        # Co-mounted controllers (cpu,cpuacct) share a directory: one hierarchy.
        self.hierarchies: list[Path] = []
        self.index: dict[str, int] = {}
        for name, path in self.own.items():
            real = path.resolve()
            if real not in self.hierarchies:
                self.hierarchies.append(real)
            self.index[name] = self.hierarchies.index(real)
        self.missing = {
            protection: f"mount the {name} controller of cgroup v1, or boot with cgroup v2"
            for name, protection in _PROTECTIONS.items()
            if name not in self.own
        }
        self.swap = False
        if "memory" in self.own:
            self.swap = self._has("memory", "memory.memsw.limit_in_bytes")
            if not self.swap and host_has_swap():
                self.missing["swap_limit"] = "boot with swapaccount=1, or turn swap off"
        memory, pids = self.index.get("memory"), self.index.get("pids")
        limits: list[tuple[int, str]] = []
        if memory is not None:
            limits.append((memory, "memory.limit_in_bytes"))
            if self.swap:
                limits.append((memory, "memory.memsw.limit_in_bytes"))
        if pids is not None:
            limits.append((pids, "pids.max"))
        evidence = [
            EvidenceFile(self.index[name], file, counters)
            for name, file, counters in _EVIDENCE
            if name in self.index
        ]
        self.raw = len(evidence)
        if "blkio" in self.index:
            evidence += [EvidenceFile(self.index["blkio"], file, raw=True) for file in _RAW]
        self.places: list[int] = []
        at = 0
        for name, _, counters in _EVIDENCE:
            for _ in counters:
                self.places.append(at if name in self.index else -1)
                at += name in self.index
        self.files = CellFiles(
            limits=tuple(limits),
            evidence=tuple(evidence),
            cpu=(self.places[_CPU_USAGE], 1) if "cpuacct" in self.index else None,
            oom=None if memory is None else (memory, self.places[_OOM_KILLS]),
        )
        if self.files.oom is not None:
            self.kills = (self.files.oom[1],)

    def _has(self, controller: str, file: str) -> bool:
        return (self.own[controller] / file).exists()

    def create(self) -> Subtree:
        for path in self.hierarchies:
            sweep(path, kill_processes)
        try:
            subtree = make_subtree(dict(enumerate(self.hierarchies)))
            with unless_whole(subtree):
                self._fill_cpuset(subtree)
            if "memory" in self.index:
                directory = subtree.directories[self.index["memory"]]
                with suppress(OSError):  # absent without swap; the cells inherit it
                    (directory / "memory.swappiness").write_text("0")
        except OSError as error:
            if (problem := exhausted(error)) is not None:
                raise problem from error
            raise HostNotSupportedError(
                f"no cgroup can be made in {error.filename or self.hierarchies[0]} "
                f"({error.strerror})",
                "run as root, have the v1 directories chowned to this user, or boot with cgroup v2",
            ) from error
        return subtree

    def _fill_cpuset(self, subtree: Subtree) -> None:
        """A new v1 cpuset is empty and takes no task: ours gets its parent's, cells get ours."""
        if "cpuset" in self.own:
            directory = subtree.directories[self.index["cpuset"]]
            for file in ("cpuset.cpus", "cpuset.mems"):
                (directory / file).write_text((self.own["cpuset"] / file).read_text())
            (directory / "cgroup.clone_children").write_text("1")

    @override
    def processors(self) -> str:
        return (self.own["cpuset"] / "cpuset.cpus").read_text().strip()

    def cell(self, limits: Limits, devices: tuple[str, ...]) -> tuple[int, tuple[Write, ...]]:
        writes: list[Write] = []
        used = {name for name in _ALWAYS if name in self.index}

        def put(controller: str, file: str, value: bytes) -> None:
            used.add(controller)
            writes.append(Write(self.index[controller], file, value))

        if "memory" in self.index:
            memory = _number(limits.memory)
            put("memory", "memory.limit_in_bytes", memory)
            if self.swap:
                put("memory", "memory.memsw.limit_in_bytes", memory)
        if "pids" in self.index:
            value = b"max" if limits.processes is None else str(limits.processes).encode()
            put("pids", "pids.max", value)
        if limits.cpus is not None and "cpu" in self.index:
            put("cpu", "cpu.cfs_period_us", str(PERIOD).encode())
            put("cpu", "cpu.cfs_quota_us", str(max(1000, round(limits.cpus * PERIOD))).encode())
        if limits.cpuset is not None and "cpuset" in self.index:
            put("cpuset", "cpuset.cpus", limits.cpuset.encode())
        rates = {
            "read_bps": limits.io_read_bps,
            "write_bps": limits.io_write_bps,
            "read_iops": limits.io_read_iops,
            "write_iops": limits.io_write_iops,
        }
        for name, rate in rates.items():
            if rate is not None and "blkio" in self.index:
                for device in devices:
                    file = f"blkio.throttle.{name}_device"
                    put("blkio", file, f"{device} {rate}".encode())
        mask = 0
        for name in used:
            mask |= 1 << self.index[name]
        return mask, tuple(writes)

    @override
    def lift(self, limits: Limits) -> Write | None:
        if limits.cpus is None or "cpu" not in self.index:
            return None
        return Write(self.index["cpu"], "cpu.cfs_quota_us", b"-1")

    def job(self, limits: Limits, parked: Limits) -> tuple[tuple[int, bytes], ...]:
        names = [file for _, file in self.files.limits]
        writes: list[tuple[int, bytes]] = []
        if limits.memory != parked.memory and "memory.limit_in_bytes" in names:
            order = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
            # memory may never exceed memory+swap: raise the outer limit first.
            if limits.memory is None or (
                parked.memory is not None and limits.memory > parked.memory
            ):
                order.reverse()
            writes += [
                (names.index(name), _number(limits.memory)) for name in order if name in names
            ]
        if limits.processes != parked.processes and "pids.max" in names:
            value = b"max" if limits.processes is None else str(limits.processes).encode()
            writes.append((names.index("pids.max"), value))
        return tuple(writes)

    def counters(self, values: Sequence[int], files: Mapping[int, bytes]) -> Counters:
        all_values = (*values, -1)  # the place of what no hierarchy has
        kills, peak, hits, pids, _, user, system, periods, throttled, nanoseconds = [
            all_values[place] for place in self.places
        ]
        out = Counters(
            memory_peak=known(peak),
            memory_events=table(("oom_kill",), (kills,)),
            pids_peak=known(pids),
            pids_events_max=known(hits),
            user_ns=known(user),
            system_ns=known(system),
        )
        if periods >= 0:
            out.cpu_stat = {
                "nr_periods": periods,
                "nr_throttled": throttled,
                "throttled_time": nanoseconds,
                "throttled_usec": nanoseconds // 1000,
            }
        if files.get(self.raw):  # it has always something; nothing: it was too long
            out.io = _blkio(files[self.raw], files.get(self.raw + 1, b""))
        return out


def _number(value: int | None) -> bytes:
    return _UNLIMITED if value is None else str(value).encode()


def _blkio(bytes_served: bytes, operations: bytes) -> dict[str, dict[str, int]]:
    """Reads lines such as "8:0 Read 4096"; the line "Total N" at the end is of no device."""
    out: dict[str, dict[str, int]] = {}
    for data, suffix in ((bytes_served, "bytes"), (operations, "ios")):
        for line in data.decode("ascii", "replace").splitlines():
            words = line.split()
            if len(words) != 3 or words[1] not in ("Read", "Write"):
                continue
            if (count := number(words[2])) is not None:
                key = f"{words[1][0].lower()}{suffix}"
                out.setdefault(words[0], {})[key] = count
    return out
