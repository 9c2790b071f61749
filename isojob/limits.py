"""What a job may use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import AfterValidator, Field

from isojob._models import Bytes, Model, Seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

__all__ = ["Limits", "processors"]

MIN_MEMORY = 2 * 2**20
# execve(2) leaves arguments and environment at least 32 pages, whatever the limit says.
MIN_STACK = 128 * 2**10
MIN_DISK = 64 * 2**10
MIN_INODES = 16
# The kernel takes no CPU quota below 1 ms, and the period is 100 ms (sched-bwc.rst).
MIN_CPUS = 0.01
# PID_MAX_LIMIT of a 64-bit kernel; pids.max takes nothing above.
MAX_PROCESSES = 2**22
# More processors than any kernel can be built for (CONFIG_NR_CPUS).
MAX_CPU = 8191

_CPU_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def _floor(least: int, why: str) -> Callable[[int], int]:
    def check(value: int) -> int:
        if value < least:
            raise ValueError(f"must be at least {least}: {why}")
        return value

    return check


def _check_cpus(value: float) -> float:
    if value < MIN_CPUS:
        raise ValueError(f"must be at least {MIN_CPUS}: the kernel takes no smaller quota")
    return value


def _check_cpuset(value: str) -> str:
    for part in value.split(","):
        match = _CPU_RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{value!r}: name processors as in 0-1,3 (cpuset(7), list format)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > MAX_CPU:
            raise ValueError(f"{value!r}: {part} is no range of processors")
    return value


def processors(listed: str) -> set[int]:
    """The numbers in a list such as ``0-1,3`` (cpuset(7), list format)."""
    found: set[int] = set()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


_Count: TypeAlias = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]
# v1 cuts it to 32 bits, and takes the rest by which it divides; 2**32 - 1 is unlimited there.
_Rate: TypeAlias = Annotated[int, Field(ge=1, le=2**32 - 2)]
_Memory: TypeAlias = Annotated[
    Bytes, AfterValidator(_floor(MIN_MEMORY, "no program starts with less memory"))
]
_ByteRate: TypeAlias = Annotated[
    Bytes,
    AfterValidator(_floor(1, "a rate of 0 would stop the job; None is unlimited")),
    # Before Linux 6.6 a product of it and of time overflows, and divides by what is left.
    Field(le=2**50),
]
_Disk: TypeAlias = Annotated[
    Bytes, AfterValidator(_floor(MIN_DISK, "and tmpfs takes 0 for unlimited"))
]
_Inodes: TypeAlias = Annotated[
    int, AfterValidator(_floor(MIN_INODES, "and tmpfs takes 0 for unlimited")), Field(le=2**31 - 1)
]
_OpenFiles: TypeAlias = Annotated[
    int,
    AfterValidator(_floor(3, "stdin, stdout and stderr are open files")),
    Field(le=2**30),
]
_Stack: TypeAlias = Annotated[
    Bytes, AfterValidator(_floor(MIN_STACK, "arguments and environment live on the stack"))
]


class Limits(Model, frozen=True):
    """What one job may use. Everything is finite unless set to None, which is unlimited.

    Seconds are numbers or timedeltas. Bytes are ints, or strings with the unit written out:
    ``"64MiB"`` (binary) or ``"64MB"`` (decimal), never ``"64M"``. A copy with changes is
    ``limits.model_copy(update={"memory": "1GiB"})``.

    Attributes:
        cpu_time: User and system CPU time of all processes together, seconds (``cpu.stat``).
        wall_time: Time from the start of the program, seconds of CLOCK_MONOTONIC.
        memory: Memory of all processes together with page cache, tmpfs and kernel memory,
            bytes (``memory.max``); swap is always 0.
        processes: Processes and threads at once (``pids.max``); beyond it fork fails with
            EAGAIN, which alone ends no job.
        output: Bytes of stdout, and as many of stderr; one more ends the job. 0: none at all.
        cpus: Processors' worth of CPU time, such as 0.5 (``cpu.max``).
        cpuset: Processors to run on, such as ``"0-1,3"`` (``cpuset.cpus``).
        io_read_bps: Reading from block devices, bytes per second (``io.max``).
        io_write_bps: Writing to block devices, bytes per second.
        io_read_iops: Reads from block devices per second.
        io_write_iops: Writes to block devices per second.
        disk: Total of ``/box``, ``/tmp``, ``/dev/shm`` and the changes to a writable root, bytes;
            one tmpfs carries them, so its pages count as `memory`, too (tmpfs(5), ``size``).
        inodes: Files and directories there, in total (tmpfs(5), ``nr_inodes``).
        collect: Total size of the files read back afterwards, bytes.
        file_size: Largest file the job can write, bytes (RLIMIT_FSIZE, getrlimit(2)).
        open_files: Descriptors per process (RLIMIT_NOFILE); None: as many as the host allows.
        stack: Stack of a process's main thread, bytes (RLIMIT_STACK).
        address_space: Virtual memory per process, bytes (RLIMIT_AS). Unlimited by default:
            V8, Go and the JVM reserve far more than they use.
        core: Size of a core dump, bytes (RLIMIT_CORE).

    Raises:
        pydantic.ValidationError: An unknown limit, or a value that makes no sense.
    """

    cpu_time: Seconds | None = 10.0
    wall_time: Seconds | None = 30.0
    memory: _Memory | None = 512 * 2**20
    processes: _Count | None = 128
    output: Bytes | None = 16 * 2**20
    cpus: Annotated[float, AfterValidator(_check_cpus), Field(le=MAX_CPU)] | None = None
    cpuset: Annotated[str, AfterValidator(_check_cpuset)] | None = None
    io_read_bps: _ByteRate | None = None
    io_write_bps: _ByteRate | None = None
    io_read_iops: _Rate | None = None
    io_write_iops: _Rate | None = None
    disk: _Disk | None = 128 * 2**20
    inodes: _Inodes | None = 16384
    collect: Bytes | None = 16 * 2**20
    file_size: Bytes | None = 64 * 2**20
    open_files: _OpenFiles | None = 1024
    stack: _Stack | None = 64 * 2**20
    address_space: _Memory | None = None
    core: Bytes = 0

    if TYPE_CHECKING:
        # The fields' types are what is read; a caller may also write "64MiB" and timedeltas.
        def __init__(
            self,
            *,
            cpu_time: float | timedelta | None = ...,
            wall_time: float | timedelta | None = ...,
            memory: int | str | None = ...,
            processes: int | None = ...,
            output: int | str | None = ...,
            cpus: float | None = ...,
            cpuset: str | None = ...,
            io_read_bps: int | str | None = ...,
            io_write_bps: int | str | None = ...,
            io_read_iops: int | None = ...,
            io_write_iops: int | None = ...,
            disk: int | str | None = ...,
            inodes: int | None = ...,
            collect: int | str | None = ...,
            file_size: int | str | None = ...,
            open_files: int | None = ...,
            stack: int | str | None = ...,
            address_space: int | str | None = ...,
            core: int | str = ...,
        ) -> None: ...
