"""From the words of init to evidence."""

from __future__ import annotations

import pytest

from isojob import Limits, wire
from isojob._account import Outcome, make_evidence
from isojob.cgroups import Counters
from isojob.cgroups.discovery import NoCgroups


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
    words = dict.fromkeys(wire.RawResult._fields, 0)
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
    made.raw = wire.RawResult._make(words.values())
    return made


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
