"""What the models have in common: one base, the types with units, status, usage and evidence.

Arrows run downward: this module imports nothing else of isojob, `verdict` builds on it, and
`result` on both. Nothing here needs Linux.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Bytes", "Evidence", "Model", "Name", "Seconds", "Status", "Usage"]

# Timers and rlimits carry signed 64-bit nanoseconds and bytes; some 30 years fit with a margin.
MAX_SECONDS = 1e9
MAX_BYTES = 2**63 - 1
# A timerfd armed with 0 is disarmed, so a limit that rounds to nothing would mean "unlimited".
MIN_SECONDS = 0.001

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([kKMGT]?i?B)")


class Model(
    BaseModel,
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    defer_build=True,
    ser_json_bytes="base64",
    val_json_bytes="base64",
):
    """Base of every isojob model: frozen, no unknown fields, no silent conversions.

    Schemas are built when the first instance is validated or written, not when isojob is imported:
    most programs need two of them.

    Bytes travel through JSON as base64 with the URL-safe alphabet (RFC 4648, section 5). Models
    repeat ``frozen=True``, without which type checkers do not see that they hash.
    """

    @classmethod
    def trusted(cls, **values: Any) -> Self:
        """Builds an instance from values that are right by construction, some 20 times faster.

        Every field is given, none is converted: for what isojob itself has computed.
        """
        new = cls.__new__(cls)
        put = object.__setattr__
        put(new, "__dict__", values)
        put(new, "__pydantic_fields_set__", set(cls.__pydantic_fields__))
        put(new, "__pydantic_extra__", None)
        put(new, "__pydantic_private__", None)
        return new

    @override
    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copies the model with some fields changed, validated as in the constructor.

        pydantic's own method takes the new values unseen, and a limit must never be a wrong one.

        Raises:
            pydantic.ValidationError: A field is unknown or its value is refused.
        """
        if not update:
            return super().model_copy(deep=deep)
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return self.model_validate({**kept, **update})


def parse_seconds(value: object) -> float:
    """Reads a duration: seconds as a number, or a timedelta.

    Returns:
        Seconds.

    Raises:
        ValueError: Not a duration, or one that no timer can hold.
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # NaN compares false to both bounds; huge ints are compared before float() can overflow.
        seconds = float(value) if -1 <= value <= MAX_SECONDS + 1 else float("inf")
    else:
        raise ValueError(  # noqa: TRY004 - the one that pydantic collects
            f"{value!r}: give seconds as a number, or a timedelta"
        )
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(
            f"{value!r}: must be at least {MIN_SECONDS} and at most {MAX_SECONDS:.0f} seconds"
            " (None for no limit)"
        )
    return seconds


def parse_bytes(value: object) -> int:
    """Reads a size: bytes as an int, or a string with its unit written out (``"64MiB"``).

    A lone letter is refused because it has no one meaning: pydantic reads ``64M`` as 64,000,000
    bytes, Docker as 67,108,864.

    Returns:
        Bytes.

    Raises:
        ValueError: Not a size, negative, or not a whole number of bytes.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                f"{value!r}: write the unit out, such as 64MiB (67108864 bytes)"
                " or 64MB (64000000 bytes); an int counts bytes"
            )
        whole, _, part = match[1].partition(".")
        size, rest = divmod(int(whole + part) * _UNITS[match[2]], int("1" + "0" * len(part)))
        if rest:
            raise ValueError(f"{value!r}: not a whole number of bytes")
    elif isinstance(value, int) and not isinstance(value, bool):
        size = int(value)
    else:
        raise ValueError(  # noqa: TRY004 - the one that pydantic collects
            f"{value!r}: give bytes as an int, or a string such as 64MiB"
        )
    if not 0 <= size <= MAX_BYTES:
        raise ValueError(f"{value!r}: must not be negative, nor above 2**63 - 1 bytes")
    return size


Seconds: TypeAlias = Annotated[float, BeforeValidator(parse_seconds)]
Bytes: TypeAlias = Annotated[int, BeforeValidator(parse_bytes)]

# Names of files and arguments are bytes to the kernel. Python carries undecodable bytes as lone
# surrogates, which JSON cannot: and a job that leaves a file called b"\xff" behind must not be
# able to make its result unserialisable. U+FFFD escapes such a byte, and itself by doubling.
_MARK = "\ufffd"
_ENCODABLE = re.compile("[\udc80-\udcff\ufffd]")
_DECODABLE = re.compile("\ufffd(?:\ufffd|[89a-f][0-9a-f])")


