"""Runs a command in a container image, as ``docker run --rm`` does, on a root it may write to.

    python examples/container.py IMAGE [ARGUMENT...]

IMAGE is what ``docker save``, ``skopeo copy ... oci-archive:`` or ``umoci`` made, or a directory
with a root file system (``debootstrap``). It is unpacked once, into a store. What is behind it are arguments
for the image's entry point, if it has one. On a terminal the job gets one, too: try ``sh``.

Needs nothing but isojob.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio.abc import ByteReceiveStream

from isojob import Image, IsolatedProcess, Limits, Result, Root, Sandbox, open_isolated

LIMITS = Limits(
    cpu_time=600, wall_time=3600, memory="1GiB", disk="512MiB", inodes=100_000, output="64MiB"
)


def understand(path: Path, command: list[str]) -> tuple[Sandbox, list[str], str]:
    """The sandbox, what to run in it, and where."""
    if path.is_dir() and not (path / "oci-layout").exists():
        return Sandbox(root=Root.directory(path.resolve(), writable=True)), command, "/"
    image = Image.load(path)
    return image.sandbox(writable=True), image.command(*command), image.workdir


async def show(stream: ByteReceiveStream | None, out: BinaryIO) -> None:
    """What the job says, as it comes."""
    if stream is not None:
        async for piece in stream:
            out.write(piece)
            out.flush()


async def typed() -> bytes:
    """What comes next on our stdin; nothing at its end."""
    with suppress(PermissionError):  # of epoll(7): a regular file is always ready
        await anyio.wait_readable(sys.stdin)
    return os.read(sys.stdin.fileno(), 65536)


async def answer(process: IsolatedProcess) -> None:
    """What is typed, to the job, until its end or that of the input."""
    assert process.stdin is not None
    with suppress(anyio.BrokenResourceError):  # it does not read any more
        while data := await typed():
            await process.stdin.send(data)
        await process.stdin.aclose()


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Keys go to the job's terminal as they are typed; that one echoes them."""
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def converse(process: IsolatedProcess) -> Result:
    """Passes everything on, until its end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer, process)
        async with anyio.create_task_group() as streams:
            streams.start_soon(show, process.stdout, sys.stdout.buffer)
            streams.start_soon(show, process.stderr, sys.stderr.buffer)
        tasks.cancel_scope.cancel()
    return await process.result()


async def run(path: Path, command: list[str]) -> Result:
    """Runs it, on a terminal of its own if we have one."""
    sandbox, command, workdir = understand(path, command)
    if not command:
        raise SystemExit("this image has no entry point: give a command")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        async with open_isolated(command, sandbox=sandbox, limits=LIMITS, cwd=workdir) as process:
            return await converse(process)
    columns, rows = shutil.get_terminal_size()
    with raw_terminal():
        async with open_isolated(
            command, sandbox=sandbox, limits=LIMITS, cwd=workdir, pty=(rows, columns)
        ) as process:
            return await converse(process)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", type=Path, help="an image, or a directory with a root file system")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run in it, with arguments"
    )
    arguments = parser.parse_args()
    result = anyio.run(run, arguments.image, arguments.command)
    if not result.ok:
        print(result, file=sys.stderr)
    code = result.returncode
    raise SystemExit(code if code >= 0 else 128 - code)  # as a shell says it


if __name__ == "__main__":
    main()
