"""The host's end of a cell, without a cell."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import cast

from isojob._lease import WORDS, Lease
from isojob._maker import Maker


def test_errand_for_a_dead_init() -> None:
    """That it could not be sent says nothing of the job before it, which nobody has read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lease = Lease((ours, 0), cast(Maker, None), None, None)
    lease.socket.send(b"job")
    theirs.close()
    lease.send_collect(b"errand")
    assert lease.read() is None
    assert lease.unread
    lease.close()


def test_words_of_a_cell_that_is_to_end() -> None:
    """However many there are, the event loop has its turn between them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lease = Lease((ours, 0), cast(Maker, None), None, None)
    theirs.setblocking(False)
    said = 0
    with suppress(BlockingIOError):
        while True:
            theirs.send(b"more")
            said += 1
    assert said > WORDS
    theirs.close()
    turns = 0
    while not lease._at_end_of_file():
        turns += 1
    assert turns == said // WORDS
    lease.close()
