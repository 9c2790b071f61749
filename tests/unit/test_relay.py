"""Reading along as two jobs talk."""

from __future__ import annotations

import errno
import fcntl
import mmap
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


async def test_hanging_up_on_one_who_says_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job can make its pipe wide and its writes packets: each read takes one, of one byte."""
    solution, interactor, transcript = Job(), Job(), Transcript(10 << 20)
    relay = Relay(solution, interactor, "solution", transcript)
    fcntl.fcntl(solution.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.close(solution.stdout)
    most = (1 << 20) // mmap.PAGESIZE
    reads = 0

    def refilled(_: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        return b"x"

    monkeypatch.setattr("isojob._relay.os.read", refilled)
    relay.hang_up()
    monkeypatch.undo()
    os.close(interactor.stdin)
    assert 0 < reads <= most + 1  # one finds the end


async def test_hanging_up_loses_nothing() -> None:
    """As many packets as the pipe holds are noted, and as many bytes."""
    for flags, pieces in ((os.O_DIRECT, [b"x"] * 16), (0, [b"y" * 5000] * 10)):
        solution, interactor, transcript = Job(), Job(), Transcript(10 << 20)
        relay = Relay(solution, interactor, "solution", transcript)
        fcntl.fcntl(solution.stdout, fcntl.F_SETPIPE_SZ, 16 * mmap.PAGESIZE)
        fcntl.fcntl(solution.stdout, fcntl.F_SETFL, os.O_WRONLY | os.O_NONBLOCK | flags)
        for piece in pieces:
            assert os.write(solution.stdout, piece) == len(piece)
        relay.hang_up()
        os.close(solution.stdout)
        os.close(interactor.stdin)
        assert transcript.said == (("solution", b"".join(pieces)),)
