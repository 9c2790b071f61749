"""Pool.map: thousands of jobs through one pool, a bounded number of them in memory.

The workers belong to the event loop, not to a task group around the consumer: nothing may be held
open over a `yield`, and a loop left by `break` looks like one that goes on. So the iterator ends
them, when it is exhausted, closed, cancelled, or forgotten.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeAlias

import anyio
from anyio import CancelScope

from isojob._job import StrOrBytesPath
from isojob._loop import from_threads, spawn
from isojob._options import RunOptions, check_options
from isojob._shield import shielded
from isojob.result import Result

__all__ = ["JobLike", "Results", "arguments"]

JobLike: TypeAlias = Sequence[StrOrBytesPath] | Mapping[str, Any]
"""A command, or the arguments of `Pool.run` by name, with ``command`` among them."""
_KNOWN = RunOptions.__optional_keys__ | {"command", "limits", "check"}


def arguments(job: JobLike, call: str) -> dict[str, Any]:
    """A job's arguments by name.

    Raises:
        TypeError: It has no command, or something that `Pool.run` does not take.
    """
    if not isinstance(job, Mapping):
        return {"command": job}
    if "command" not in job:
        raise TypeError("a job without a command")
    check_options(f"a job of {call}", job, _KNOWN)
    return dict(job)


class _Work:
    """What workers and iterator share; it does not hold the iterator, so that can be forgotten."""

    def __init__(
        self,
        run: Callable[..., Awaitable[Result]],
        jobs: AsyncIterable[JobLike] | Iterable[JobLike],
        room: int,
    ) -> None:
        self.run = run
        self.room = room
        self.changed = anyio.Event()
        self.done: dict[int, Result] = {}
        self.given = 0
        self.workers = 0
        self.cancelled = False
        self.failure: BaseException | None = None
        self._taken = 0
        self._exhausted = False
        self._source = jobs.__aiter__() if isinstance(jobs, AsyncIterable) else iter(jobs)
        self._turn = anyio.Lock()
        self._scopes: list[CancelScope] = []

    def change(self) -> None:
        """Wakes everybody who waits for something to be different."""
        self.changed.set()
        self.changed = anyio.Event()

    def cancel(self) -> None:
        """Takes no more jobs and ends those that run."""
        self._exhausted = self.cancelled = True
        for scope in self._scopes:
            scope.cancel()

    async def _take(self) -> tuple[int, JobLike] | None:
        """The next job, as soon as there is room for its result."""
        async with self._turn:
            while self._taken - self.given >= self.room and not self._exhausted:
                await self.changed.wait()
            if self._exhausted:
                return None
            try:
                if isinstance(self._source, AsyncIterator):
                    job = await anext(self._source)
                else:
                    job = next(self._source)
            except (StopIteration, StopAsyncIteration):
                self._exhausted = True
                return None
            self._taken += 1
            return self._taken - 1, job

    async def worker(self) -> None:
        """Runs one job after the other, until there are no more or one raises."""
        scope = CancelScope()
        self._scopes.append(scope)
        try:
            with scope:
                if self._exhausted:
                    return
                while (taken := await self._take()) is not None:
                    index, job = taken
                    try:
                        self.done[index] = await self.run(**arguments(job, "map"), index=index)
                    except Exception as error:
                        error.add_note(f"job {index} of Pool.map")
                        raise
                    self.change()
        except BaseException as error:  # noqa: BLE001 - the iterator raises it
            self.failure = self.failure or error
            self.cancel()

    def ended(self) -> None:
        """One worker less."""
        self.workers -= 1
        self.change()

    async def close_source(self) -> None:
        """An async generator that is left early wants to be told; by one task at a time."""
        async with self._turn:
            if self.cancelled and isinstance(self._source, AsyncGenerator):
                await self._source.aclose()


class Results(AsyncIterator[Result]):
    """The results of `Pool.map`, as they come or in the order of the jobs.

    Iterate it in the event loop where the first result is awaited. To end it early for certain, use
    it as an async context manager or call `aclose`; one that is simply dropped ends its jobs, too,
    but nobody waits for that.
    """

    def __init__(
        self,
        run: Callable[..., Awaitable[Result]],
        jobs: AsyncIterable[JobLike] | Iterable[JobLike],
        *,
        ordered: bool,
        workers: int,
    ) -> None:
        self._arguments = (run, jobs, 2 * workers)
        self._ordered = ordered
        self._workers = workers
        self._work: _Work | None = None
        self._soon: Callable[[Callable[[], object]], object] | None = None
        self._tasks: list[object] = []
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        if self._closed:
            raise StopAsyncIteration
        try:
            return await self._next(self._work or self._start())
        except BaseException:
            await self.aclose()
            raise

    def _start(self) -> _Work:
        work = self._work = _Work(*self._arguments)
        self._soon = from_threads()
        work.workers = self._workers
        self._tasks = [spawn(work.worker, work.ended) for _ in range(self._workers)]
        return work

    async def _next(self, work: _Work) -> Result:
        while True:
            if work.failure is not None:
                raise work.failure
            index = work.given if self._ordered else next(iter(work.done), -1)
            if index in work.done:
                result = work.done.pop(index)
                work.given += 1
                work.change()
                return result
            if work.workers == 0:
                if work.cancelled:
                    raise RuntimeError("the iterator was closed by another task")
                raise StopAsyncIteration
            await work.changed.wait()

    async def aclose(self) -> None:
        """Ends the jobs that run and waits until nothing of them is left. Idempotent."""
        self._closed = True
        work = self._work
        if work is None:
            return
        if work.workers > 0:  # else it may be at its ordinary end, which others are still to see
            work.cancel()

        async def ended() -> None:
            while work.workers > 0:
                await work.changed.wait()

        try:
            await shielded(ended)
        finally:
            await shielded(work.close_source)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None and work.workers > 0 and self._soon is not None:
            with suppress(RuntimeError):  # that loop is gone, and with it its tasks
                self._soon(work.cancel)
