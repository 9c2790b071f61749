"""How many cells to keep ready, without a kernel."""

from __future__ import annotations

import pytest

from isojob._shelf import FORGET_NS, Level, was_unfinished

MS = 1_000_000


@pytest.mark.parametrize(
    ("age", "waited", "unfinished"),
    [
        (2 * MS, MS // 2, False),  # as fast as ready ones are
        (2 * MS, 3 * MS, True),  # asked for just now
        (60 * MS, 20 * MS, True),  # last in a row that a slow host makes
        (5000 * MS, 30 * MS, False),  # ready for long: the host is busy
    ],
)
def test_a_busy_host_is_no_unfinished_cell(age: int, waited: int, *, unfinished: bool) -> None:
    """Else the stock of a host without a free processor would grow to no avail."""
    assert was_unfinished(100, 100 + age, 100 + age + waited) is unfinished


def test_grows_by_what_was_lacking() -> None:
    """A burst of 12 jobs that found 8 cells ready lacks 4."""
    level = Level(8, 32)
    for _ in range(4):
        level.lacked(0)
    assert level.wanted == 12


def test_never_more_than_the_most() -> None:
    """Sustained load does not make it grow for ever."""
    level = Level(8, 32)
    for _ in range(1000):
        level.lacked(0)
    assert level.wanted == 32


def test_forgets_slowly_down_to_the_least() -> None:
    """One cell less for each ten seconds; a job that lacks one starts the time anew."""
    level = Level(8, 32)
    for _ in range(4):
        level.lacked(5)
    level.forget(5 + FORGET_NS - 1)
    assert level.wanted == 12
    level.forget(5 + 2 * FORGET_NS)
    assert level.wanted == 10
    level.forget(5 + 2 * FORGET_NS + 1)
    assert level.wanted == 10
    level.lacked(5 + 2 * FORGET_NS + 1)
    level.forget(5 + 3 * FORGET_NS)
    assert level.wanted == 11
    level.forget(5 + 300 * FORGET_NS)
    assert level.wanted == 8


def test_one_job_of_a_kind_parks_nothing() -> None:
    """Where every job brings other limits a parked cell would be wasted on each."""
    level = Level(-1, 32)
    level.lacked(0)
    assert level.wanted == 0
    level.lacked(0)
    assert level.wanted == 1
    level.forget(10 * FORGET_NS)
    assert level.wanted == 0


def test_a_fixed_number_stays() -> None:
    """`Pool(parked=0)` parks nothing, whatever jobs lack."""
    level = Level(0, 0)
    for _ in range(5):
        level.lacked(0)
    assert level.wanted == 0
