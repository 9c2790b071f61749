"""Reading along as two jobs talk."""

from __future__ import annotations

import os
import threading
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


async def test_hanging_up_on_one_who_never_stops() -> None:
    """What the pipe holds is noted; whoever fills it as fast as we read does not hold the loop."""
    solution, interactor, transcript = Job(), Job(), Transcript(10 << 20)
    relay = Relay(solution, interactor, "solution", transcript)

    def flood() -> None:
        try:
            while True:
                os.write(solution.stdout, b"x" * 65536)
        except BrokenPipeError:
            pass

    writers = [threading.Thread(target=flood) for _ in range(2)]
    for writer in writers:
        writer.start()
    hung_up = threading.Thread(target=relay.hang_up)
    hung_up.start()
    hung_up.join(60)
    stuck = hung_up.is_alive()
    relay.close()  # ends the writers, whatever happened
    for writer in writers:
        writer.join()
    hung_up.join()
    os.close(solution.stdout)
    os.close(interactor.stdin)
    assert not stuck
    assert len(transcript.said) <= 1
    assert sum(len(data) for _, data in transcript.said) <= 1 << 20
