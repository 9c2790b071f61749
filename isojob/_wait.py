"""One short wait, as cheap as the event loop allows.

Most jobs are over within milliseconds, and their calls wait once. anyio's way (a task group or a
cancel scope around `wait_readable`) costs as much as the rest of the call on asyncio.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import sniffio

__all__ = ["later", "readable", "soon"]


def _wake(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)


async def readable(sock: socket.socket, seconds: float) -> bool:
    """Waits until there is something to read, at most so long; whether there is."""
    if sniffio.current_async_library() != "asyncio":
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


def soon(function: Callable[[], object]) -> None:
    """Calls a function in this event loop when the running task pauses next."""
    if sniffio.current_async_library() == "asyncio":
        asyncio.get_running_loop().call_soon(function)
    else:
        import trio

        trio.lowlevel.current_trio_token().run_sync_soon(function)


def later(seconds: float, function: Callable[[], object]) -> None:
    """Calls a function in this event loop after so long, unless the loop ends before.

    From a callback, too, where sniffio does not see which loop that is.
    """
    try:
        asyncio.get_running_loop().call_later(seconds, function)
    except RuntimeError:
        import trio
    else:
        return

    async def wait() -> None:
        await trio.sleep(seconds)
        function()

    trio.lowlevel.spawn_system_task(wait)
