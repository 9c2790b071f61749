"""The end of the interpreter, and forks of it: pools are closed here, and let go of there.

What the end would cut off half-way is waited for, what is new is refused.

A daemon thread stops wherever it is when the interpreter finalizes (`threading`, "Thread Objects"):
in the middle of a start, a zygote and its cgroups would have no owner yet.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from isojob.errors import PoolClosedError

__all__ = ["each", "end_with_process", "ending", "refuse_late", "starting"]

PATIENCE_SECONDS = 20.0
"""As long as a zygote may take to start."""


class Owner(Protocol):
    """Of zygotes and cells."""

    def close(self) -> None:
        """Ends them."""

    def forget(self) -> None:
        """In a forked child: lets go of them."""


class _State:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.under_way = 0
        self.over = False
        self.owners: weakref.WeakSet[Owner] = weakref.WeakSet()


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


def end_with_process(owner: Owner) -> None:
    """Has it closed at the end of the interpreter, and told of forks."""
    with _state.changed:
        _state.owners.add(owner)


def _at_exit() -> None:
    with _state.changed:
        _state.over = True
        _state.changed.wait_for(lambda: _state.under_way == 0, PATIENCE_SECONDS)
        owners = list(_state.owners)
    each(owner.close for owner in owners)


def each(calls: Iterable[Callable[[], None]]) -> None:
    """All of them, whatever one raises."""
    failed: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the last is raised
            failed = error
    if failed is not None:
        raise failed


def _after_fork_in_child() -> None:
    # The threads of the parent, one of which may hold the lock, are not here.
    global _state
    owners, _state = _state.owners, _State()
    _state.owners = owners
    each(owner.forget for owner in list(owners))


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
