"""What asyncio and trio each do in their own way, and anyio does not do or not cheaply."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import sniffio

__all__ = ["from_threads", "later", "readable", "soon", "spawn"]


def _is_asyncio() -> bool:
    return sniffio.current_async_library() == "asyncio"


def _wake(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)


async def readable(sock: socket.socket, seconds: float) -> bool:
    """Waits until there is something to read, at most so long; whether there is.

    Most jobs are over within milliseconds, and their calls wait once. anyio's way (a cancel scope
    around `wait_readable`) costs as much as the rest of the call on asyncio.
    """
    if not _is_asyncio():
        import trio

        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(sock)
            return True
        return False
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bool] = loop.create_future()
    loop.add_reader(sock, _wake, future, True)
    timer = loop.call_later(seconds, _wake, future, False)
    try:
        return await future
    finally:
        timer.cancel()
        loop.remove_reader(sock)


def from_threads() -> Callable[[Callable[[], object]], object]:
    """How another thread has something called in the event loop that runs now.

    Returns:
        A function that raises RuntimeError when that loop is gone (as trio's RunFinishedError is).
    """
    if _is_asyncio():
        return asyncio.get_running_loop().call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


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
