"""From the raw words of init to evidence, and from evidence to a result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast

from isojob._job import Job
from isojob.cgroups import Driver
from isojob.errors import (
    CommandNotExecutableError,
    CommandNotFoundError,
    IsojobError,
    PoolBrokenError,
    SandboxSetupError,
)
from isojob.host import failures
from isojob.limits import Limits
from isojob.result import Evidence, Posture, Result
from isojob.seccomp import syscall_name
from isojob.verdict import usage, verdict
from isojob.wire import JobState, RawResult

__all__ = ["HostSide", "Outcome", "failure", "make_evidence", "make_result"]

_CODES: dict[int, Literal["exited", "killed", "dumped"]] = {1: "exited", 2: "killed", 3: "dumped"}
_ENOENT, _ENOTDIR, _ELOOP = 2, 20, 40


@dataclass(slots=True)
class HostSide:
    """What only the host knows of a job."""

    sent_ns: int = 0
    queue_ns: int = 0
    stop: Literal["none", "output", "kill"] = "none"
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_exceeded: bool = False
    stderr_exceeded: bool = False


class Outcome:
    """What came back from one cell."""

    __slots__ = ("driver", "files", "host", "raw", "stderr", "stdout", "uncollected")

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.host = HostSide()
        self.raw: RawResult | None = None
        self.stdout: bytes | None = None
        self.stderr: bytes | None = None
        self.files: dict[str, bytes] = {}
        self.uncollected: dict[str, str] = {}

    def stop_reason(self, reason: Literal["output", "kill"]) -> None:
        """Why the host ends the job; the first reason stays."""
        if self.host.stop == "none":
            self.host.stop = reason


def failure(raw: RawResult, command: str | bytes, path: str) -> IsojobError | None:
    """The exception for a job that never ran, or None."""
    if raw.state is JobState.FAILED and raw.failure is not None:
        stage, number = raw.failure.stage, raw.failure.errno
        if stage == "execve":
            if number in (_ENOENT, _ENOTDIR, _ELOOP):
                slash = "/" in (command if isinstance(command, str) else command.decode("latin-1"))
                detail = "or its interpreter or loader is" if slash else f"looked in {path}"
                return CommandNotFoundError(command, detail)
            if number in (7, 12, 23, 24):  # E2BIG, ENOMEM, ENFILE, EMFILE: not about the file
                return SandboxSetupError("execve", number)
            return CommandNotExecutableError(command, errno=number)
        return failures.to_exception(raw.failure)
    if raw.state is not JobState.EXEC and raw.cause in ("none", "oom"):
        how = "exited" if raw.si_code == 1 else "was killed by signal"
        return SandboxSetupError(
            "launcher", 0, f"{how} {raw.si_status} before execve; too little memory for its files?"
        )
    return None


def make_evidence(raw: RawResult, driver: Driver, host: HostSide, limits: Limits) -> Evidence:
    """Everything a verdict is made of.

    Raises:
        PoolBrokenError: init said something impossible.
    """
    code = _CODES.get(raw.si_code)
    if code is None:
        raise PoolBrokenError(f"init reported an impossible end of the job ({raw.si_code})")
    counters = driver.counters(raw.evidence)
    cpu_ns: int | None
    if raw.cpu_end_ns is not None:
        cpu_ns = max(0, raw.cpu_end_ns - raw.cpu_base_ns)
        user_ns, system_ns = counters.user_ns, counters.system_ns
        if system_ns is not None:
            # What the launcher used before the job's start is almost all in the kernel.
            system_ns = max(0, system_ns - raw.cpu_base_ns)
    else:
        user_ns, system_ns = raw.user_us * 1000, raw.system_us * 1000
        cpu_ns = user_ns + system_ns
    syscall = None
    if raw.syscall is not None:
        syscall = syscall_name(raw.syscall[0], raw.syscall[1])
    start = raw.start_ns or raw.end_ns
    return Evidence.trusted(
        si_code=code,
        si_status=raw.si_status,
        cause=cast('Literal["none", "wall", "cpu", "oom", "seccomp", "stop"]', raw.cause),
        stop=host.stop if raw.cause == "stop" else "none",
        syscall=syscall,
        wall_ns=max(0, raw.end_ns - start),
        cpu_ns=cpu_ns,
        cpu_is_whole=raw.cpu_end_ns is not None,
        user_ns=user_ns,
        system_ns=system_ns,
        setup_ns=max(0, start - host.sent_ns),
        teardown_ns=max(0, raw.done_ns - raw.end_ns),
        queue_ns=host.queue_ns,
        memory_peak=counters.memory_peak,
        memory_events=counters.memory_events,
        memory_limit=limits.memory if counters.memory_events is not None else None,
        pids_peak=counters.pids_peak,
        pids_events_max=counters.pids_events_max,
        cpu_stat=counters.cpu_stat,
        io=counters.io,
        pressure=counters.pressure,
        voluntary_switches=raw.voluntary,
        involuntary_switches=raw.involuntary,
        max_rss=raw.max_rss_kib * 1024,
        stdout_bytes=host.stdout_bytes,
        stderr_bytes=host.stderr_bytes,
        stdout_exceeded=host.stdout_exceeded,
        stderr_exceeded=host.stderr_exceeded,
        cpu_limit_ns=None if limits.cpu_time is None else round(limits.cpu_time * 1e9),
        wall_limit_ns=None if limits.wall_time is None else round(limits.wall_time * 1e9),
    )


def make_result(job: Job, outcome: Outcome, posture: Posture, index: int | None) -> Result:
    """What the caller gets.

    Raises:
        IsojobError: The job never ran.
    """
    assert outcome.raw is not None
    if error := failure(outcome.raw, os.fsdecode(job.argv[0]), job.environment.path):
        raise error
    evidence = make_evidence(outcome.raw, outcome.driver, outcome.host, job.limits)
    return Result.trusted(
        args=tuple(os.fsdecode(argument) for argument in job.argv),
        status=verdict(evidence),
        returncode=evidence.returncode,
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        stdout_truncated=evidence.stdout_exceeded,
        stderr_truncated=evidence.stderr_exceeded,
        usage=usage(evidence),
        files=outcome.files,
        uncollected=outcome.uncollected,
        evidence=evidence,
        posture=posture,
        index=index,
    )
