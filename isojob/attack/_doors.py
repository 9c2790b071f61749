"""The ways in which the jobs of an attack are let in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import anyio

from isojob._pool import Pool
from isojob._python import PythonPool
from isojob.attack._attack import Door
from isojob.errors import IsojobError
from isojob.limits import Limits
from isojob.mounts import Mount, Root
from isojob.result import Result

__all__ = ["DOORS", "Asked", "Enter", "warm_door"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The jobs of one attack.

    Attributes:
        command: Of the one that is judged.
        before: Of a job that ends before; empty for none.
        beside: Of a job that runs meanwhile.
        limits: Of each.
        keep: In a session, whether what `before` did is kept.
        collect: Read back from the one that is judged.
        rest: What each is given besides.
    """

    command: Sequence[str]
    before: Sequence[str]
    beside: Sequence[str]
    limits: Limits
    keep: bool
    collect: tuple[str, ...]
    rest: dict[str, Any]


async def _alone(pool: Pool, asked: Asked) -> Result:
    """Jobs that have nothing in common."""

    async def run(command: Sequence[str], **options: Any) -> Result:
        return await pool.run(command, limits=asked.limits, **asked.rest, **options)

    return await _in_turn(asked, run, run, run)


async def _session(pool: Pool, asked: Asked) -> Result:
    """Jobs of one session."""
    async with pool.session(files=asked.rest.get("files"), limits=asked.limits) as session:

        async def first(command: Sequence[str]) -> Result:
            return await session.run(command, keep=asked.keep, **asked.rest)

        async def view(command: Sequence[str], **options: Any) -> Result:
            return await session.run(command, keep=False, **asked.rest, **options)

        return await _in_turn(asked, first, view, view)


async def _writable(pool: Pool, asked: Asked) -> Result:
    """Jobs on a root that they may write to; afterwards it is looked at from outside."""
    directory = Path(await anyio.to_thread.run_sync(tempfile.mkdtemp, "", "isojob-attack-"))
    try:
        root = directory / "root"
        mounts = await anyio.to_thread.run_sync(_lay_out, root)
        sandbox = pool.sandbox.model_copy(
            update={
                "root": Root.directory(root, writable=True),
                "mounts": (*mounts, *pool.sandbox.mounts),
            }
        )
        before = sorted(map(str, root.rglob("*")))
        async with Pool(sandbox, asked.limits, max_jobs=2, parked=0) as own:
            result = await _alone(own, asked)
        if sorted(map(str, root.rglob("*"))) != before or (root / _PASSWD).read_text() != _ACCOUNTS:
            line = b"ESCAPED the directory that the root was made from\n"
            result = result.model_copy(update={"stdout": (result.stdout or b"") + line})
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(shutil.rmtree, directory)
    return result


_PASSWD, _ACCOUNTS = "etc/passwd", "root:x:0:0::/root:/bin/sh\n"


def _lay_out(root: Path) -> list[Mount]:
    """The host's programs, bound into a small root of its own."""
    mounts = [Mount.bind("/usr", "/usr")]
    root.parent.chmod(0o755)
    for name in (_PASSWD, "root/.profile"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(_ACCOUNTS)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if (host := Path("/", name)).is_symlink():
            (root / name).symlink_to(os.readlink(host))
        elif host.is_dir():
            mounts.append(Mount.bind(host, f"/{name}"))
    return mounts


async def _in_turn(
    asked: Asked,
    first: Callable[[Sequence[str]], Awaitable[Result]],
    meanwhile: Callable[..., Awaitable[Result]],
    last: Callable[..., Awaitable[Result]],
) -> Result:
    reached = b""
    if asked.before:
        result = await first(asked.before)
        if not result.ok:  # it has not done what the other looks for
            return result
        reached = _escapes(result.stdout or b"")
    if not asked.beside:
        return _with(reached, await last(asked.command, collect=asked.collect))
    answer: Result | IsojobError | None = None
    early: Result | IsojobError | None = None
    reading, writing = os.pipe()

    async def beside() -> None:
        nonlocal early
        try:
            early = await meanwhile(asked.beside, stdout=writing)
        except IsojobError as error:  # as it is, not in a group
            early = error
        finally:
            os.close(writing)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beside)
            reached += _escapes(await anyio.to_thread.run_sync(_until_ready, reading))
            try:
                answer = await last(asked.command, collect=asked.collect)
            except IsojobError as error:
                answer = error
            tasks.cancel_scope.cancel()
    finally:
        os.close(reading)
    if early is not None:  # it was to stay until it is cancelled
        answer = early
    if isinstance(answer, IsojobError):
        raise answer
    assert answer is not None
    return _with(reached, answer)


