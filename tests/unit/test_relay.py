"""Reading along as two jobs talk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from isojob._relay import Relay, Transcript

pytestmark = pytest.mark.anyio


class Job:
    """One side, with its ends of the pipes."""

    def __init__(self) -> None:
        self.at_end: list[Callable[[], None]] = []
        self.stdin = self.stdout = -1

    def reads(self, fd: int) -> None:
        self.stdin = fd

    def writes(self, fd: int) -> None:
        self.stdout = fd


def test_no_descriptor_for_the_second_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they run out between the two pipes, the first one is closed again."""

    def refused(_: bytes) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("isojob._relay.Feed", refused)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Too many open files"):
        Relay(Job(), Job(), "solution", Transcript(1))
    assert os.listdir("/proc/self/fd") == before


async def test_hanging_up_on_one_who_never_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipe holds is noted; whoever fills it as fast as we read does not hold the loop."""
    solution, interactor, transcript = Job(), Job(), Transcript(10 << 20)
    relay = Relay(solution, interactor, "solution", transcript)
    read = 0

    def flooded(_: int, size: int) -> bytes:
        nonlocal read
        read += size
        if read > 16 << 20:
            raise AssertionError("it reads on and on")
        return b"x" * size

    monkeypatch.setattr("isojob._relay.os.read", flooded)
    relay.hang_up()
    monkeypatch.undo()
    os.close(solution.stdout)
    os.close(interactor.stdin)
    assert 0 < read <= 1 << 20
    assert transcript.said == (("solution", b"x" * read),)
