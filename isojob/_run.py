"""run_isolated: one call, on a pool that the process keeps for it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio

from isojob._job import CAPTURE, DEVNULL, Content, StdioArg, StrOrBytesPath
from isojob._map import JobLike
from isojob._pair import Pair, PairResult, Place
from isojob._pool import Pool
from isojob._process import PIPE, IsolatedProcess
from isojob._shield import in_thread
from isojob._shutdown import each, refuse_late
from isojob.limits import Limits
from isojob.result import Result
from isojob.sandbox import Sandbox

__all__ = ["open_isolated", "run_group", "run_isolated", "run_isolated_sync", "run_pair"]

MAX_POOLS = 8

# Reentrant: allocating under it may collect garbage, and that an abandoned call, which unpins.
_lock = threading.RLock()
_pools: OrderedDict[Sandbox, Pool] = OrderedDict()


def _default_pool(sandbox: Sandbox) -> tuple[Pool, list[Pool]]:
    """The process-wide pool of a sandbox, and those it displaced: the longest unused, if idle."""
    refuse_late()
    with _lock:
        pool = _pools.get(sandbox)
        if pool is None:
            pool = _pools[sandbox] = Pool(sandbox)
            pool.open_now()
        _pools.move_to_end(sandbox)
        pool.pins += 1
        displaced = []
        for old in list(_pools):
            if len(_pools) <= MAX_POOLS:
                break
            if not _pools[old].busy and old != sandbox:
                displaced.append(_pools.pop(old))
        return pool, displaced


@asynccontextmanager
async def _pool_of(sandbox: Sandbox | None, name: str = "sandbox") -> AsyncIterator[Pool]:
    """The process-wide pool of a sandbox, held as long as the block lasts.

    Raises:
        TypeError: It is no sandbox; `name` is the argument's.
    """
    if sandbox is not None and not isinstance(sandbox, Sandbox):
        raise TypeError(f"{name} must be isojob.Sandbox, not {type(sandbox).__name__}")
    pool, displaced = _default_pool(Sandbox() if sandbox is None else sandbox)
    try:
        if displaced:
            await in_thread(partial(_close_all, displaced))
        yield pool
    finally:
        with _lock:
            pool.pins -= 1


def _close_pools() -> None:
    """Ends them all; the next call starts another."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    _close_all(pools)


def _close_all(pools: list[Pool]) -> None:
    each(pool.close for pool in pools)


def _after_fork_in_child() -> None:
    # The lock may have been held by a thread that the child does not have.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


async def run_isolated(
    command: Sequence[StrOrBytesPath],
    *,
    limits: Limits | None = None,
    input: bytes | None = None,
    stdin: StdioArg = DEVNULL,
    stdout: StdioArg = CAPTURE,
    stderr: StdioArg = CAPTURE,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    files: Mapping[str, Content] | None = None,
    collect: Sequence[str] = (),
    sandbox: Sandbox | None = None,
    check: bool = False,
) -> Result:
    """Runs an untrusted program in a sandbox of its own and tells how it ended.

    Namespaces, root, cgroup, uid and seccomp filter are fresh for each call. The first call starts
    a zygote for the sandbox; it is kept for the process, so that later calls are fast. Cancelling
    ends the job and returns when all of it is gone. There is no timeout: your patience is a cancel
    scope, the job's allowance is ``limits.wall_time``.

    Args:
        command: Program and arguments; a name without a slash is looked up in the job's PATH.
        limits: What it may use.
        input: Bytes for its stdin. Not reading them all is no error.
        stdin: DEVNULL, or a pipe, socket or regular file opened read-only; never inherited.
        stdout: CAPTURE, DEVNULL, or a writable pipe, socket or file.
        stderr: The same, or STDOUT to merge it into stdout.
        env: Variables over those of the sandbox; the caller's own are never inherited.
        cwd: Absolute directory inside the sandbox; by default the sandbox's ``workdir``.
        files: Written into the working directory before the start: relative names (directories
            are made) to bytes (mode 0644), a Path (its permission bits) or ``(bytes, mode)``.
        collect: Names and patterns (``*``, ``?``, ``[...]``) relative to the working directory,
            read back into ``result.files`` when every process is dead. Names that may hold such
            characters go through `glob.escape`.
        sandbox: What it can see.
        check: Raise `JobFailedError` unless the status is ``ok``.

    Returns:
        The result; a job that fails or runs into a limit is data, not an exception.

    Raises:
        TypeError: An argument of the wrong type, such as a str for the command.
        ValueError: An argument that makes no sense.
        CommandNotFoundError: No such program inside the sandbox.
        CommandNotExecutableError: The program cannot be executed.
        SandboxSetupError: The sandbox could not be set up; the job never ran.
        HostNotSupportedError: The host lacks a protection; tells the cure.
        PoolBrokenError: The zygote or the cell's init was killed under the job.
        JobFailedError: With ``check=True``.
    """
    async with _pool_of(sandbox) as pool:
        return await pool.run(
            command,
            limits=Limits() if limits is None else limits,
            input=input,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            files=files,
            collect=collect,
            check=check,
        )


