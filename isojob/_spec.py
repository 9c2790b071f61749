"""What a cell is made with, and what a job adds: limits as the kernel takes them."""

from __future__ import annotations

import os
import struct

from isojob import wire
from isojob.cgroups import Driver
from isojob.limits import Limits, processors
from isojob.wire import MessageType, Tag, Writer

__all__ = ["FIXED_RLIMITS", "CellSpec", "rlimit"]

_UNLIMITED = 2**64 - 1
_NUMBER = struct.Struct("<Q")
_RLIMITS = {
    "file_size": 1,
    "stack": 3,
    "core": 4,
    "open_files": 7,
    "address_space": 9,
}
_NPROC, _CPU = 6, 0
FIXED_RLIMITS = ((8, 8 << 20), (11, 256), (12, 0), (13, 0), (14, 0))
"""A second line behind the cgroup: kernel objects that a process may hoard, and priorities
(RLIMIT_MEMLOCK, SIGPENDING, MSGQUEUE, NICE, RTPRIO of getrlimit(2)); the same for every job.

Pending signals and message queues count for each user namespace up to the first (ucounts): with the
usual 819200 bytes, nine queues of one job left none to the host's root and to other jobs."""


def rlimit(out: Writer, resource: int, soft: int, hard: int) -> None:
    """Appends one RLIMIT field."""
    out.put(Tag.RLIMIT, struct.pack("<QQ", soft, hard), resource)


class CellSpec:
    """What a cell is made with; cells of equal `key` can stand in for one another.

    Args:
        driver: Of its cgroups.
        limits: That it is made with.
        devices: What limits of disk I/O are for.
        own_ids: Whether the job has a uid that is not init's.
        private: In a session: what it does to the working directory is for itself.
        template: Number of the warm interpreter that its launcher is forked from.
        left: Limits of the cgroups that this has, which its launcher must leave.
    """

    __slots__ = ("_driver", "_last", "_message", "_own_ids", "key", "limits")

    def __init__(
        self,
        driver: Driver,
        limits: Limits,
        devices: tuple[str, ...],
        *,
        own_ids: bool,
        private: bool = False,
        template: int = 0,
        left: Limits | None = None,
    ) -> None:
        self.limits = limits
        self.key = self.key_of(limits)
        self._driver = driver
        self._own_ids = own_ids
        self._last: tuple[Limits, bytes] | None = None
        out = Writer(MessageType.MAKE)
        mask, writes = driver.cell(limits, devices)
        if left is not None:
            mask |= driver.cell(left, ())[0]
        out.number(Tag.CG_MASK, mask)
        for write in writes:
            index = write.hierarchy | (wire.OPTIONAL_WRITE if write.optional else 0)
            out.blob(Tag.CG_WRITE, write.file, write.value, index)
        if lift := driver.lift(limits):
            out.blob(Tag.CG_LIFT, lift.file, lift.value, lift.hierarchy)
        # tmpfs reads 0 as "no limit"; the memory limit still holds.
        out.number(Tag.DISK, limits.disk or 0)
        out.number(Tag.INODES, limits.inodes or 0)
        if private:
            out.put(Tag.PRIVATE)
        if template:
            out.number(Tag.TEMPLATE, template)
        out.number(Tag.CELL, 0)
        self._message = out.message()[:-8]

    def message(self, cell: int) -> bytes:
        """The MAKE message for the cell of that number."""
        return self._message + _NUMBER.pack(cell)

    @staticmethod
    def key_of(limits: Limits) -> tuple[object, ...]:
        """The limits that a parked cell cannot change any more."""
        return (
            limits.disk,
            limits.inodes,
            limits.cpus,
            limits.cpuset,
            limits.io_read_bps,
            limits.io_write_bps,
            limits.io_read_iops,
            limits.io_write_iops,
        )

    def fits(self, limits: Limits) -> bool:
        """Whether a job with these limits can run in such a cell."""
        return limits is self.limits or self.key_of(limits) == self.key

    def job_fields(self, limits: Limits) -> bytes:
        """The fields of a JOB message that depend on its limits alone; the last ones are kept."""
        last = self._last
        if last is not None and last[0] is limits:
            return last[1]
        out = Writer(MessageType.JOB)
        for index, value in self._driver.job(limits, self.limits):
            out.put(Tag.LIMIT, value, index)
        self._put_rlimits(out, limits)
        if limits.wall_time is not None:
            out.number(Tag.WALL, round(limits.wall_time * 1e9))
        if limits.cpu_time is not None:
            out.number(Tag.CPU, round(limits.cpu_time * 1e9), self._cpus(limits))
        fields = out.body()
        self._last = limits, fields
        return fields

    def _put_rlimits(self, out: Writer, limits: Limits) -> None:
        for name, resource in _RLIMITS.items():
            value = getattr(limits, name)
            value = _UNLIMITED if value is None else value
            if name == "core" and value == 0:
                # A core_pattern that pipes ignores 0 and starts its handler, as root of the host;
                # 1 is the value that it honours (core(5)). No file is that short.
                value = 1
            rlimit(out, resource, value, value)
        if self._driver.version == 0:
            # Counted per uid of a user namespace since 5.14: the launcher, which becomes the job,
            # what it forks, and init if it has the job's uid.
            if limits.processes is not None:
                most = limits.processes + (0 if self._own_ids else 1)
                rlimit(out, _NPROC, most, most)
            if limits.memory is not None and limits.address_space is None:
                rlimit(out, _RLIMITS["address_space"], limits.memory, limits.memory)
            if limits.cpu_time is not None:
                seconds = max(1, -int(-limits.cpu_time // 1))
                rlimit(out, _CPU, seconds, seconds + 1)

    def _cpus(self, limits: Limits) -> int:
        """How many CPUs the job may use at once.

        Not its quota: two threads burn twice as fast. Not our affinity: the job can undo that.
        """
        count = os.sysconf("SC_NPROCESSORS_CONF")
        if limits.cpuset is not None and "cpuset" not in self._driver.missing:
            count = min(count, len(processors(limits.cpuset)))
        return max(1, min(count, 65535))
