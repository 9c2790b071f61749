"""To the end: what must be finished is, whatever cancels come meanwhile.

anyio's shield keeps out the cancels of anyio and trio. asyncio's own `Task.cancel` goes through it
(a second ctrl-C, a `TaskGroup` that fails, a web server that loses its client), so that one is
caught, and raised again when the work is done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

import anyio
from anyio import CancelScope
from anyio.lowlevel import RunVar

__all__ = ["in_thread", "on_thread", "shielded"]

T = TypeVar("T")
_MANY = 40
_of_many: RunVar[anyio.CapacityLimiter] = RunVar("isojob-threads")


async def shielded(again: Callable[[], Awaitable[T]]) -> T:
    """Awaits what `again` returns; a cancelled one is started anew.

    Args:
        again: Makes the awaitable: bounded, and the same however often it is begun.

    Raises:
        asyncio.CancelledError: After the end, if a cancel came meanwhile; whatever else went wrong
            is its cause.
    """
    cancelled: asyncio.CancelledError | None = None
    results: list[T] = []
    while not results:
        try:
            with CancelScope(shield=True):
                results.append(await again())
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException as error:
            if cancelled is not None:
                raise cancelled from error
            raise
    if cancelled is not None:
        raise cancelled
    return results[0]


async def on_thread(
    function: Callable[[], T], *, abandon_on_cancel: bool = False, many: bool = False
) -> T:
    """anyio.to_thread.run_sync, whatever the application has in threads.

    That may be calls that wait for us: with the limiter of all, they would wait for each other.

    Args:
        function: What to run.
        abandon_on_cancel: As in anyio.
        many: Of what many calls at once may want, no more than some at a time.

    Raises:
        RuntimeError: No thread can be started.
    """
    limiter = _limiter_of_many() if many else anyio.CapacityLimiter(1)
    return await anyio.to_thread.run_sync(
        function, abandon_on_cancel=abandon_on_cancel, limiter=limiter
    )


def _limiter_of_many() -> anyio.CapacityLimiter:
    try:
        return _of_many.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_MANY)
        _of_many.set(limiter)
        return limiter


async def in_thread(function: Callable[[], T], *, many: bool = False) -> T:
    """Runs a bounded, blocking function once in a thread, and returns only when it has."""
    lock = threading.Lock()
    outcome: Future[T] = Future()

    def once() -> None:
        with lock:  # a thread whose task was cancelled is still at it
            if not outcome.done():
                try:
                    outcome.set_result(function())
                except BaseException as error:  # noqa: BLE001 - raised below
                    outcome.set_exception(error)

    try:
        await shielded(lambda: on_thread(once, many=many))
    except RuntimeError:
        # No thread can be started (pids.max, RLIMIT_NPROC). Better to stall the loop for a moment
        # than never to close a zygote.
        once()
    return outcome.result()
