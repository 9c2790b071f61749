"""Whose turn it is on a session's directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

__all__ = ["Turns"]


class Turns:
    """Many may read, or one write; who wants to write is next."""

    def __init__(self) -> None:
        self._readers = 0
        self._writing = False
        self._writers = 0
        self._changed = anyio.Event()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """A reader's. Not within another: a writer that waits between would stop both."""
        while self._writing or self._writers:
            await self._changed.wait()
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._change()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A writer's."""
        self._writers += 1
        try:
            while self._writing or self._readers:
                await self._changed.wait()
            self._writing = True
        finally:
            self._writers -= 1
            self._change()
        try:
            yield
        finally:
            self._writing = False
            self._change()
