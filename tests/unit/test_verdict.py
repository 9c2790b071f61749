"""Every kind of evidence has its status, and a job cannot talk itself into or out of one."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isojob._models import Evidence, Status, Usage
from isojob.verdict import explain, signal_name, usage, verdict

MIB = 2**20

EXIT_0 = {"si_code": "exited", "si_status": 0}
EXIT_137 = {"si_code": "exited", "si_status": 137}
SIGKILL = {"si_code": "killed", "si_status": 9}
SIGSYS = {"si_code": "killed", "si_status": 31}

# v2: the kernel killed at the job's own limit, or for want of memory elsewhere.
V2_OWN = {"memory_events": {"low": 0, "high": 0, "max": 9, "oom": 1, "oom_kill": 1}}
V2_OWN_GROUP = {"memory_events": {"max": 9, "oom": 1, "oom_kill": 0, "oom_group_kill": 1}}
V2_ELSEWHERE = {"memory_events": {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 1}}
V2_GROUP_ELSEWHERE = {"memory_events": {"max": 0, "oom": 0, "oom_kill": 2, "oom_group_kill": 1}}
# As read on Linux 6.12: page cache reclaimed at the own limit, then an outer limit killed.
V2_ELSEWHERE_AFTER_CACHE = {"memory_events": {"max": 124, "oom": 0, "oom_kill": 1}}
V2_CACHE = {"memory_events": {"low": 0, "high": 0, "max": 512, "oom": 0, "oom_kill": 0}}
V2_OOM_NO_KILL = {"memory_events": {"max": 5, "oom": 1, "oom_kill": 0}}
V2_QUIET = {"memory_events": {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0}}

# v1: init has counted the ooms. Page cache may have brought the peak to the limit before.
V1_AT_LIMIT = {"memory_peak": 64 * MIB, "memory_limit": 64 * MIB}
V1_OWN = {"memory_events": {"oom": 1, "oom_kill": 1}, **V1_AT_LIMIT}
V1_BELOW = {**V1_OWN, "memory_peak": 20 * MIB}
V1_ELSEWHERE = {**V1_BELOW, "memory_events": {"oom": 0, "oom_kill": 1}}
V1_ELSEWHERE_AFTER_CACHE = {**V1_ELSEWHERE, **V1_AT_LIMIT}
V1_CACHE = {"memory_events": {"oom": 0, "oom_kill": 0}, **V1_AT_LIMIT}
V1_OOM_NO_KILL = {"memory_events": {"oom": 1, "oom_kill": 0}, **V1_AT_LIMIT}
V1_NOT_COUNTED = {"memory_events": {"oom_kill": 1}, **V1_AT_LIMIT}

CPU_OVER = {"cpu_ns": 1_000_000_001, "cpu_limit_ns": 1_000_000_000}
CPU_EXACT = {"cpu_ns": 1_000_000_000, "cpu_limit_ns": 1_000_000_000}
WALL_OVER = {"wall_ns": 2_000_000_001, "wall_limit_ns": 2_000_000_000}
WALL_EXACT = {"wall_ns": 2_000_000_000, "wall_limit_ns": 2_000_000_000}
STDOUT = {"stdout_exceeded": True}
STDERR = {"stderr_exceeded": True}

LIMITS = set(Status) - {Status.OK, Status.NONZERO_EXIT, Status.SIGNALED}


def evidence(**fields: Any) -> Evidence:
    """Evidence of a quiet job that exited with 0, but for these fields."""
    return Evidence(**{**EXIT_0, "wall_ns": 1000, **fields})


TABLE: list[tuple[str, Status, dict[str, Any]]] = [
    # The process alone: whatever it pretends, it is not a limit.
    ("exit 0", Status.OK, EXIT_0),
    ("exit 1", Status.NONZERO_EXIT, {"si_status": 1}),
    ("exit 124 as timeout(1)", Status.NONZERO_EXIT, {"si_status": 124}),
    ("exit 137 as a killed container", Status.NONZERO_EXIT, EXIT_137),
    ("exit 255", Status.NONZERO_EXIT, {"si_status": 255}),
    ("SIGSEGV", Status.SIGNALED, {"si_code": "killed", "si_status": 11}),
    ("SIGSEGV with a core", Status.SIGNALED, {"si_code": "dumped", "si_status": 11}),
    ("SIGKILL of itself", Status.SIGNALED, SIGKILL),
    ("SIGSYS of itself", Status.SIGNALED, SIGSYS),
    ("SIGXCPU of itself", Status.SIGNALED, {"si_code": "killed", "si_status": 24}),
    ("SIGXFSZ", Status.SIGNALED, {"si_code": "killed", "si_status": 25}),
    ("a real-time signal", Status.SIGNALED, {"si_code": "killed", "si_status": 40}),
    # What isojob acted on first wins over everything else.
    ("wall", Status.WALL_TIME_LIMIT, {"cause": "wall", **SIGKILL}),
    ("wall, but exited", Status.WALL_TIME_LIMIT, {"cause": "wall", **EXIT_0}),
    ("wall, then all", Status.WALL_TIME_LIMIT, {"cause": "wall", **V2_OWN, **CPU_OVER, **STDOUT}),
    ("cpu", Status.CPU_TIME_LIMIT, {"cause": "cpu", **SIGKILL}),
    ("cpu, then all", Status.CPU_TIME_LIMIT, {"cause": "cpu", **V1_OWN, **WALL_OVER, **STDOUT}),
    ("seccomp", Status.SECCOMP_VIOLATION, {"cause": "seccomp", "syscall": "ptrace", **SIGKILL}),
    ("seccomp, unnamed", Status.SECCOMP_VIOLATION, {"cause": "seccomp", **SIGKILL}),
    ("seccomp, then all", Status.SECCOMP_VIOLATION, {"cause": "seccomp", **V2_OWN, **WALL_OVER}),
    ("stop for output", Status.OUTPUT_LIMIT, {"cause": "stop", "stop": "output", **STDOUT}),
    (
        "stop for output, then oom",
        Status.OUTPUT_LIMIT,
        {"cause": "stop", "stop": "output", **V2_OWN},
    ),
    ("stop by kill()", Status.KILLED, {"cause": "stop", "stop": "kill", **SIGKILL}),
    ("stop by kill(), exited", Status.KILLED, {"cause": "stop", "stop": "kill", **EXIT_0}),
    ("stop by kill(), over", Status.KILLED, {"cause": "stop", "stop": "kill", **STDOUT, **V2_OWN}),
    ("stop without a reason", Status.KILLED, {"cause": "stop", **SIGKILL}),
    ("a reason without a stop", Status.OK, {"stop": "kill"}),
    # Out of memory: a kill, and the job's own limit.
    ("v2 own limit", Status.MEMORY_LIMIT, {**SIGKILL, **V2_OWN}),
    ("v2 own limit, seen", Status.MEMORY_LIMIT, {"cause": "oom", **SIGKILL, **V2_OWN}),
    ("v2 own limit, exit 0", Status.MEMORY_LIMIT, {**EXIT_0, **V2_OWN}),
    ("v2 own limit, exit 137", Status.MEMORY_LIMIT, {**EXIT_137, **V2_OWN}),
    ("v2 group kill", Status.MEMORY_LIMIT, {**SIGKILL, **V2_OWN_GROUP}),
    ("v2 outer cgroup or host", Status.SIGNALED, {**SIGKILL, **V2_ELSEWHERE}),
    ("v2 outer, seen", Status.SIGNALED, {"cause": "oom", **SIGKILL, **V2_ELSEWHERE}),
    ("v2 outer, seen, exit 0", Status.OK, {"cause": "oom", **V2_ELSEWHERE}),
    ("v2 outer, exit 1", Status.NONZERO_EXIT, {"si_status": 1, **V2_ELSEWHERE}),
    ("v2 outer after cache", Status.SIGNALED, {**SIGKILL, **V2_ELSEWHERE_AFTER_CACHE}),
    ("v2 outer group kill", Status.SIGNALED, {**SIGKILL, **V2_GROUP_ELSEWHERE}),
    ("v2 outer, over output", Status.OUTPUT_LIMIT, {"cause": "oom", **V2_ELSEWHERE, **STDOUT}),
    ("v2 outer, over CPU", Status.CPU_TIME_LIMIT, {"cause": "oom", **V2_ELSEWHERE, **CPU_OVER}),
    ("v2 page cache at the limit", Status.OK, {**EXIT_0, **V2_CACHE}),
    ("v2 page cache, SIGKILL of itself", Status.SIGNALED, {**SIGKILL, **V2_CACHE}),
    ("v2 failed allocation, no kill", Status.NONZERO_EXIT, {"si_status": 1, **V2_OOM_NO_KILL}),
    ("v2 seen, nothing counted", Status.SIGNALED, {"cause": "oom", **SIGKILL, **V2_QUIET}),
    ("v1 own limit", Status.MEMORY_LIMIT, {**SIGKILL, **V1_OWN}),
    ("v1 own limit, exit 0", Status.MEMORY_LIMIT, {**EXIT_0, **V1_OWN}),
    ("v1 own limit, seen", Status.MEMORY_LIMIT, {"cause": "oom", **SIGKILL, **V1_OWN}),
    ("v1 own limit, a peak below", Status.MEMORY_LIMIT, {**SIGKILL, **V1_BELOW}),
    ("v1 outer cgroup or host", Status.SIGNALED, {"cause": "oom", **SIGKILL, **V1_ELSEWHERE}),
    ("v1 outer after cache", Status.SIGNALED, {**SIGKILL, **V1_ELSEWHERE_AFTER_CACHE}),
    ("v1 page cache at the limit", Status.OK, {**EXIT_0, **V1_CACHE}),
    ("v1 page cache, SIGKILL of itself", Status.SIGNALED, {**SIGKILL, **V1_CACHE}),
    ("v1 failed allocation, no kill", Status.NONZERO_EXIT, {"si_status": 1, **V1_OOM_NO_KILL}),
    ("v1 not counted", Status.SIGNALED, {**SIGKILL, **V1_NOT_COUNTED}),
    ("no cgroup, seen", Status.SIGNALED, {"cause": "oom", **SIGKILL}),
    # Ended by itself, and over a limit all the same; in the order of the rules.
    ("stdout over", Status.OUTPUT_LIMIT, {**EXIT_0, **STDOUT}),
    ("stderr over", Status.OUTPUT_LIMIT, {**EXIT_0, **STDERR}),
    ("SIGPIPE, stdout over", Status.OUTPUT_LIMIT, {"si_code": "killed", "si_status": 13, **STDOUT}),
    ("many bytes, none over", Status.OK, {"stdout_bytes": 2**40, "stderr_bytes": 2**40}),
    ("output over and oom", Status.MEMORY_LIMIT, {**V2_OWN, **STDOUT}),
    ("output and CPU over", Status.OUTPUT_LIMIT, {**STDERR, **CPU_OVER}),
    ("CPU over", Status.CPU_TIME_LIMIT, {**EXIT_0, **CPU_OVER}),
    ("CPU over, SIGKILL of itself", Status.CPU_TIME_LIMIT, {**SIGKILL, **CPU_OVER}),
    ("CPU exactly used up", Status.OK, {**EXIT_0, **CPU_EXACT}),
    ("CPU unknown", Status.OK, {**CPU_OVER, "cpu_ns": None}),
    ("CPU unlimited", Status.OK, {**CPU_OVER, "cpu_limit_ns": None}),
    ("CPU and wall over", Status.CPU_TIME_LIMIT, {**CPU_OVER, **WALL_OVER}),
    ("wall over", Status.WALL_TIME_LIMIT, {**EXIT_0, **WALL_OVER}),
    ("wall over, exit 1", Status.WALL_TIME_LIMIT, {"si_status": 1, **WALL_OVER}),
    ("wall exactly used up", Status.OK, {**EXIT_0, **WALL_EXACT}),
    ("wall unlimited", Status.OK, {**WALL_OVER, "wall_limit_ns": None}),
    # What is worth reporting and decides nothing.
    ("process limit hit", Status.OK, {"pids_events_max": 99, "pids_peak": 128}),
    ("large resident set", Status.OK, {"max_rss": 2**40, "memory_limit": 64 * MIB}),
    ("peak at the limit", Status.OK, {"memory_peak": 64 * MIB, "memory_limit": 64 * MIB}),
]


@pytest.mark.parametrize(
    ("status", "fields"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_verdict(status: Status, fields: dict[str, Any]) -> None:
    """The row's evidence has the row's status."""
    assert verdict(evidence(**fields)) is status


def test_the_table_reaches_every_status() -> None:
    """No status is left without a row."""
    assert {status for _, status, _ in TABLE} == set(Status)


COUNTER = st.integers(0, 2)
SIZE = st.sampled_from([0, 63 * MIB - 1, 63 * MIB, 64 * MIB])
TIME = st.integers(0, 3)
EVENTS_V2 = st.fixed_dictionaries(
    {"oom": COUNTER},
    optional=dict.fromkeys(["low", "high", "max", "oom_kill", "oom_group_kill"], COUNTER),
)
EVENTS_V1 = st.fixed_dictionaries({"oom": COUNTER, "oom_kill": COUNTER})
OUTCOME = {
    "si_code": st.sampled_from(["exited", "killed", "dumped"]),
    "si_status": st.integers(0, 255),
}
DECISIVE = {
    "cause": st.sampled_from(["none", "wall", "cpu", "oom", "seccomp", "stop"]),
    "stop": st.sampled_from(["none", "output", "kill"]),
    "memory_events": st.none() | EVENTS_V2 | EVENTS_V1,
    "memory_peak": st.none() | SIZE,
    "memory_limit": st.none() | SIZE,
    "stdout_exceeded": st.booleans(),
    "stderr_exceeded": st.booleans(),
    "cpu_ns": st.none() | TIME,
    "cpu_limit_ns": st.none() | TIME,
    "wall_ns": TIME,
    "wall_limit_ns": st.none() | TIME,
}
MAYBE = st.none() | st.integers(0, 2**62)
TABLES = st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2)
IDLE = {
    "syscall": st.none() | st.text(max_size=5),
    "cpu_is_whole": st.booleans(),
    "user_ns": MAYBE,
    "system_ns": MAYBE,
    "queue_ns": st.integers(0, 2**62),
    "lease_ns": st.integers(0, 2**62),
    "send_ns": st.integers(0, 2**62),
    "prepare_ns": st.integers(0, 2**62),
    "teardown_ns": st.integers(0, 2**62),
    "reply_ns": st.integers(0, 2**62),
    "pids_peak": MAYBE,
    "pids_events_max": MAYBE,
    "cpu_stat": st.none() | TABLES,
    "io": st.none() | st.dictionaries(st.text(max_size=3), TABLES, max_size=2),
    "pressure": st.none() | st.just({"cpu": {"some_total": 1.5, "full_total": 0.5}}),
    "voluntary_switches": MAYBE,
    "involuntary_switches": MAYBE,
    "max_rss": MAYBE,
    "stdout_bytes": st.integers(0, 2**62),
    "stderr_bytes": st.integers(0, 2**62),
    "output_limit": MAYBE,
}


def test_the_strategies_cover_all_evidence() -> None:
    """A new field of Evidence has to be called decisive or idle before these tests pass."""
    assert OUTCOME.keys() | DECISIVE.keys() | IDLE.keys() == set(Evidence.model_fields)


@given(
    st.fixed_dictionaries(DECISIVE),
    st.fixed_dictionaries({**OUTCOME, **IDLE}),
    st.fixed_dictionaries({**OUTCOME, **IDLE}),
)
def test_a_job_cannot_forge_a_limit(
    decisive: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
) -> None:
    """How it ends and what else it does never makes a limit, and never unmakes one."""
    first, second = verdict(Evidence(**decisive, **one)), verdict(Evidence(**decisive, **other))
    assert first is second or not {first, second} & LIMITS


@given(
    st.fixed_dictionaries({**DECISIVE, **OUTCOME}),
    st.fixed_dictionaries(IDLE),
    st.fixed_dictionaries(IDLE),
)
def test_idle_fields_decide_nothing(
    fixed: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
) -> None:
    """With the same ending and counters, what is only reported has no influence at all."""
    assert verdict(Evidence(**fixed, **one)) is verdict(Evidence(**fixed, **other))


@given(st.fixed_dictionaries({**DECISIVE, **OUTCOME, **IDLE}))
def test_every_evidence_has_a_verdict_a_usage_and_a_sentence(fields: dict[str, Any]) -> None:
    """The three functions are total, and the sentence has its one line."""
    case = Evidence(**fields)
    status = verdict(case)
    assert isinstance(status, Status)
    assert usage(case).wall_time >= 0
    sentence = explain(case, status)
    assert sentence
    assert not sentence.endswith(".")


@given(st.fixed_dictionaries({**DECISIVE, **OUTCOME}))
def test_without_an_own_limit_memory_is_never_to_blame(fields: dict[str, Any]) -> None:
    """No kill, or a kill without a trace of the own limit, is not memory_limit."""
    events = fields["memory_events"] or {}
    killed = events.get("oom_kill", 0) + events.get("oom_group_kill", 0) > 0
    own = events.get("oom", 0) > 0
    if verdict(Evidence(**fields)) is Status.MEMORY_LIMIT:
        assert killed
        assert own
        assert fields["cause"] in {"none", "oom"}


def test_part_of_the_cpu_time_is_no_usage() -> None:
    """Without a cgroup a job can hide processes from the sum: Usage does not pass it on."""
    part = usage(evidence(cpu_ns=5, user_ns=3, system_ns=2, cpu_is_whole=False))
    assert (part.cpu_time, part.user_time, part.system_time) == (None, None, None)


def test_usage_is_the_evidence_in_seconds_bytes_and_counts() -> None:
    """Every field of Usage comes from its counter, in its unit."""
    case = evidence(
        wall_ns=2_500_000_000,
        cpu_ns=1_500_000_000,
        user_ns=1_000_000_000,
        system_ns=500_000_000,
        send_ns=600_000,
        prepare_ns=400_000,
        teardown_ns=2_000_000,
        queue_ns=3_000_000,
        memory_peak=4096,
        memory_events={"oom": 1, "oom_kill": 2},
        pids_peak=5,
        pids_events_max=6,
        cpu_stat={"nr_throttled": 1, "throttled_usec": 250_000},
        io={"8:0": {"rbytes": 1, "wbytes": 2, "rios": 9}, "8:16": {"rbytes": 10, "wbytes": 20}},
        pressure={"cpu": {"some_total": 0.5, "full_total": 0.25}},
        voluntary_switches=7,
        involuntary_switches=8,
    )
    assert usage(case).model_dump() == {
        "cpu_time": 1.5,
        "user_time": 1.0,
        "system_time": 0.5,
        "wall_time": 2.5,
        "setup_time": 0.001,
        "teardown_time": 0.002,
        "queue_time": 0.003,
        "memory_peak": 4096,
        "processes_peak": 5,
        "oom_kills": 2,
        "process_limit_hits": 6,
        "cpu_throttled_time": 0.25,
        "io_read_bytes": 11,
        "io_write_bytes": 22,
        "context_switches": 15,
        "pressure": {"cpu": {"some_total": 0.5, "full_total": 0.25}},
    }


def test_total_of_several_jobs() -> None:
    """Times and counts add up, peaks do not; what is unknown of one is unknown of all."""
    one = Usage(
        wall_time=1,
        cpu_time=0.5,
        queue_time=0.25,
        memory_peak=100,
        processes_peak=2,
        oom_kills=1,
        cpu_throttled_time=0.5,
        io_read_bytes=10,
        context_switches=3,
        pressure={"cpu": {"some_total": 1.0}},
    )
    other = one.model_copy(update={"memory_peak": 70, "processes_peak": 5, "io_read_bytes": None})
    assert Usage.total((one, other, other)).model_dump() == {
        "wall_time": 3.0,
        "cpu_time": 1.5,
        "user_time": None,
        "system_time": None,
        "setup_time": 0.0,
        "teardown_time": 0.0,
        "queue_time": 0.75,
        "memory_peak": 100,
        "processes_peak": 5,
        "oom_kills": 3,
        "process_limit_hits": None,
        "cpu_throttled_time": 1.5,
        "io_read_bytes": None,
        "io_write_bytes": None,
        "context_switches": 9,
        "pressure": None,
    }
    assert Usage.total((one,)).cpu_time == 0.5
    assert Usage.total((Usage.total(()), other)) == Usage.total((other,))
    assert set(Usage.total(()).model_dump().values()) == {0, None}


def test_usage_does_not_guess() -> None:
    """What no counter told is None; a resident set is not passed off as the job's peak."""
    told = {"wall_time", "setup_time", "teardown_time", "queue_time"}
    for case in (evidence(max_rss=2**30), evidence(voluntary_switches=3, cpu_stat={"x": 1})):
        for name, value in usage(case).model_dump().items():
            assert (value is None) == (name not in told), name


