"""What is measured in this process: streams, parked cells, and a fresh interpreter's first job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import anyio

import isojob


async def parked_cell(count: int) -> float:
    """Megabytes that one parked cell takes from the machine's free memory."""

    def available() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemFree"))

    async with isojob.Pool(parked=count) as pool:
        before = available()
        await pool.run(["/bin/true"])
        while pool.statistics().parked < count:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.1)
        await anyio.sleep(2 + count / 500)
        return (before - available()) / count / 1024


def plain_pipe(command: list[str], data: bytes | None) -> None:
    """The same program on a pipe, in blocking calls: as fast as it gets."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE if data else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        if data is not None and process.stdin is not None:
            left = memoryview(data)
            while left:
                left = left[os.write(process.stdin.fileno(), left[: 1 << 20]) :]
            process.stdin.close()
        chunks = []
        while chunk := os.read(process.stdout.fileno(), 1 << 18):
            chunks.append(chunk)


async def streams(megabytes: int) -> dict[str, dict[str, float]]:
    """Megabytes per second out of and into a job, and through a plain pipe; the best of three."""
    async with isojob.Pool() as pool:
        return await _streams(pool, megabytes)


async def _streams(pool: isojob.Pool, megabytes: int) -> dict[str, dict[str, float]]:
    unlimited = isojob.Limits(output=None, cpu_time=None)
    data = bytes(megabytes << 20)
    rows: dict[str, dict[str, float]] = {}
    for name, command, fed in (
        ("output", ["head", "-c", f"{megabytes}M", "/dev/zero"], None),
        ("input", ["wc", "-c"], data),
    ):
        best = {"plain pipe": 0.0, "isojob": 0.0}
        for _ in range(3):
            start = time.perf_counter()
            plain_pipe(command, fed)
            best["plain pipe"] = max(best["plain pipe"], megabytes / (time.perf_counter() - start))
            start = time.perf_counter()
            assert (await pool.run(command, input=fed, limits=unlimited)).ok
            best["isojob"] = max(best["isojob"], megabytes / (time.perf_counter() - start))
        rows[name] = best
    return rows


def first_call() -> dict[str, float]:
    """Milliseconds of import and first job in a fresh process."""
    code = (
        "import time; a = time.perf_counter(); import isojob; b = time.perf_counter();"
        "isojob.run_isolated_sync(['/bin/true']); c = time.perf_counter();"
        "print((b - a) * 1e3, (c - b) * 1e3)"
    )
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    imported, first = (sorted(column)[len(runs) // 2] for column in zip(*runs, strict=True))
    return {
        "import isojob, ms": imported,
        "of that asyncio, anyio, pydantic, ms": _imports_of_others(),
        "first job, ms": first,
    }


def _imports_of_others() -> float:
    code = (
        "import time; a = time.perf_counter(); import asyncio, anyio, pydantic, pydantic.types,"
        "pydantic.main; print((time.perf_counter() - a) * 1e3)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-P", "-c", code], capture_output=True, check=True
            ).stdout
        )
        for _ in range(5)
    ]
    return sorted(runs)[2]
