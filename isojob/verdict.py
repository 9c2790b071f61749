"""From evidence to a status: pure functions, no I/O, no kernel.

Only what a job cannot forge decides whether a limit was reached: isojob's own timers and byte
counters, and the counters of a cgroup the job cannot write to. How the main process ended, which
the job chooses freely, only tells ``ok``, ``nonzero_exit`` and ``signaled`` apart.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from isojob._models import Evidence, Status, Usage

__all__ = ["explain", "signal_name", "usage", "verdict"]

_NS = 1_000_000_000


def verdict(evidence: Evidence) -> Status:
    """Decides how a job ended. Total: every evidence has exactly one status.

    Args:
        evidence: What the kernel, init and the host counted.
    """
    match evidence.cause:
        case "wall":
            return Status.WALL_TIME_LIMIT
        case "cpu":
            return Status.CPU_TIME_LIMIT
        case "seccomp":
            return Status.SECCOMP_VIOLATION
        case "stop":
            return Status.OUTPUT_LIMIT if evidence.stop == "output" else Status.KILLED
        case "oom" | "none":
            # Seeing an OOM kill is not enough to blame the job for it.
            return _unattended(evidence)


def _unattended(evidence: Evidence) -> Status:
    """The status of a job that isojob did not have to end."""
    if _oom_at_own_limit(evidence):
        return Status.MEMORY_LIMIT
    if evidence.stdout_exceeded or evidence.stderr_exceeded:
        return Status.OUTPUT_LIMIT
    # A job may end by itself in the moment between its limit and the kill.
    if _over(evidence.cpu_ns, evidence.cpu_limit_ns):
        return Status.CPU_TIME_LIMIT
    if _over(evidence.wall_ns, evidence.wall_limit_ns):
        return Status.WALL_TIME_LIMIT
    if evidence.si_code != "exited":
        return Status.SIGNALED
    return Status.OK if evidence.si_status == 0 else Status.NONZERO_EXIT


def _over(used: int | None, limit: int | None) -> bool:
    return used is not None and limit is not None and used > limit


def _oom_at_own_limit(evidence: Evidence) -> bool:
    """Whether the OOM killer acted on the job because of the job's own memory limit.

    An OOM kill is also counted when an outer cgroup or the whole host ran out of memory. v2 counts
    a failed charge against the job's own limit apart, as ``oom`` of memory.events, before it kills
    (cgroup-v2.rst). ``max`` is no sign: it also counts page cache that was simply reclaimed at the
    limit, and on Linux 6.12 a job with max 124, oom 0, oom_kill 1 had died of an outer limit. Nor
    is a peak at the limit, for the same reason. v1 counts no ``oom``, but init does (cgroup.c).
    """
    events = evidence.memory_events or {}
    killed = events.get("oom_kill", 0) > 0 or events.get("oom_group_kill", 0) > 0
    return killed and events.get("oom", 0) > 0


def usage(evidence: Evidence) -> Usage:
    """Translates evidence into seconds, bytes and counts; what is unknown stays None."""
    voluntary, involuntary = evidence.voluntary_switches, evidence.involuntary_switches
    devices = None if evidence.io is None else list(evidence.io.values())
    return Usage.trusted(
        cpu_time=_seconds(evidence.cpu_ns) if evidence.cpu_is_whole else None,
        user_time=_seconds(evidence.user_ns) if evidence.cpu_is_whole else None,
        system_time=_seconds(evidence.system_ns) if evidence.cpu_is_whole else None,
        wall_time=evidence.wall_ns / _NS,
        setup_time=(evidence.send_ns + evidence.prepare_ns) / _NS,
        teardown_time=evidence.teardown_ns / _NS,
        queue_time=evidence.queue_ns / _NS,
        memory_peak=evidence.memory_peak,
        processes_peak=evidence.pids_peak,
        oom_kills=(evidence.memory_events or {}).get("oom_kill"),
        process_limit_hits=evidence.pids_events_max,
        cpu_throttled_time=throttled_time(evidence.cpu_stat),
        io_read_bytes=None if devices is None else sum(d.get("rbytes", 0) for d in devices),
        io_write_bytes=None if devices is None else sum(d.get("wbytes", 0) for d in devices),
        context_switches=(
            None if voluntary is None or involuntary is None else voluntary + involuntary
        ),
        pressure=evidence.pressure,
    )


def throttled_time(cpu_stat: Mapping[str, int] | None) -> float | None:
    """What ``cpu.stat`` says of it, in seconds."""
    throttled = (cpu_stat or {}).get("throttled_usec")
    return None if throttled is None else throttled / 1_000_000


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / _NS


def explain(evidence: Evidence, status: Status) -> str:
    """Says in one sentence, without a full stop, why the job has this status.

    Args:
        evidence: What the status was decided from.
        status: The status, as `verdict` gave it.
    """
    match status:
        case Status.OK | Status.NONZERO_EXIT:
            return f"the job exited with status {evidence.si_status}{_hints(evidence)}"
        case Status.SIGNALED:
            return f"{_end(evidence)} ended the job{_hints(evidence)}"
        case Status.CPU_TIME_LIMIT:
            return f"the job used up its CPU time limit{_of_seconds(evidence.cpu_limit_ns)}"
        case Status.WALL_TIME_LIMIT:
            return f"the job ran into its wall time limit{_of_seconds(evidence.wall_limit_ns)}"
        case Status.MEMORY_LIMIT:
            limit = _of_bytes(evidence.memory_limit)
            return f"the kernel killed {_oom_victims(evidence)} at the job's memory limit{limit}"
        case Status.OUTPUT_LIMIT:
            limit = _of_bytes(evidence.output_limit)
            return f"the job wrote more to {_streams(evidence)} than its output limit{limit}"
        case Status.SECCOMP_VIOLATION:
            call = f"the system call {evidence.syscall}" if evidence.syscall else "a system call"
            return f"the job made {call}, which the seccomp profile answers by killing"
        case Status.KILLED if evidence.stop == "idle":
            return "it and its partner waited for each other, longer than idle_time allows"
        case Status.KILLED:
            return "the caller killed the job"


def signal_name(number: int) -> str:
    """Names a signal, also a real-time one that Python's `signal.Signals` has no member for."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(evidence: Evidence) -> str:
    name = signal_name(evidence.si_status)
    return f"{name} (core dumped)" if evidence.si_code == "dumped" else name


