"""One way of running a job, in a process of its own that `run.py` asks job by job.

    python bench/worker.py WAY JOB [PREFIX...]

Commands on stdin, one a line, one line of JSON back for each::

    once               nanoseconds of one job; isojob adds the phases that `Evidence` tells
    many K SECONDS     jobs per second, K in flight
    cpu K JOBS         nanoseconds of CPU that one job costs the loop's thread, K in flight

Ways: ``subprocess.run``; ``asyncio``, ``asyncio-threads`` and ``uvloop``: `create_subprocess_exec`
and `communicate` with the pidfd watcher, one thread a child, and uvloop's own; ``trio``:
`trio.run_process`; ``isojob``, ``isojob-uvloop``, ``isojob-trio``: `Pool.run`; ``isojob-dry``: the
same without parked cells; ``sandlock``: its Python API. PREFIX is a peer's command line, put before the job's.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio

HELLO = '#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n'
JOBS: dict[str, list[str]] = {
    "true": ["/bin/true"],
    "c": ["./hello"],
    "python": ["/usr/bin/python3", "-I", "-S", "-c", "print(1)"],
    "output": ["head", "-c", "1M", "/dev/zero"],
    "compile": ["gcc", "-O0", "-o", "a.out", "hello.c"],
}
"""What is run; ``c`` and ``compile`` find ``hello`` and ``hello.c`` where they start."""

Once = Callable[[], Awaitable[dict[str, int]]]


def prepare(job: str, directory: Path) -> None:
    """Puts there what the job needs."""
    if job in ("c", "compile"):
        (directory / "hello.c").write_text(HELLO)
    if job == "c":
        subprocess.run(["gcc", "-O2", "-o", "hello", "hello.c"], cwd=directory, check=True)


def with_subprocess(command: list[str], directory: Path) -> Once:
    """`subprocess.run`, which blocks."""

    async def once() -> dict[str, int]:
        start = time.perf_counter_ns()
        subprocess.run(command, capture_output=True, check=True, cwd=directory)
        return {"total": time.perf_counter_ns() - start}

    return once


def with_asyncio(command: list[str], directory: Path) -> Once:
    """What is written without isojob."""

    async def once() -> dict[str, int]:
        start = time.perf_counter_ns()
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
        )
        _, errors = await process.communicate()
        taken = time.perf_counter_ns() - start
        if process.returncode != 0:
            raise RuntimeError(f"{command}: {process.returncode} {errors!r}")
        return {"total": taken}

    return once


def with_trio(command: list[str], directory: Path) -> Once:
    """The same on trio."""
    import trio

    async def once() -> dict[str, int]:
        start = time.perf_counter_ns()
        await trio.run_process(command, capture_stdout=True, capture_stderr=True, cwd=directory)
        return {"total": time.perf_counter_ns() - start}

    return once


def with_sandlock(command: list[str], directory: Path) -> Once:
    """Its Python API, which blocks, in a thread."""
    sandlock = importlib.import_module("sandlock")
    readable = [path for path in ("/usr", "/lib", "/lib64", "/bin", "/etc") if Path(path).exists()]
    box = sandlock.Sandbox(
        fs_readable=[*readable, str(directory)],
        fs_writable=["/tmp"],
        max_memory="512M",
        max_processes=50,
    )

    async def once() -> dict[str, int]:
        start = time.perf_counter_ns()
        result = await anyio.to_thread.run_sync(lambda: box.run(command, timeout=10))
        taken = time.perf_counter_ns() - start
        if not result.success:
            raise RuntimeError(f"{command}: {result}")
        return {"total": taken}

    return once


def with_isojob(pool: Any, job: str, command: list[str], directory: Path) -> Once:
    """One job through isojob, and where its time went."""
    files = {path.name: path for path in directory.iterdir()} or None
    phases = ("queue", "lease", "send", "prepare", "wall", "teardown", "reply")

    async def once() -> dict[str, int]:
        start = time.perf_counter_ns()
        result = await pool.run(command, files=files)
        taken = time.perf_counter_ns() - start
        if not result.ok:
            raise RuntimeError(f"{job}: {result} {result.stderr!r}")
        times = {phase: getattr(result.evidence, f"{phase}_ns") for phase in phases}
        return {"total": taken, **times, "rest": taken - sum(times.values())}

    return once


async def many(once: Once, at_once: int, seconds: float) -> float:
    """Jobs per second with so many in flight."""
    done = 0
    start = time.perf_counter()

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() - start < seconds:
            await once()
            done += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(worker)
    return done / (time.perf_counter() - start)


async def cpu(once: Once, at_once: int, jobs: int) -> float:
    """Nanoseconds of CPU of this thread for each job."""
    left = jobs

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await once()

    start = time.thread_time_ns()
    async with anyio.create_task_group() as tasks:
        for _ in range(at_once):
            tasks.start_soon(worker)
    return (time.thread_time_ns() - start) / jobs


async def serve(once: Once) -> None:
    """Answers stdin until it ends. Blocking reads: between two jobs nothing here runs."""
    await anyio.sleep(0.05)
    for line in sys.stdin:
        name, *numbers = line.split()
        answer: object
        if name == "once":
            answer = await once()
        elif name == "many":
            answer = await many(once, int(numbers[0]), float(numbers[1]))
        else:
            answer = await cpu(once, int(numbers[0]), int(numbers[1]))
        print(json.dumps(answer), flush=True)
        # Its turn is over: what is left to do (cells to be made) is done while others sleep.
        await anyio.sleep(0.001)


async def isolated(way: str, job: str, directory: Path) -> None:
    """The worker of one of isojob's ways."""
    import isojob

    parked = 0 if way == "isojob-dry" else None
    async with isojob.Pool(max_jobs=32, parked=parked) as pool:
        await serve(with_isojob(pool, job, JOBS[job], directory))


def main() -> None:
    """Runs the worker that the arguments name."""
    way, job, *prefix = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(job, directory)
        command = [*prefix, *JOBS[job]]
        backend, options = "asyncio", {}
        if way.endswith("trio"):
            backend = "trio"
        elif way.endswith("uvloop"):
            options = {"use_uvloop": True}
        elif way == "asyncio" and sys.version_info < (3, 12):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
        if way.startswith("isojob"):
            anyio.run(isolated, way, job, directory, backend=backend, backend_options=options)
            return
        make = {
            "subprocess.run": with_subprocess,
            "trio": with_trio,
            "sandlock": with_sandlock,
        }.get(way, with_asyncio)
        anyio.run(serve, make(command, directory), backend=backend, backend_options=options)


if __name__ == "__main__":
    main()
