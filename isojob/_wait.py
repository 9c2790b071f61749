"""One short wait, as cheap as the event loop allows.

Most jobs are over within milliseconds, and their calls wait once. anyio's way (a task group or a
cancel scope around `wait_readable`) costs as much as the rest of the call on asyncio.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Self

import sniffio

__all__ = ["Readable", "soon"]


def _wake(future: asyncio.Future[bool], answer: bool) -> None:
    if not future.done():
        future.set_result(answer)


class Readable:
    """Waits once until there is something to read, at most so long.

    A context manager, armed on entry: what is sent after that wakes a process that shares our CPU,
    and it runs when we pause, so little should be left to do until then.
    """

    __slots__ = ("_future", "_seconds", "_sock", "_timer")

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._seconds = seconds
        self._future: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        if sniffio.current_async_library() == "asyncio":
            loop = asyncio.get_running_loop()
            self._future = loop.create_future()
            loop.add_reader(self._sock, _wake, self._future, True)
            self._timer = loop.call_later(self._seconds, _wake, self._future, False)
        return self

    async def wait(self) -> bool:
        """Whether there is something."""
        if self._future is not None:
            return await self._future
        import trio

        with trio.move_on_after(self._seconds):
            await trio.lowlevel.wait_readable(self._sock)
            return True
        return False

    def __exit__(self, *_: object) -> None:
        if self._future is not None and self._timer is not None:
            self._timer.cancel()
            self._future.get_loop().remove_reader(self._sock)


def soon(function: Callable[[], object]) -> None:
    """Calls a function in this event loop when the running task pauses next."""
    if sniffio.current_async_library() == "asyncio":
        asyncio.get_running_loop().call_soon(function)
    else:
        import trio

        trio.lowlevel.current_trio_token().run_sync_soon(function)
