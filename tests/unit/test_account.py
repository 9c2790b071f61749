"""From the words of init to evidence."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from isojob import IsojobError, Limits, Posture, Result, Sandbox, Status, wire, wire_result
from isojob._account import Outcome, has_simply_ended, make_evidence, make_result
from isojob._cell import Run
from isojob._descriptors import send_fds
from isojob._job import Job
from isojob._lease import Lease
from isojob._streams import Capture
from isojob._zygote import Zygote
from isojob.cgroups import Counters
from isojob.cgroups import Driver as AnyDriver
from isojob.cgroups.discovery import NoCgroups
from isojob.cgroups.v1 import V1
from isojob.cgroups.v2 import V2
from isojob.verdict import explain, verdict


class Driver(NoCgroups):
    """Says whatever the test wants."""

    def __init__(self, counters: Counters) -> None:
        super().__init__("", "")
        self.said = counters

    def counters(self, values: object, files: object) -> Counters:
        return self.said


def outcome(counters: Counters, *, cpu_base: int, cpu_end: int) -> Outcome:
    """A job that exited with 0."""
    made = Outcome(Driver(counters))
    made.host.admitted_ns, made.host.sent_ns, made.host.reply_ns = 100, 110, 200
    words = dict.fromkeys(wire_result.RawResult._fields, 0)
    words |= {
        "state": wire.JobState.EXEC,
        "code": 1,
        "received_ns": 130,
        "start_ns": 135,
        "end_ns": 175,
        "done_ns": 180,
        "cpu_base_ns": cpu_base,
        "cpu_end_ns": cpu_end,
        "user_us": 7,
        "system_us": 8,
    }
    made.raw = wire_result.RawResult._make(words.values())
    return made


@pytest.mark.parametrize(("counted", "events"), [(-1, {}), (0, {"oom": 0}), (2, {"oom": 2})])
def test_ooms_of_v1(counted: int, events: dict[str, int]) -> None:
    """What init has counted stands beside the kernel's kills, and nothing where it cannot."""
    made = outcome(Counters(memory_events={"oom_kill": 1}), cpu_base=2, cpu_end=42)
    assert made.raw is not None
    made.raw = made.raw._replace(ooms=counted)
    assert make_evidence(made, Limits()).memory_events == {**events, "oom_kill": 1}


@pytest.mark.parametrize(
    ("user", "system", "expected"), [(4, 14, (10, 30)), (0, 4, (0, 40)), (0, 0, (0, 40))]
)
def test_ticks_are_a_proportion(user: int, system: int, expected: tuple[int, int]) -> None:
    """v1 counts ticks of 4 ms: together user and system are the CPU time, as elsewhere."""
    counters = Counters(user_ns=user, system_ns=system)
    made = make_evidence(outcome(counters, cpu_base=2, cpu_end=42), Limits())
    assert (made.cpu_ns, made.user_ns, made.system_ns) == (40, *expected)


def test_the_launcher_is_not_charged() -> None:
    """v2: what was used before the start is taken off, from what the kernel used."""
    counters = Counters(user_ns=10, system_ns=32)
    made = make_evidence(outcome(counters, cpu_base=2, cpu_end=42), Limits())
    assert (made.cpu_ns, made.user_ns, made.system_ns) == (40, 10, 30)


def test_without_an_account() -> None:
    """Then the reaped processes are what is known, and said to be not all."""
    made = make_evidence(outcome(Counters(), cpu_base=0, cpu_end=-1), Limits())
    assert (made.cpu_ns, made.user_ns, made.system_ns) == (15000, 7000, 8000)
    assert not made.cpu_is_whole


def test_phases_are_the_whole_call() -> None:
    """They follow one another without a gap, from admission to the host's having the report."""
    made = make_evidence(outcome(Counters(), cpu_base=0, cpu_end=-1), Limits())
    phases = [
        made.lease_ns,
        made.send_ns,
        made.prepare_ns,
        made.wall_ns,
        made.teardown_ns,
        made.reply_ns,
    ]
    assert phases == [10, 20, 5, 40, 5, 20]
    assert sum(phases) == 100


class Output(Capture):
    """A stream of which so much came."""

    def __init__(self, total: int, cap: int | None) -> None:
        self.total, self.cap = total, cap
        self.read_end = self.write_end = -1
        self._chunks, self._whole = [], None