def _of_seconds(limit_ns: int | None) -> str:
    return "" if limit_ns is None else f" of {limit_ns / _NS:g} s"


def _of_bytes(limit: int | None) -> str:
    if limit is None:
        return ""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if limit and limit % size == 0:
            return f" of {limit // size} {unit}"
    return f" of {limit} bytes"


def _oom_victims(evidence: Evidence) -> str:
    events = evidence.memory_events or {}
    # With memory.oom.group the counter exceeds the number of processes.
    if events.get("oom_group_kill", 0) > 0:
        return "the job's processes"
    kills = events.get("oom_kill", 0)
    return "1 process" if kills == 1 else f"{kills} processes"


def _streams(evidence: Evidence) -> str:
    both = (("stdout", evidence.stdout_exceeded), ("stderr", evidence.stderr_exceeded))
    return " and ".join(name for name, exceeded in both if exceeded) or "stdout or stderr"


def _hints(evidence: Evidence) -> str:
    """What the kernel noticed besides, and a reader may be looking for."""
    hints = []
    if (evidence.memory_events or {}).get("oom_kill", 0) > 0:
        hints.append("the kernel killed in it for want of memory outside its limit")
    if refused := evidence.pids_events_max or 0:
        hints.append(f"its process limit refused {refused} fork{'s' if refused > 1 else ''}")
    return "".join(f"; {hint}" for hint in hints)
