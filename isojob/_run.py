"""run_isolated: one call, on a pool that the process keeps for it."""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import anyio

from isojob._job import CAPTURE, DEVNULL, Content, StdioArg, StrOrBytesPath
from isojob._pool import Pool
from isojob._shield import in_thread
from isojob.limits import Limits
from isojob.result import Result
from isojob.sandbox import Sandbox

__all__ = ["run_isolated", "run_isolated_sync"]

MAX_POOLS = 8

_lock = threading.Lock()
_pools: OrderedDict[Sandbox, Pool] = OrderedDict()


def _default_pool(sandbox: Sandbox) -> tuple[Pool, list[Pool]]:
    """The process-wide pool of a sandbox, and those it displaced: the longest unused, if idle."""
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


def _close_pools() -> None:
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    _close_all(pools)


def _close_all(pools: list[Pool]) -> None:
    for pool in pools:
        pool.close()


def _after_fork_in_child() -> None:
    # The lock may have been held by a thread that the child does not have.
    global _lock
    _lock = threading.Lock()


atexit.register(_close_pools)
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
            read back into ``result.files`` when every process is dead.
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
    if sandbox is not None and not isinstance(sandbox, Sandbox):
        raise TypeError(f"sandbox must be isojob.Sandbox, not {type(sandbox).__name__}")
    pool, displaced = _default_pool(Sandbox() if sandbox is None else sandbox)
    try:
        if displaced:
            await in_thread(partial(_close_all, displaced))
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
    finally:
        with _lock:
            pool.pins -= 1


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
