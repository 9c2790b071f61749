"""Runs one job in the foreground: its output appears while it runs, and signals end it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
from anyio.abc import TaskStatus

from isojob._job import CAPTURE, DEVNULL
from isojob._pool import Pool
from isojob._streams import Meter
from isojob.cli._relay import Feed, Relay
from isojob.limits import Limits
from isojob.result import Result, Status
from isojob.sandbox import Sandbox
from isojob.verdict import verdict

if TYPE_CHECKING:
    from isojob._account import Outcome
    from isojob._lease import Lease

__all__ = ["Foreground", "Request"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Request:
    """What ``isojob run`` was asked for."""

    command: Sequence[str]
    limits: Limits
    sandbox: Sandbox
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    collect: Sequence[str] = ()
    interactive: bool = False
    capture: bool = False


class Foreground:
    """One job with our own standard streams, or with its output in the result; its `Attended`.

    The library ends a job over its output limit only where it captures the output, so here the
    relays count. Whatever ends the job (too much output, Ctrl-C), init is asked to, so that its
    report still comes and the account is whole; a second signal does not wait for it. A job that
    has not started is given up, without one.

    Attributes:
        signal: The first signal that asked us to end, or SIGPIPE if nobody reads our output.
        write_error: Why our own stdout or stderr took no more; this ended the job.
        read_error: Why our own stdin could not be read to its end.
    """

    out: Meter | None = None
    err: Meter | None = None
    terminal = False

    def __init__(self, request: Request) -> None:
        self._request = request
        self._pool = Pool(request.sandbox, request.limits, max_jobs=1, parked=0)
        self._scope: anyio.CancelScope
        self._lease: Lease | None = None
        self._is_started = False
        self._relays: dict[Literal["stdout", "stderr"], Relay] = {}
        self._feed: Feed | None = None
        self._result: Result | None = None
        self._error: Exception | None = None
        self.signal: signal.Signals | None = None
        self.write_error: OSError | None = None

    async def run(self) -> Result | None:
        """Runs the job.

        Returns:
            The result, or None if a signal came before the job started.

        Raises:
            IsojobError: The job never ran.
            ValueError: An argument that makes no sense.
            OSError: One of ``files`` cannot be read.
        """
        self._scope = anyio.CancelScope()
        with ExitStack() as stack:
            if not self._request.capture:
                for fd, name in ((1, "stdout"), (2, "stderr")):
                    relay = Relay(fd, self._request.limits.output, self._stop, self._broken)
                    stack.callback(relay.close)
                    self._relays["stdout" if name == "stdout" else "stderr"] = relay
            if self._request.interactive:
                self._feed = Feed(0)
                stack.callback(self._feed.close)
            async with anyio.create_task_group() as tasks:
                await tasks.start(self._watch_signals, tasks.cancel_scope)
                if self._feed is not None:
                    tasks.start_soon(self._feed.pump)
                async with anyio.create_task_group() as relaying:
                    for relay in self._relays.values():
                        relaying.start_soon(relay.pump)
                    await self._job()
                    for relay in self._relays.values():
                        relay.close_write()
                tasks.cancel_scope.cancel()
        if self._error is not None:
            raise self._error
        return None if self._result is None else self._amend(self._result)

    @property
    def read_error(self) -> OSError | None:
        return None if self._feed is None else self._feed.error

    async def _job(self) -> None:
        request = self._request
        streams: dict[str, Any] = {
            name: self._relays[name].write_end if name in self._relays else CAPTURE
            for name in ("stdout", "stderr")
        }
        try:
            with self._scope:
                async with self._pool:
                    job = self._pool.job(
                        request.command,
                        None,
                        stdin=DEVNULL if self._feed is None else self._feed.given,
                        env=request.env,
                        cwd=request.cwd,
                        files=request.files,
                        collect=request.collect,
                        **streams,
                    )
                    job.attended = self
                    self._result = await self._pool.perform(job)
        except Exception as error:  # noqa: BLE001 - raised by run, not as part of a group
            self._error = error

    async def _watch_signals(
        self, everything: anyio.CancelScope, *, task_status: TaskStatus[None]
    ) -> None:
        with anyio.open_signal_receiver(*_SIGNALS) as received:
            task_status.started()
            async for number in received:
                if self.signal is None:
                    self.signal = number
                    self._stop()
                else:
                    # Also out of a write that nobody takes.
                    everything.cancel()

    def _broken(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self.signal = self.signal or signal.SIGPIPE
        else:
            self.write_error = error
        self._stop()

    def began(self, lease: Lease, outcome: Outcome) -> None:
        """See `Attended`."""
        del outcome
        self._lease = lease

    def started(self) -> None:
        """See `Attended`."""
        self._is_started = True

    def ended(self) -> None:
        """See `Attended`."""

    def _stop(self) -> None:
        # A cell that is told to stop while it is made fails, and the job would begin in another.
        # What has come of the output may be known before the start is.
        started = self._is_started or any(relay.total for relay in self._relays.values())
        if self._lease is not None and started:
            self._lease.stop()
        else:
            self._scope.cancel()

    def _amend(self, result: Result) -> Result:
        """Tells the result what only the relays know."""
        counts: dict[str, Any] = {}
        for name, relay in self._relays.items():
            counts[f"{name}_bytes"] = relay.total
            counts[f"{name}_exceeded"] = relay.exceeded
        if not counts:
            return result
        if result.status is Status.KILLED and any(
            relay.exceeded for relay in self._relays.values()
        ):
            counts["stop"] = "output"
        evidence = result.evidence.model_copy(update=counts)
        return result.model_copy(
            update={
                "evidence": evidence,
                "status": verdict(evidence),
                "stdout_truncated": evidence.stdout_exceeded,
                "stderr_truncated": evidence.stderr_exceeded,
            }
        )