def _escapes(said: bytes) -> bytes:
    """What a job that is not judged by itself has reached."""
    return b"".join(line for line in said.splitlines(True) if line.startswith(b"ESCAPED "))


def _with(reached: bytes, result: Result) -> Result:
    if not reached:
        return result
    return result.model_copy(update={"stdout": reached + (result.stdout or b"")})


def _until_ready(reading: int) -> bytes:
    """What the one beside says until it is ready, or gone."""
    said = b""
    with open(reading, "rb", closefd=False) as lines:
        while (line := lines.readline()) not in (b"READY\n", b""):
            said += line
    return said


async def _terminal(pool: Pool, asked: Asked) -> Result:
    """A job on a terminal of its own."""
    rest = {name: value for name, value in asked.rest.items() if name != "input"}
    said = bytearray()
    async with pool.open(
        asked.command, limits=asked.limits, pty=True, collect=asked.collect, **rest
    ) as process:
        assert process.stdout is not None
        async for piece in process.stdout:
            said += piece
        result = await process.result()
    return result.model_copy(update={"stdout": bytes(said)})


async def _pair(pool: Pool, asked: Asked, transcript: int = 0) -> Result:
    """Two jobs that are joined by pipes; what the first says comes by its stderr."""
    given = _by_stderr(asked)
    found = await pool.run_pair(
        asked.command,
        asked.beside,
        limits=asked.limits,
        interactor_limits=asked.limits,
        collect=asked.collect,
        transcript=transcript,
        **given,
        **{f"interactor_{name}": value for name, value in given.items()},
    )
    return _unharmed(found.solution, found.interactor)


async def _relayed(pool: Pool, asked: Asked) -> Result:
    """The same, and the host passes on what they say."""
    return await _pair(pool, asked, transcript=1000)


async def _ring(pool: Pool, asked: Asked) -> Result:
    """Three jobs, each with a pipe to the next."""
    given = {"limits": asked.limits, **_by_stderr(asked)}
    result, *others = await pool.run_group(
        [
            {"command": asked.command, "collect": asked.collect, **given},
            {"command": asked.beside, **given},
            {"command": asked.beside, **given},
        ],
        [(0, 1), (1, 2), (2, 0)],
    )
    return _unharmed(result, *others)


def _by_stderr(asked: Asked) -> dict[str, Any]:
    return {"files": asked.rest["files"], "env": {**asked.rest["env"], "ISOJOB_SAY": "2"}}


def _unharmed(result: Result, *others: Result) -> Result:
    lines = [f"ESCAPED to a partner: {one}\n".encode() for one in others if not one.ok]
    return result.model_copy(update={"stdout": b"".join((result.stderr or b"", *lines))})


def warm_door(python: PythonPool) -> Enter:
    """Jobs that are forks of a warm interpreter."""

    async def enter(_: Pool, asked: Asked) -> Result:
        rest = dict(asked.rest)
        programs = rest["files"]

        async def run(command: Sequence[str], **options: Any) -> Result:
            at = next(n for n, word in enumerate(command) if word in programs)
            source, args = programs[command[at]], command[at + 1 :]
            return await python.run_python(
                source, args=args, limits=asked.limits, **rest, **options
            )

        return await _in_turn(asked, run, run, run)

    return enter


Enter: TypeAlias = Callable[[Pool, Asked], Awaitable[Result]]

DOORS: dict[Door, Enter] = {
    "alone": _alone,
    "session": _session,
    "writable": _writable,
    "terminal": _terminal,
    "pair": _pair,
    "relayed": _relayed,
    "ring": _ring,
}
