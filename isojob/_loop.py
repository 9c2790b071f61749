"""What asyncio and trio each do in their own way, and anyio does not do or not cheaply."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import sniffio

__all__ = ["Bell", "Service", "from_threads", "later", "running_asyncio", "serve", "soon", "spawn"]


def _is_asyncio() -> bool:
    # As sniffio does it, without asking asyncio for its task: whoever calls is in some loop. In
    # trio's guest mode both run, and trio says so here.
    return sniffio.thread_local.name is None


def running_asyncio() -> asyncio.AbstractEventLoop | None:
    """Asyncio's running loop, or None on trio.

    Raises:
        RuntimeError: There is no event loop.
    """
    return asyncio.get_running_loop() if _is_asyncio() else None


class Service:
    """What is to be called on asyncio when there is something to read, and whom to wake."""

    __slots__ = ("__weakref__", "_step", "future")

    def __init__(self, step: Callable[[], bool], future: asyncio.Future[bool]) -> None:
        self._step = step
        self.future = future

    def ready(self) -> None:
        """There is something to read."""
        if self.future.done():
            return
        try:
            if self._step():
                self.future.set_result(True)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.future.set_exception(error)

    def too_late(self) -> None:
        """Nobody waits any longer."""
        if not self.future.done():
            self.future.set_result(False)


async def serve(fd: int, step: Callable[[], bool], seconds: float | None) -> bool:
    """Calls `step` each time there is something to read, until it says that all is done.

    Most jobs are over within milliseconds, and their calls wait once. anyio's way (a cancel scope
    around `wait_readable`) costs as much as the rest of the call on asyncio.

    Args:
        fd: What to watch.
        step: Reads without waiting; whether nothing is left to do.
        seconds: How long at most; None: as long as it takes.

    Returns:
        False if the time was over before.
    """
    if not _is_asyncio():
        import trio

        with trio.move_on_after(float("inf") if seconds is None else seconds):
            while True:
                await trio.lowlevel.wait_readable(fd)
                if step():
                    return True
        return False
    loop = asyncio.get_running_loop()
    service = Service(step, loop.create_future())
    loop.add_reader(fd, service.ready)
    timer = None if seconds is None else loop.call_later(seconds, service.too_late)
    try:
        return await service.future
    finally:
        if timer is not None:
            timer.cancel()
        loop.remove_reader(fd)


def from_threads() -> Callable[[Callable[[], object]], object]:
    """How another thread has something called in the event loop that runs now.

    Returns:
        A function that raises RuntimeError when that loop is gone (as trio's RunFinishedError is).
    """
    if _is_asyncio():
        return asyncio.get_running_loop().call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


class Bell:
    """An event of the loop that runs now, which any thread may set."""

    __slots__ = ("_event", "_soon")

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._soon = from_threads()

    async def wait(self) -> None:
        """Until it has been rung."""
        await self._event.wait()

    def ring(self) -> bool:
        """Wakes who waits; False: their loop is gone."""
        try:
            self._soon(self._event.set)
        except RuntimeError:
            return False
        return True


def soon(function: Callable[[], object]) -> None:
    """Calls a function in this event loop when the running task pauses next.

    Raises:
        RuntimeError: There is no event loop, or it takes nothing any more.
    """
    if _is_asyncio():
        # Unlike `from_threads` it need not wake the loop: that costs a system call.
        asyncio.get_running_loop().call_soon(function)
    else:
        from_threads()(function)


def later(seconds: float, function: Callable[[], object]) -> None:
    """Calls a function in this event loop after so long, unless the loop ends before.

    From a callback, too, where sniffio does not see which loop that is.

    Raises:
        RuntimeError: There is no event loop.
    """
    try:
        asyncio.get_running_loop().call_later(seconds, function)
    except RuntimeError:
        if "trio" not in sys.modules:
            raise
        import trio
    else:
        return

    async def wait() -> None:
        await trio.sleep(seconds)
        function()

    trio.lowlevel.spawn_system_task(wait)


def spawn(function: Callable[[], Coroutine[Any, Any, None]], ended: Callable[[], None]) -> object:
    """Starts a task outside of any task group.

    Args:
        function: What it runs; it catches its own exceptions.
        ended: Called when the task is over, also if it was cancelled before it began.

    Returns:
        What to keep until then.
    """
    if _is_asyncio():
        task = asyncio.get_running_loop().create_task(function())
        # Not in the coroutine: one that is cancelled before its first step never begins.
        task.add_done_callback(lambda _: ended())
        return task
    import trio

    async def run() -> None:
        try:
            await function()
        finally:
            ended()

    return trio.lowlevel.spawn_system_task(run)