SIZES = st.sampled_from([0, 1, 63 << 20, 64 << 20])
NEAR = st.sampled_from([-1, 0, 999_999_999, 1_000_000_000, 1_000_000_001, 2_000_000_001])
WORDS = st.fixed_dictionaries(
    {
        "cause": st.integers(0, len(wire_result.CAUSES) - 1),
        "code": st.sampled_from([1, 1, 1, 2, 3]),
        "status": st.sampled_from([0, 1, 9, 137]),
        "end_ns": NEAR,
        "cpu_end_ns": NEAR,
        "cpu_base_ns": st.sampled_from([0, 1]),
    }
)


def drivers(directory: Path) -> list[AnyDriver]:
    """One of each kind."""
    (directory / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    own = {name: directory / name for name in ("memory", "pids", "cpuacct")}
    return [V2(directory), V1(own), V1({"pids": directory}), NoCgroups("", "")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[AnyDriver]:
    """They read nothing more of the directory."""
    return drivers(tmp_path_factory.mktemp("cgroups"))


@given(st.data())
def test_the_short_way_to_a_verdict_is_the_long_one(
    made: list[AnyDriver], data: st.DataObject
) -> None:
    """Where the exit status is taken for the verdict, all the evidence says the same."""
    driver = data.draw(st.sampled_from(made))
    count = sum(len(file.counters) for file in driver.files.evidence)
    words: dict[str, Any] = dict.fromkeys(wire_result.RawResult._fields, 0) | data.draw(WORDS)
    words |= {
        "state": wire.JobState.EXEC,
        "counters": tuple(data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))),
        "files": {},
        "failure": None,
    }
    case = Outcome(driver)
    case.raw = wire_result.RawResult._make(words.values())
    case.out = data.draw(st.none() | st.builds(Output, SIZES, st.none() | SIZES))
    case.err = data.draw(st.none() | st.builds(Output, SIZES, st.none() | SIZES))
    limits = Limits(
        memory="64MiB",
        wall_time=data.draw(st.sampled_from([None, 1, 2])),
        cpu_time=data.draw(st.sampled_from([None, 1, 2])),
    )
    if has_simply_ended(case, limits):
        expected = Status.OK if words["status"] == 0 else Status.NONZERO_EXIT
        assert verdict(make_evidence(case, limits)) is expected


POSTURE = Posture(cgroup="v2", privilege="root", kernel="6", namespaces=("net",), seccomp="default")
EXTREMES = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**63 - 1])
REPORTS = st.tuples(
    st.sampled_from(list(wire.JobState)),
    st.integers(0, len(wire_result.CAUSES) - 1),
    st.sampled_from([1, 1, 1, 2, 3, 0, -1]),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.lists(EXTREMES | st.integers(-(2**63), 2**63 - 1), min_size=12, max_size=12),
)
LONG = b"9" * 4300
LINES = st.sampled_from(
    [
        b"",
        b" \n",
        b"=",
        b"8:0 rbytes=1\n",
        b"8:0 Read 5\n",
        b"8:0 Read x\n",
        b"8:0 rbytes=%s\n8:1 rbytes=%s\n" % (LONG, LONG),
        b"8:0 Read %s\n8:1 Read %s\n" % (LONG, LONG),
    ]
)


@given(st.data())
def test_whatever_an_init_reports(made: list[AnyDriver], data: st.DataObject) -> None:
    """One that somebody has taken over: refused by name, or a result that can be looked at."""
    driver = data.draw(st.sampled_from(made))
    count = sum(len(file.counters) for file in driver.files.evidence)
    count = max(0, count + data.draw(st.sampled_from([0, 0, 0, -1, 1, -count])))
    *words, rest = data.draw(REPORTS)
    counters = data.draw(st.lists(EXTREMES, min_size=count, max_size=count))
    out = wire.Writer(wire.MessageType.RESULT)
    out.put(wire.Tag.REPORT, struct.pack("<IIiiIi12q", *words, *rest))
    out.put(wire.Tag.COUNTERS, struct.pack(f"<{count}q", *counters))
    for index, lines in data.draw(st.dictionaries(st.integers(0, 9), LINES | st.binary())).items():
        out.put(wire.Tag.EVIDENCE, lines, index)
    if data.draw(st.booleans()):
        out.text(wire.Tag.STAGE, data.draw(st.sampled_from(["", "execve", "uid_map", "bind /x"])))
        out.put(wire.Tag.ERRNO, struct.pack("<i", data.draw(st.integers(-(2**31), 2**31 - 1))))
    case = Outcome(driver)
    job = Job.make(["true"], sandbox=Sandbox(), limits=Limits())
    try:
        datagram = out.message()
        case.raw = driver.usual.read(datagram) or driver.usual.parse(wire.decode(datagram))
        result = make_result(job, case, POSTURE, None)
    except (IsojobError, wire.WireError):
        return
    assert str(result)
    assert repr(result.usage)
    assert explain(result.evidence, result.status)
    assert result.signal is None or result.exit_code is None
    assert Result.model_validate_json(result.model_dump_json()).usage == result.usage


