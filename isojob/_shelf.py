"""Parked cells of one kind, and how many of them there should be."""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from isojob._lease import Lease
from isojob._spec import CellSpec

__all__ = ["Level", "Shelf", "was_unfinished"]

LATE_NS = 1_000_000
YOUNG = 8
FORGET_NS = 10_000_000_000


def was_unfinished(asked_ns: int, sent_ns: int, received_ns: int) -> bool:
    """Whether a job found its cell in the making: the job had to wait.

    On a busy host it waits for a ready cell, too, to be scheduled; but that was asked for long
    before, as compared with the wait.

    Args:
        asked_ns: When the cell was asked for.
        sent_ns: When the job was sent to it.
        received_ns: When it had the job.
    """
    waited_ns = received_ns - sent_ns
    return waited_ns > LATE_NS and sent_ns - asked_ns < YOUNG * waited_ns


class Level:
    """How many cells to keep ready: what bursts turned out to need, until that is forgotten.

    A job that had to wait for its cell asks for one more next time, so that the level grows by what
    was lacking. Every ten seconds without such a job take one away again.

    Args:
        least: Never fewer. -1: none, and the first job that lacks one changes nothing.
        most: Never more.
    """

    __slots__ = ("_least", "_level", "_most", "_since_ns")

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._most = most
        self._since_ns = 0
        self._level = least

    @property
    def wanted(self) -> int:
        """Cells that should be ready."""
        return max(0, self._level)

    def lacked(self, now_ns: int) -> None:
        """A job had to wait for its cell."""
        self._level = min(self._most, self._level + 1)
        self._since_ns = now_ns

    def forget(self, now_ns: int) -> None:
        """Time has passed."""
        if self._level > self._least:
            steps = (now_ns - self._since_ns) // FORGET_NS
            if steps > 0:
                self._level = max(self._least, self._level - steps)
                self._since_ns += steps * FORGET_NS


class Shelf:
    """Parked cells that can stand in for one another.

    Attributes:
        spec: What they are made with.
        cells: Their leases, the oldest first.
        level: How many there should be.
    """

    __slots__ = ("cells", "level", "spec")

    def __init__(self, spec: CellSpec, level: Level) -> None:
        self.spec = spec
        self.cells: deque[Lease] = deque()
        self.level = level

    def empty(self) -> None:
        """Lets go of all cells."""
        with suppress(IndexError):  # somebody may take one meanwhile
            while True:
                self.cells.pop().close()
