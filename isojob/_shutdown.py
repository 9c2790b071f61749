"""The end of the interpreter: what it would cut off half-way is waited for, what is new is refused.

A daemon thread stops wherever it is when the interpreter finalizes (`threading`, "Thread Objects"):
in the middle of a start, a zygote and its cgroups would have no owner yet.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from isojob.errors import PoolClosedError

__all__ = ["ending", "refuse_late", "shut_down", "starting"]


class _State:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.under_way = 0
        self.over = False


_state = _State()


def refuse_late() -> None:
    """Only while the interpreter runs.

    Raises:
        PoolClosedError: It is shutting down.
    """
    if _state.over:
        raise PoolClosedError("the interpreter is shutting down")


@contextmanager
def starting() -> Iterator[None]:
    """Around what makes kernel objects that have no owner before its end.

    Raises:
        PoolClosedError: The interpreter is shutting down.
    """
    with ending():
        refuse_late()
        yield


@contextmanager
def ending() -> Iterator[None]:
    """Around what takes kernel objects from their owner before they are gone."""
    state = _state
    with state.changed:
        state.under_way += 1
    try:
        yield
    finally:
        with state.changed:
            state.under_way -= 1
            state.changed.notify_all()


def shut_down(seconds: float) -> None:
    """Refuses further starts, and waits so long for those that are under way."""
    with _state.changed:
        _state.over = True
        _state.changed.wait_for(lambda: _state.under_way == 0, seconds)


def _after_fork_in_child() -> None:
    # The threads of the parent, one of which may hold the lock, are not here.
    global _state
    _state = _State()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