@asynccontextmanager
async def open_isolated(
    command: Sequence[StrOrBytesPath],
    *,
    limits: Limits | None = None,
    stdin: StdioArg = PIPE,
    stdout: StdioArg = PIPE,
    stderr: StdioArg = PIPE,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    files: Mapping[str, Content] | None = None,
    collect: Sequence[str] = (),
    pty: bool | tuple[int, int] = False,
    sandbox: Sandbox | None = None,
) -> AsyncIterator[IsolatedProcess]:
    r"""Starts an untrusted program to talk to while it runs, in a sandbox of its own.

        async with open_isolated(["bc"], stderr=STDOUT) as process:
            await process.stdin.send(b"6 * 7\n")
            print(await process.stdout.receive())

    An `anyio.abc.Process` whose limits hold as in `run_isolated`. The program runs when the block
    is entered; leaving it ends the job and returns when all of it is gone: wait for
    ``process.result()`` in the block where its own end matters. A stream that is not read holds
    the job up when its pipe is full: redirect what you do not read.

    Args:
        command: As for `run_isolated`.
        limits: As for `run_isolated`.
        stdin: PIPE, DEVNULL, or a pipe, socket or regular file opened read-only.
        stdout: PIPE, DEVNULL, or a writable pipe, socket or file. PIPE: ``limits.output`` bytes
            can be read, more end the job.
        stderr: The same, or STDOUT to merge it into stdout.
        env: As for `run_isolated`.
        cwd: As for `run_isolated`.
        files: As for `run_isolated`.
        collect: As for `run_isolated`.
        pty: Give the job a terminal of its own as all three streams: True, or (rows, columns).
            ``process.stdin`` types on it, ``process.stdout`` is its screen. Closing stdin types
            nothing: the end of a file is ``b"\x04"`` at the beginning of a line.
        sandbox: As for `run_isolated`.

    Raises:
        TypeError, ValueError, CommandNotFoundError, CommandNotExecutableError, SandboxSetupError,
        HostNotSupportedError, PoolBrokenError: As `run_isolated`, when the block is entered.
    """
    async with (
        _pool_of(sandbox) as pool,
        pool.open(
            command,
            limits=Limits() if limits is None else limits,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            cwd=cwd,
            files=files,
            collect=collect,
            pty=pty,
        ) as process,
    ):
        yield process


async def run_pair(
    solution: Sequence[StrOrBytesPath],
    interactor: Sequence[StrOrBytesPath],
    *,
    limits: Limits | None = None,
    interactor_limits: Limits | None = None,
    sandbox: Sandbox | None = None,
    interactor_sandbox: Sandbox | None = None,
    files: Mapping[str, Content] | None = None,
    interactor_files: Mapping[str, Content] | None = None,
    env: Mapping[str, str] | None = None,
    interactor_env: Mapping[str, str] | None = None,
    collect: Sequence[str] = (),
    interactor_collect: Sequence[str] = (),
    idle_time: float | None = None,
    transcript: int = 0,
) -> PairResult:
    """Runs two programs that talk to each other, and can reach each other in no other way.

    Each one's stdout is the other's stdin; what they write to stderr is captured. Both start at
    once, in cells of their own, each with its limits and its verdict. What goes from one to the
    other is not counted by ``limits.output``.

    Args:
        solution: The one command.
        interactor: The other.
        limits: Of the solution.
        interactor_limits: Of the interactor; by default the solution's.
        sandbox: What the solution can see.
        interactor_sandbox: What the interactor can see; by default the same.
        files: Of the solution, as in `run_isolated`.
        interactor_files: Of the interactor.
        env: Of the solution.
        interactor_env: Of the interactor.
        collect: From the solution's working directory.
        interactor_collect: From the interactor's.
        idle_time: Seconds: end both when neither has used any CPU for so long, for each waits for
            the other. None: they wait until a wall time limit ends it.
        transcript: Bytes of what they say to keep. With 0 their pipe is the kernel's own, else
            the host passes each piece on.

    Raises:
        TypeError, ValueError, CommandNotFoundError, CommandNotExecutableError, SandboxSetupError,
        HostNotSupportedError, PoolBrokenError: As `run_isolated`; then the other was ended.
    """
    limits = Limits() if limits is None else limits
    other = sandbox if interactor_sandbox is None else interactor_sandbox
    async with (
        _pool_of(sandbox) as pool,
        _pool_of(other, "interactor_sandbox") as interactor_pool,
    ):
        both = Pair.make(
            solution,
            Place(pool, limits),
            interactor,
            Place(interactor_pool, limits),
            {
                "interactor_limits": interactor_limits,
                "files": files,
                "interactor_files": interactor_files,
                "env": env,
                "interactor_env": interactor_env,
                "collect": collect,
                "interactor_collect": interactor_collect,
                "idle_time": idle_time,
                "transcript": transcript,
            },
        )
        return await both.run()


async def run_group(
    jobs: Sequence[JobLike],
    pipes: Sequence[tuple[int, int]] | None = None,
    *,
    sandbox: Sandbox | None = None,
) -> list[Result]:
    """Runs jobs at once, connected by pipes: `Pool.run_group` on the process-wide pool.

    Args:
        jobs: Commands, or mappings with the arguments of `run_isolated` but for `sandbox`.
        pipes: As for `Pool.run_group`.
        sandbox: What they can see.

    Raises:
        TypeError: What is no job, or no pipe.
        ValueError: More jobs than slots, or pipes that make no sense.
        IsojobError: A job could not be run: the others were ended.
    """
    async with _pool_of(sandbox) as pool:
        return await pool.run_group(jobs, pipes)


def run_isolated_sync(
    command: Sequence[StrOrBytesPath], *, timeout: float | None = None, **options: Any
) -> Result:
    """`run_isolated` for code without an event loop.

    Args:
        command: As for `run_isolated`.
        timeout: Seconds of your patience; the job is ended when they are over.
        **options: The other arguments of `run_isolated`.

    Raises:
        TimeoutError: The patience is over.
        RuntimeError: Called from a running event loop: await `run_isolated` there.
    """

    async def call() -> Result:
        with anyio.fail_after(timeout):
            return await run_isolated(command, **options)

    return anyio.run(partial(call))