def test_usage_knows_nothing_from_unknown() -> None:
    """A cgroup without any block device read 0 bytes; that is not unknown."""
    assert usage(evidence(io={})).io_read_bytes == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (EXIT_0, "the job exited with status 0"),
        (EXIT_137, "the job exited with status 137"),
        (SIGKILL, "SIGKILL ended the job"),
        ({"si_code": "dumped", "si_status": 11}, "SIGSEGV (core dumped) ended the job"),
        ({"si_code": "killed", "si_status": 40}, "signal 40 ended the job"),
        (
            {**SIGKILL, **V2_ELSEWHERE},
            "SIGKILL ended the job; the kernel killed in it for want of memory outside its limit",
        ),
        (
            {"si_status": 1, "pids_events_max": 1},
            "the job exited with status 1; its process limit refused 1 fork",
        ),
        (
            {"si_status": 1, "pids_events_max": 7},
            "the job exited with status 1; its process limit refused 7 forks",
        ),
        (
            {"cause": "cpu", "cpu_limit_ns": 1_500_000_000},
            "the job used up its CPU time limit of 1.5 s",
        ),
        ({"cause": "cpu"}, "the job used up its CPU time limit"),
        (
            {"cause": "wall", "wall_limit_ns": 2_000_000_000},
            "the job ran into its wall time limit of 2 s",
        ),
        (V2_OWN, "the kernel killed 1 process at the job's memory limit"),
        (
            {"memory_events": {"oom": 3, "oom_kill": 3}},
            "the kernel killed 3 processes at the job's memory limit",
        ),
        (V2_OWN_GROUP, "the kernel killed the job's processes at the job's memory limit"),
        (V1_OWN, "the kernel killed 1 process at the job's memory limit of 64 MiB"),
        (STDOUT, "the job wrote more to stdout than its output limit"),
        (
            {**STDOUT, "output_limit": 0},
            "the job wrote more to stdout than its output limit of 0 bytes",
        ),
        (
            {**STDOUT, "output_limit": 1025},
            "the job wrote more to stdout than its output limit of 1025 bytes",
        ),
        (
            {**STDERR, "output_limit": 3 << 10},
            "the job wrote more to stderr than its output limit of 3 KiB",
        ),
        (STDERR, "the job wrote more to stderr than its output limit"),
        ({**STDOUT, **STDERR}, "the job wrote more to stdout and stderr than its output limit"),
        (
            {"cause": "stop", "stop": "output"},
            "the job wrote more to stdout or stderr than its output limit",
        ),
        (
            {"cause": "seccomp", "syscall": "ptrace"},
            "the job made the system call ptrace, which the seccomp profile answers by killing",
        ),
        (
            {"cause": "seccomp"},
            "the job made a system call, which the seccomp profile answers by killing",
        ),
        ({"cause": "stop", "stop": "kill"}, "the caller killed the job"),
    ],
)
def test_explain(fields: dict[str, Any], sentence: str) -> None:
    """The sentence names the cause, the limit in force and the kernel's part in it."""
    case = evidence(**fields)
    assert explain(case, verdict(case)) == sentence


def test_signals_have_their_names() -> None:
    """Known signals are named, the others numbered."""
    assert signal_name(signal.SIGKILL) == "SIGKILL"
    assert signal_name(40) == "signal 40"
