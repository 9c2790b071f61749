"""Zygotes on their way, and who waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from isojob.errors import PoolClosedError

__all__ = ["Starts"]


class Start(Protocol):
    """One of them."""

    def give_up(self) -> None:
        """Has it fail soon; from any thread."""

    def let_go(self) -> None:
        """In a forked child: closes what is a copy there."""


class Starts:
    """Of one stock: they end with the last who waits for one, and with the stock.

    A start can take as long as a warm interpreter's imports do.
    """

    def __init__(self) -> None:
        # Reentrant: allocating under it may collect garbage, and that an abandoned call.
        self._lock = threading.RLock()
        self._waiting = 0
        self._closed = False
        self._under_way: set[Start] = set()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Around the wait for one."""
        with self._lock:
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._give_up()

    @contextmanager
    def under_way(self, start: Start) -> Iterator[None]:
        """Around the part of it that can be given up.

        Raises:
            PoolClosedError: Nobody waits for it.
        """
        with self._lock:
            if self._closed or not self._waiting:
                raise PoolClosedError
            self._under_way.add(start)
        try:
            yield
        finally:
            with self._lock:
                self._under_way.discard(start)

    def close(self) -> None:
        """Gives up those that there are, and those to come."""
        with self._lock:
            self._closed = True
            self._give_up()

    def let_go(self) -> None:
        """In a forked child, where the thread that had one under way is not."""
        for start in self._under_way:
            start.let_go()

    def _give_up(self) -> None:
        for start in self._under_way:
            start.give_up()
