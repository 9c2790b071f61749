"""Pipes to and from a job that does its best to keep the host's event loop."""

from __future__ import annotations

import fcntl
import os

import anyio
import anyio.lowlevel
import pytest

from isojob._ends import Sender
from isojob._streams import TURN, TURN_CALLS, Capture, Feed, open_pipe

pytestmark = pytest.mark.anyio


class Calls:
    """A system call that always has something to do, and ever the same little."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0

    def read(self, fd: int, most: int) -> memoryview:
        """As `read_into`."""
        self.count += 1
        assert self.count <= 2 * TURN_CALLS, "it reads on"
        return memoryview(bytes(min(self.size, most)))

    def write(self, fd: int, data: memoryview) -> int:
        """As `write_some`."""
        self.count += 1
        assert self.count <= 2 * TURN_CALLS, "it writes on"
        return min(self.size, len(data))


@pytest.mark.parametrize(("size", "count"), [(1, TURN_CALLS), (1 << 20, TURN >> 20)])
def test_a_job_that_writes_as_fast(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets of one byte or whole pipes of them: the others have their turn."""
    calls = Calls(size)
    monkeypatch.setattr("isojob._streams.read_into", calls.read)
    capture = Capture()
    assert not capture.drain_some()
    assert calls.count == count
    assert capture.total == size * count
    capture.close()


@pytest.mark.parametrize(("size", "count"), [(1, TURN_CALLS), (1 << 20, TURN >> 20)])
def test_a_job_that_reads_as_fast(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of its stdin; what is left is written in other turns."""
    calls = Calls(size)
    monkeypatch.setattr("isojob._streams.write_some", calls.write)
    feed = Feed(bytes(2 * TURN))
    assert not feed.step()
    assert calls.count == count
    if size > 1:
        calls.count = 0
        assert feed.step()
        assert calls.count == count
    feed.close()


def test_what_was_there_is_read_whole() -> None:
    """When all writers are dead the number of packets is no bound."""
    capture = Capture()
    os.set_blocking(capture.write_end, False)
    capture.widen()
    fcntl.fcntl(capture.write_end, fcntl.F_SETFL, os.O_WRONLY | os.O_NONBLOCK | os.O_DIRECT)
    for _ in range(256):
        os.write(capture.write_end, b"x")
    capture.drain_now()
    assert capture.total == 256
    capture.close()


async def test_sending_to_a_job_that_reads_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run between the pieces."""
    calls = Calls(4096)
    monkeypatch.setattr("isojob._ends.write_some", calls.write)
    read_end, write_end = open_pipe(0o444)
    os.set_blocking(write_end, False)
    sender = Sender(write_end)
    turns = 0
    async with anyio.create_task_group() as tasks:

        async def others() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        tasks.start_soon(others)
        await sender.send(bytes(1 << 20))
        tasks.cancel_scope.cancel()
    assert calls.count == 256
    assert turns >= 100
    await sender.aclose()
    os.close(read_end)