def _name_to_json(name: str) -> str:
    def escape(match: re.Match[str]) -> str:
        return _MARK + (_MARK if match[0] == _MARK else f"{ord(match[0]) - 0xDC00:02x}")

    return _ENCODABLE.sub(escape, name)


def _name_from_json(text: str) -> str:
    def unescape(match: re.Match[str]) -> str:
        code = match[0][1:]
        return _MARK if code == _MARK else chr(0xDC00 + int(code, 16))

    return _DECODABLE.sub(unescape, text)


def _check_name(name: str) -> str:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"{name!r}: holds a surrogate that stands for no byte") from None
    if "\0" in name:
        raise ValueError(f"{name!r}: holds a NUL character")
    return name


class _NameSchema:
    """Lets pydantic take a str with surrogate escapes, which its own str refuses."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def then(check: core_schema.NoInfoValidatorFunction, schema: CoreSchema) -> CoreSchema:
            return core_schema.no_info_after_validator_function(check, schema)

        text = core_schema.str_schema(strict=True)
        return core_schema.json_or_python_schema(
            json_schema=then(_check_name, then(_name_from_json, text)),
            python_schema=then(_check_name, core_schema.is_instance_schema(str)),
            serialization=core_schema.plain_serializer_function_ser_schema(
                _name_to_json, return_schema=core_schema.str_schema(), when_used="json"
            ),
        )


Name: TypeAlias = Annotated[str, _NameSchema]


class Status(StrEnum):
    """How a job ended. The first cause wins: what isojob acted on, before how the job looked."""

    OK = "ok"
    """Exited with status 0."""
    NONZERO_EXIT = "nonzero_exit"
    """Exited with another status, whatever it pretends: exit(137) is no kill."""
    SIGNALED = "signaled"
    """Ended by a signal that was not isojob's, such as its own SIGSEGV."""
    CPU_TIME_LIMIT = "cpu_time_limit"
    """Used more CPU time than `Limits.cpu_time`, all its processes together."""
    WALL_TIME_LIMIT = "wall_time_limit"
    """Ran longer than `Limits.wall_time`."""
    MEMORY_LIMIT = "memory_limit"
    """The kernel killed at least one of its processes at `Limits.memory`."""
    OUTPUT_LIMIT = "output_limit"
    """Wrote more than `Limits.output` to stdout or stderr."""
    SECCOMP_VIOLATION = "seccomp_violation"
    """Made a system call that the profile answers by killing."""
    KILLED = "killed"
    """The caller ended it by `kill()`."""


class Usage(Model, frozen=True):
    """What the job used, all its processes together; None where the host cannot tell.

    Attributes:
        cpu_time: User and system CPU time, seconds.
        user_time: CPU time in user mode, seconds.
        system_time: CPU time in the kernel, seconds.
        wall_time: From the start of the program to its end, seconds of CLOCK_MONOTONIC.
        setup_time: From the request to the start of the program, seconds.
        teardown_time: From the end of the program to the report, seconds.
        queue_time: Waiting for admission to the pool, seconds.
        memory_peak: Highest memory charged to the job's cgroup, bytes; includes page cache,
            tmpfs and kernel memory (cgroup-v2.rst, ``memory.peak``).
        processes_peak: Most processes and threads at once (``pids.peak``).
        oom_kills: OOM kills in the job's cgroup (``memory.events``, ``oom_kill``); where the
            kernel kills the group as a whole this can exceed the number of processes.
        process_limit_hits: Forks refused by `Limits.processes` (``pids.events``, ``max``).
        cpu_throttled_time: Time held back by `Limits.cpus`, seconds (``cpu.stat``).
        io_read_bytes: Read from block devices, bytes (``io.stat``).
        io_write_bytes: Written to block devices, bytes.
        context_switches: Voluntary and involuntary ones of the main process and of all that were
            waited for (getrusage(2)): at least so many, for a job can ignore SIGCHLD.
        pressure: Stall times of ``cpu``, ``memory`` and ``io`` as ``some_total`` and
            ``full_total``, seconds (accounting/psi.rst).
    """

    cpu_time: float | None = None
    user_time: float | None = None
    system_time: float | None = None
    wall_time: float
    setup_time: float = 0.0
    teardown_time: float = 0.0
    queue_time: float = 0.0
    memory_peak: int | None = None
    processes_peak: int | None = None
    oom_kills: int | None = None
    process_limit_hits: int | None = None
    cpu_throttled_time: float | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    context_switches: int | None = None
    pressure: dict[str, dict[str, float]] | None = None

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """What several jobs used: times and counts added, the highest of the peaks; no pressure.

        A field is None if it is for one of them. Of no job all is 0. Of jobs that ran at once the
        wall times are added, too, and the peak is that of one job.

        Args:
            usages: Of each, as ``result.usage``.
        """
        usages = list(usages)
        values: dict[str, Any] = {}
        for name in cls.model_fields.keys() - {"pressure"}:
            parts = [getattr(one, name) for one in usages]
            if None in parts:
                values[name] = None
            else:
                values[name] = max(parts, default=0) if name.endswith("_peak") else sum(parts)
        return cls(**values)


