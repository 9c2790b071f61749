"""From the raw words of init to evidence, and from evidence to a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isojob._job import Job
from isojob._streams import Capture, Meter
from isojob.cgroups import Counters, Driver
from isojob.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    IsojobError,
    PoolBrokenError,
    SandboxSetupError,
)
from isojob.host import failures
from isojob.limits import Limits
from isojob.result import Evidence, Posture, Result, Status, Usage, pending
from isojob.seccomp import syscall_name
from isojob.verdict import throttled_time, usage, verdict
from isojob.wire import JobState
from isojob.wire_result import CAUSES, RawResult

__all__ = ["HostSide", "Outcome", "failure", "make_evidence", "make_result", "usage_so_far"]

_CODES: dict[int, Literal["exited", "killed", "dumped"]] = {1: "exited", 2: "killed", 3: "dumped"}
_ENOENT, _ENOTDIR, _ELOOP = 2, 20, 40
_NS = 1e9
# Plain ints, as they come: comparing with an IntEnum member goes through its attribute lookup.
_EXITED, _NONE, _EXEC = 1, CAUSES.index("none"), int(JobState.EXEC)


@dataclass(slots=True)
class HostSide:
    """What only the host knows of a job."""

    queue_ns: int = 0
    admitted_ns: int = 0
    sent_ns: int = 0
    reply_ns: int = 0
    stop: Literal["none", "output", "kill", "idle"] = "none"


class Outcome:
    """What came back from one cell."""

    __slots__ = ("driver", "err", "files", "host", "out", "raw", "uncollected")

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.host = HostSide()
        self.raw: RawResult | None = None
        self.out: Capture | Meter | None = None
        self.err: Capture | Meter | None = None
        self.files: dict[str, bytes] = {}
        self.uncollected: dict[str, str] = {}

    def stop_reason(self, reason: Literal["output", "kill", "idle"]) -> None:
        """Why the host ends the job; the first reason stays."""
        if self.host.stop == "none":
            self.host.stop = reason


def failure(raw: RawResult, command: str, path: str) -> IsojobError | None:
    """The exception for a job that never ran, or None."""
    if raw.state == JobState.FAILED and raw.failure is not None:
        stage, number = raw.failure.stage, raw.failure.errno
        if stage == "execve":
            if number in (_ENOENT, _ENOTDIR, _ELOOP):
                detail = (
                    "or its interpreter or loader is" if "/" in command else f"looked in {path}"
                )
                return CommandNotFoundError(command, detail)
            if number in (7, 12, 23, 24):  # E2BIG, ENOMEM, ENFILE, EMFILE: not about the file
                return SandboxSetupError("execve", number)
            return CommandNotExecutableError(command, errno=number)
        return failures.to_exception(raw.failure)
    if raw.state != JobState.EXEC and CAUSES[raw.cause] == "seccomp":
        call = syscall_name(raw.arch, raw.nr)
        return SandboxSetupError(
            "seccomp", 0, f"the profile kills for {call}, which the launcher needs for this job"
        )
    if raw.state != JobState.EXEC and CAUSES[raw.cause] in ("none", "oom"):
        how = "exited" if raw.code == 1 else "was killed by signal"
        return SandboxSetupError(
            "write files", 0, f"{how} {raw.status} before execve; too little memory for its files?"
        )
    return None


def make_evidence(outcome: Outcome, limits: Limits) -> Evidence:
    """Everything a verdict is made of."""
    raw, host, out, err = outcome.raw, outcome.host, outcome.out, outcome.err
    assert raw is not None
    counters = outcome.driver.counters(raw.counters, raw.files)
    events = counters.memory_events
    if events is not None and raw.ooms >= 0:
        events = {"oom": raw.ooms, **events}
    whole = raw.cpu_end_ns >= 0
    if whole:
        cpu_ns = max(0, raw.cpu_end_ns - raw.cpu_base_ns)
        user_ns, system_ns = counters.user_ns, counters.system_ns
        if user_ns is not None and system_ns is not None:
            # A proportion, as for the kernel itself (cputime_adjust): v1 counts ticks, and both
            # include the launcher, almost all of it in the kernel, and the end of a killed job.
            # Without a tick in user mode all of it was the kernel's.
            system_ns = max(0, system_ns - raw.cpu_base_ns)
            user_ns = cpu_ns * user_ns // max(1, user_ns + system_ns)
            system_ns = cpu_ns - user_ns
    else:
        user_ns, system_ns = raw.user_us * 1000, raw.system_us * 1000
        cpu_ns = user_ns + system_ns
    cause = CAUSES[raw.cause]
    start = raw.start_ns or raw.end_ns
    received = raw.received_ns or start
    cpu, wall = limits.cpu_time, limits.wall_time
    return Evidence.trusted(
        si_code=_CODES[raw.code],
        si_status=raw.status,
        cause=cause,
        stop=host.stop if cause == "stop" else "none",
        syscall=syscall_name(raw.arch, raw.nr) if cause == "seccomp" else None,
        cpu_ns=cpu_ns,
        cpu_is_whole=whole,
        user_ns=user_ns,
        system_ns=system_ns,
        queue_ns=host.queue_ns,
        lease_ns=host.sent_ns - host.admitted_ns,
        send_ns=max(0, received - host.sent_ns),
        prepare_ns=start - received,
        wall_ns=max(0, raw.end_ns - start),
        teardown_ns=max(0, raw.done_ns - raw.end_ns),
        reply_ns=host.reply_ns - raw.done_ns,
        memory_peak=counters.memory_peak,
        memory_events=events,
        memory_limit=limits.memory if events is not None else None,
        pids_peak=counters.pids_peak,
        pids_events_max=counters.pids_events_max,
        cpu_stat=counters.cpu_stat,
        io=counters.io,
        pressure=counters.pressure,
        voluntary_switches=raw.voluntary,
        involuntary_switches=raw.involuntary,
        max_rss=raw.max_rss_kib * 1024,
        stdout_bytes=0 if out is None else out.total,
        stderr_bytes=0 if err is None else err.total,
        stdout_exceeded=out is not None and out.exceeded,
        stderr_exceeded=err is not None and err.exceeded,
        output_limit=limits.output,
        cpu_limit_ns=None if cpu is None else round(cpu * 1e9),
        wall_limit_ns=None if wall is None else round(wall * 1e9),
    )


def usage_so_far(counters: Counters, cpu_ns: int | None, wall_ns: int) -> Usage:
    """What a job that runs has used by now; what is only known at its end is None."""
    user_ns = None
    if cpu_ns is not None and counters.user_ns is not None and counters.system_ns is not None:
        user_ns = cpu_ns * counters.user_ns // max(1, counters.user_ns + counters.system_ns)
    return Usage(
        cpu_time=None if cpu_ns is None else cpu_ns / _NS,
        user_time=None if user_ns is None else user_ns / _NS,
        system_time=None if user_ns is None or cpu_ns is None else (cpu_ns - user_ns) / _NS,
        wall_time=wall_ns / _NS,
        memory_peak=counters.memory_peak,
        processes_peak=counters.pids_peak,
        oom_kills=(counters.memory_events or {}).get("oom_kill"),
        process_limit_hits=counters.pids_events_max,
        cpu_throttled_time=throttled_time(counters.cpu_stat),
        io_read_bytes=_sum(counters.io, "rbytes"),
        io_write_bytes=_sum(counters.io, "wbytes"),
        pressure=counters.pressure,
    )


def _sum(io: dict[str, dict[str, int]] | None, key: str) -> int | None:
    return None if io is None else sum(device.get(key, 0) for device in io.values())


def has_simply_ended(outcome: Outcome, limits: Limits) -> bool:
    """Whether the job exited by itself, within all its limits: then its exit status is its verdict.

    What `verdict` finds of most jobs, found without all the evidence; tests hold them together.
    """
    raw = outcome.raw
    assert raw is not None
    if raw.cause != _NONE or raw.code != _EXITED:
        return False
    for output in (outcome.out, outcome.err):
        if output is not None and output.exceeded:
            return False
    for counter in outcome.driver.kills:
        if raw.counters[counter] > 0:
            return False
    wall, cpu = limits.wall_time, limits.cpu_time
    used = raw.cpu_end_ns - raw.cpu_base_ns
    return (
        raw.cpu_end_ns >= 0
        and (wall is None or raw.end_ns - raw.start_ns <= wall * _NS - 1)
        and (cpu is None or used <= cpu * _NS - 1)
    )


def make_result(job: Job, outcome: Outcome, posture: Posture, index: int | None) -> Result:
    """What the caller gets.

    Raises:
        IsojobError: The job never ran.
        PoolBrokenError: init said something impossible.
    """
    raw, out, err = outcome.raw, outcome.out, outcome.err
    assert raw is not None
    if raw.state != _EXEC and (error := failure(raw, job.args[0], job.environment.path)):
        raise error
    if raw.code not in _CODES:
        raise PoolBrokenError(f"init reported an impossible end of the job ({raw.code})")
    values = {
        "args": job.args,
        "stdout": None if out is None else out.data(),
        "stderr": None if err is None else err.data(),
        "stdout_truncated": out is not None and out.exceeded,
        "stderr_truncated": err is not None and err.exceeded,
        "files": outcome.files,
        "uncollected": outcome.uncollected,
        "posture": posture,
        "index": index,
    }
    limits = job.limits
    if has_simply_ended(outcome, limits):
        return pending(
            lambda: make_evidence(outcome, limits),
            status=Status.OK if raw.status == 0 else Status.NONZERO_EXIT,
            returncode=raw.status,
            **values,
        )
    evidence = make_evidence(outcome, limits)
    return Result.trusted(
        status=verdict(evidence),
        returncode=evidence.returncode,
        usage=usage(evidence),
        evidence=evidence,
        **values,
    )