def finished() -> Result:
    """What a caller gets of a job that simply ended."""
    job = Job.make(["true"], sandbox=Sandbox(), limits=Limits(cpu_time=None))
    case = outcome(Counters(memory_peak=4096), cpu_base=0, cpu_end=40)
    return make_result(job, case, POSTURE, 5)


class Holder(BaseModel):
    """A model of the caller's own."""

    result: Result


@pytest.mark.parametrize(
    "look",
    [
        repr,
        str,
        vars,
        list,
        lambda got: got.usage,
        lambda got: got.stdout_truncated,
        lambda got: got.model_dump(),
        lambda got: got.model_copy(update={"index": 6}),
        lambda got: got == got,  # noqa: PLR0124
        lambda got: Holder(result=got).model_dump_json(),
        lambda got: pickle.loads(pickle.dumps(got)),
    ],
)
def test_an_account_is_written_when_somebody_asks(look: object) -> None:
    """However a result is looked at, it is whole; what every caller asks for needs no account."""
    whole, got = finished(), finished()
    assert whole.usage.memory_peak == 4096
    assert (got.ok, got.status, got.returncode, got.exit_code) == (True, Status.OK, 0, 0)
    assert (got.signal, got.stdout_text, got.files, got.index) == (None, "", {}, 5)
    assert "account" in object.__getattribute__(got, "__dict__")
    assert callable(look)
    look(got)
    assert type(got) is Result
    assert got == whole
    assert list(got.__dict__) == list(Result.model_fields)
    assert Result.model_validate_json(finished().model_dump_json()) == whole
    assert '"memory_peak":4096' in Holder(result=finished()).model_dump_json()


@contextmanager
def spoken_to() -> Iterator[tuple[Run, socket.socket]]:
    """A job whose cell is ours to play."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        zygote = SimpleNamespace(driver=NoCgroups("", ""))
        lease = Lease((ours, 0), cast("Zygote", zygote), None, None)
        yield Run(lease, Job.make(["true"], sandbox=Sandbox(), limits=Limits())), theirs


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Is not collected, and that is told: it is no error of the call's."""
    with spoken_to() as (run, cell), (tmp_path / "x").open("wb") as file:
        file.write(b"x")
        file.flush()
        out = wire.Writer(wire.MessageType.FILE)
        out.text(wire.Tag.NAME, "x")
        send_fds(cell, out.message(), [file.fileno()])
        assert not run._take_all()
        assert run.outcome.uncollected == {"x": "Bad file descriptor"}


def test_all_that_a_pipe_holds() -> None:
    """Far more than its size: splice(2) fills its slots with pages of a socket, eight at a time."""
    with spoken_to() as (run, _):
        capture = Capture()
        capture.widen()
        from_here, to_pipe = socket.socketpair()
        os.set_blocking(capture.write_end, False)
        written = 0
        with from_here, to_pipe, suppress(BlockingIOError):
            while True:
                from_here.send(bytes(32768))
                written += os.splice(to_pipe.fileno(), capture.write_end, 32768)
        run._captures.append(capture)
        run._drain()
        assert capture.total == written
        assert written > 4 << 20
        capture.close()


def test_a_message_that_is_longer_than_any() -> None:
    """Is not even looked at: that takes time."""
    with spoken_to() as (run, cell):
        cell.send(bytes(wire.RECEIVE_SIZE + 1))
        with pytest.raises(wire.WireError, match="cut off"):
            run._take_all()


def test_a_report_with_descriptors_leaves_none() -> None:
    """A cell sends none with its report; one that does costs its host nothing."""
    with spoken_to() as (run, theirs):
        out = wire.Writer(wire.MessageType.RESULT)
        out.put(wire.Tag.REPORT, struct.pack("<IIiiIi12q", wire.JobState.EXEC, 0, 1, *range(15)))
        out.put(wire.Tag.COUNTERS, b"")
        send_fds(theirs, out.message(), [0, 1])
        before = len(os.listdir("/proc/self/fd"))
        assert run._take_all()
        assert run.outcome.raw is not None
        assert len(os.listdir("/proc/self/fd")) == before