class Evidence(Model, frozen=True):
    """The raw counters a verdict is made of, as the kernel, init and the host counted them.

    Times are nanoseconds of CLOCK_MONOTONIC or of CPU time; None means that the host cannot tell.

    Attributes:
        si_code: How the main process ended, from waitid(2).
        si_status: Its exit status, or the number of the signal that ended it.
        cause: What isojob acted on first; ``stop`` means that the host ended the job.
        stop: Why the host did.
        syscall: Name of the system call that a rule caught, with the cause ``seccomp``.
        cpu_ns: CPU time of the whole job where a cgroup tells, else of the reaped processes;
            up to the kill if isojob killed it.
        user_ns: The part of it spent in user mode; `system_ns` is the rest. A proportion that
            the kernel samples: short jobs may seem to have none.
        cpu_is_whole: Whether a cgroup told. Otherwise a process whose parent ignores SIGCHLD is
            missing (wait(2)), and `Usage` says nothing.
        queue_ns: Waiting for admission. The phases of a call, one after the other: queue, lease,
            send, prepare, wall, teardown, reply.
        lease_ns: From admission to the sending of the job: a cell is taken, the request written.
        send_ns: Until the launcher has it; includes the making of the cell if none was parked.
        prepare_ns: Until the program is started: limits, files, standard streams.
        wall_ns: Until the main process has ended, or isojob has killed it; begins with execve(2).
        teardown_ns: Until the rest is killed, files are collected, counters read.
        reply_ns: Until the host has the report.
        memory_events: v2: ``memory.events`` (low, high, max, oom, oom_kill, oom_group_kill);
            v1: ``oom_kill`` of ``memory.oom_control``, and ``oom``, counted by init.
        memory_limit: The memory limit in force, bytes.
        cpu_stat: ``cpu.stat``; v1's throttled_time comes as ``throttled_usec``, too.
        io: Per device (``"8:0"``): rbytes, wbytes, rios, wios.
        pressure: ``cpu``, ``memory``, ``io`` to some_total and full_total, seconds.
        max_rss: Largest resident set of one process, bytes (getrusage(2)).
        stdout_bytes: Bytes of stdout seen by the host, beyond the cap if it was exceeded.
        stdout_exceeded: Whether stdout went over its cap.
        output_limit: The cap of each in force, bytes.
        cpu_limit_ns: The CPU time limit in force.
        wall_limit_ns: The wall time limit in force.
    """

    si_code: Literal["exited", "killed", "dumped"]
    si_status: int
    cause: Literal["none", "wall", "cpu", "oom", "seccomp", "stop"] = "none"
    stop: Literal["none", "output", "kill", "idle"] = "none"
    syscall: str | None = None
    wall_ns: int
    cpu_ns: int | None = None
    cpu_is_whole: bool = True
    user_ns: int | None = None
    system_ns: int | None = None
    queue_ns: int = 0
    lease_ns: int = 0
    send_ns: int = 0
    prepare_ns: int = 0
    teardown_ns: int = 0
    reply_ns: int = 0
    memory_peak: int | None = None
    memory_events: dict[str, int] | None = None
    memory_limit: int | None = None
    pids_peak: int | None = None
    pids_events_max: int | None = None
    cpu_stat: dict[str, int] | None = None
    io: dict[str, dict[str, int]] | None = None
    pressure: dict[str, dict[str, float]] | None = None
    voluntary_switches: int | None = None
    involuntary_switches: int | None = None
    max_rss: int | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_exceeded: bool = False
    stderr_exceeded: bool = False
    output_limit: int | None = None
    cpu_limit_ns: int | None = None
    wall_limit_ns: int | None = None

    @property
    def returncode(self) -> int:
        """The exit status, or -N if signal N ended the main process (as subprocess)."""
        return self.si_status if self.si_code == "exited" else -self.si_status
