"""The caller's ends of a job's streams, without a job."""

from __future__ import annotations

import os
import pty

import pytest

from isojob._ends import CHUNK, Receiver
from isojob._streams import Meter


def test_a_terminal_that_somebody_goes_on_writing_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job may have given it to a process outside: what is measured at the end has an end."""
    master, slave = pty.openpty()
    meter = Meter(None)
    receiver = Receiver(master, meter, lambda: None)
    reads = 0

    def read(fd: int, room: int) -> bytes:
        nonlocal reads
        assert fd == master
        reads += 1
        assert reads < 1000, "it reads on"
        return bytes(room)

    monkeypatch.setattr("isojob._ends.os.read", read)
    receiver.measure()
    assert meter.total == reads * CHUNK
    monkeypatch.undo()
    receiver.close()
    os.close(slave)


def test_a_terminal_holds_less_than_is_measured() -> None:
    """So nothing is lost that the job has written."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    os.set_blocking(slave, False)
    written = 0
    while True:
        try:
            written += os.write(slave, bytes(CHUNK))
        except BlockingIOError:
            break
    os.close(slave)
    meter = Meter(None)
    receiver = Receiver(master, meter, lambda: None)
    receiver.measure()
    assert meter.total == written > 4095
    receiver.close()
