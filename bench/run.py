"""Latency and throughput of isolated jobs, as ratios to bare process creation in the same run.

    make bench                      or  python bench/run.py [--jobs N] [--seconds S] [--json]

Baselines: ``vfork+exec`` in C with captured pipes (the floor), and what one writes without
isolation: ``asyncio.create_subprocess_exec`` + ``communicate`` with the pidfd watcher (the default
since Python 3.12), ``trio.run_process``. All take turns, job by job, so that the neighbours of a
shared machine disturb all alike; p50 and p99 of each, and the ratio of the p50s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import trio

import isojob

JOB = ["/bin/true"]
Once = Callable[[], Awaitable[float]]


class Floor:
    """The C program that does nothing but vfork and exec."""

    def __init__(self, directory: Path) -> None:
        source, binary = Path(__file__).parent / "vforkexec.c", directory / "vforkexec"
        subprocess.run(["gcc", "-O2", "-o", binary, source], check=True)
        self.process = subprocess.Popen(
            [binary, *JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def once(self) -> float:
        """Seconds of one job, by its own clock."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        nanoseconds, status = self.process.stdout.readline().split()
        assert status == "0"
        return int(nanoseconds) / 1e9

    def close(self) -> None:
        """Ends it."""
        self.process.communicate()


async def asyncio_exec() -> float:
    """What is written without isojob."""
    start = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *JOB, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    await process.communicate()
    assert process.returncode == 0
    return time.perf_counter() - start


async def trio_run() -> float:
    """The same on trio."""
    start = time.perf_counter()
    await trio.run_process(JOB, capture_stdout=True, capture_stderr=True)
    return time.perf_counter() - start


def isolated(pool: isojob.Pool) -> Once:
    """One job through isojob."""

    async def once() -> float:
        start = time.perf_counter()
        result = await pool.run(JOB)
        taken = time.perf_counter() - start
        assert result.ok, result
        return taken

    return once


def quantiles(samples: list[float]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    ordered = sorted(samples)
    return {
        "p50": ordered[len(ordered) // 2] * 1e6,
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
    }


async def interleave(ways: dict[str, Once], jobs: int, pause: float) -> dict[str, dict[str, float]]:
    """Each way in turn, `jobs` times."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for once in ways.values():
        for _ in range(5):
            await once()
    for _ in range(jobs):
        for name, once in ways.items():
            await anyio.sleep(pause)
            samples[name].append(await once())
    return {name: quantiles(values) for name, values in samples.items()}


async def throughput(
    ways: dict[str, Once], at_once: int, seconds: float, rounds: int = 3
) -> dict[str, float]:
    """Jobs per second with so many in flight; the ways alternate, the best round counts."""
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, once in ways.items():
            done = 0
            end = time.perf_counter() + seconds

            async def worker(once: Once = once, end: float = end) -> None:
                nonlocal done
                while time.perf_counter() < end:
                    await once()
                    done += 1

            start = time.perf_counter()
            async with anyio.create_task_group() as tasks:
                for _ in range(at_once):
                    tasks.start_soon(worker)
            best[name] = max(best[name], done / (time.perf_counter() - start))
    return best


async def on_asyncio(floor: Floor, jobs: int, seconds: float) -> dict[str, object]:
    """All figures of the asyncio side."""
    out: dict[str, object] = {}
    async with isojob.Pool(max_jobs=32) as pool, isojob.Pool(parked=0) as dry:
        ways = {
            "vfork+exec (C)": floor.once,
            "asyncio exec": asyncio_exec,
            "isojob": isolated(pool),
        }
        out["latency, 3 ms apart"] = await interleave(ways, jobs, 0.003)
        out["latency, 50 ms of idling"] = await interleave(ways, max(30, jobs // 3), 0.05)
        out["latency, no parked cell"] = await interleave(
            {"vfork+exec (C)": floor.once, "isojob": isolated(dry)}, max(30, jobs // 3), 0.003
        )
        both = {"asyncio exec": asyncio_exec, "isojob": isolated(pool)}
        for at_once in (1, 4, 8, 32):
            out[f"jobs/s, {at_once} in flight"] = await throughput(both, at_once, seconds)
        out["CPU of the machine, ms/job"] = await cpu_per_job(both, 4 * jobs)
        for name, row in (await streams(pool, 256)).items():
            out[f"MB/s of {name}, 256 MB"] = row
        out["other"] = {"CPU of the loop's thread, ms/job": await in_the_loop(pool, jobs)}
    out["parked"] = {"MB a parked cell, of 200": await parked_cell(200)}
    return out


async def on_trio(jobs: int) -> dict[str, object]:
    """The trio side."""
    async with isojob.Pool() as pool:
        ways = {"trio.run_process": trio_run, "isojob": isolated(pool)}
        return {"latency on trio, 3 ms apart": await interleave(ways, jobs, 0.003)}


def busy() -> float:
    """CPU seconds of the whole machine so far, kernel workers included (proc(5), stat)."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(word) for word in words]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


async def cpu_per_job(ways: dict[str, Once], jobs: int) -> dict[str, float]:
    """Milliseconds of CPU that one job costs the machine: 4 in flight, less what idling costs."""
    out = {}
    for name, once in ways.items():
        before, start, done = busy(), time.perf_counter(), 0

        async def worker(once: Once = once) -> None:
            nonlocal done
            while done < jobs:
                done += 1
                await once()

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(worker)
        used, seconds = busy() - before, time.perf_counter() - start
        idle_before = busy()
        await anyio.sleep(seconds)
        out[name] = max(0.0, used - (busy() - idle_before)) / jobs * 1e3
    return out


async def in_the_loop(pool: isojob.Pool, jobs: int) -> float:
    """Milliseconds of CPU that a job costs the thread of the event loop."""
    start = time.thread_time()
    for _ in range(jobs):
        await pool.run(JOB)
    return (time.thread_time() - start) / jobs * 1e3


async def parked_cell(count: int) -> float:
    """Megabytes that one parked cell takes from the machine's free memory."""

    def available() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemFree"))

    async with isojob.Pool(parked=count) as pool:
        before = available()
        await pool.run(JOB)
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


async def streams(pool: isojob.Pool, megabytes: int) -> dict[str, dict[str, float]]:
    """Megabytes per second out of and into a job, and through a plain pipe; the best of three."""
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
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        runs.append([float(word) for word in done.stdout.split()])
    imported, first = (sorted(column)[len(runs) // 2] for column in zip(*runs, strict=True))
    return {"import isojob, ms": imported, "first job, ms": first}


def show(results: dict[str, object]) -> None:
    """A table for people."""
    cpu = platform.processor() or platform.machine()
    print(f"isojob {isojob.__version__}, Python {platform.python_version()}, Linux ", end="")
    print(f"{os.uname().release}, {os.cpu_count()} CPUs ({cpu}), job: {' '.join(JOB)}\n")
    for title, figures in results.items():
        assert isinstance(figures, dict)
        print(title)
        rows = {name: row if isinstance(row, dict) else {"": row} for name, row in figures.items()}
        if "isojob" not in rows:
            for name, row in rows.items():
                print(f"    {name:34} {row['']:9.2f}")
            continue
        for name, row in rows.items():
            line = f"    {name:20}"
            for key, value in row.items():
                shown = f"{value:9.0f}" if value >= 100 else f"{value:9.2f}"
                line += f" {key:>4} {shown}{' us' if key else '   '}"
            if name != "isojob":
                key = "p50" if "p50" in row else ""
                line += f"   isojob/this {rows['isojob'][key] / row[key]:5.2f}"
            print(line)
    print()


@dataclass(frozen=True)
class Target:
    """One line of the table of targets; a `ratio` is of isojob's figure to that of `to`."""

    name: str
    title: str
    row: str
    to: str | None
    most: bool
    value: float


TARGETS = (
    Target("p50 / vfork+exec", "latency, 3 ms apart", "isojob", "vfork+exec (C)", True, 1.25),
    Target("p50 / asyncio exec", "latency, 3 ms apart", "isojob", "asyncio exec", True, 0.8),
    Target("the same after 50 ms", "latency, 50 ms of idling", "isojob", "asyncio exec", True, 0.8),
    Target("on trio", "latency on trio, 3 ms apart", "isojob", "trio.run_process", True, 0.8),
    Target("none parked", "latency, no parked cell", "isojob", "vfork+exec (C)", True, 2.5),
    Target("jobs/s, 4 in flight", "jobs/s, 4 in flight", "isojob", "asyncio exec", False, 0.6),
    Target("jobs/s, 8 in flight", "jobs/s, 8 in flight", "isojob", "asyncio exec", False, 0.6),
    Target("jobs/s, 32 in flight", "jobs/s, 32 in flight", "isojob", "asyncio exec", False, 0.6),
    Target("output, MB/s", "MB/s of output, 256 MB", "isojob", "plain pipe", False, 0.7),
    Target("input, MB/s", "MB/s of input, 256 MB", "isojob", "plain pipe", False, 0.7),
    Target("loop, ms/job", "other", "CPU of the loop's thread, ms/job", None, True, 0.2),
    Target("parked cell, MB", "parked", "MB a parked cell, of 200", None, True, 0.6),
    Target("import, ms", "start", "import isojob, ms", None, True, 150),
    Target("first job, ms", "start", "first job, ms", None, True, 40),
)


def targets(results: dict[str, dict[str, object]]) -> None:
    """What was to be reached, and what was."""
    print("| | measured | target | |\n|---|---|---|---|")
    for target in TARGETS:
        figures = [results[target.title][row] for row in (target.row, target.to) if row]
        numbers = [
            float(figure["p50"] if isinstance(figure, dict) else figure)  # type: ignore[arg-type]
            for figure in figures
        ]
        measured = numbers[0] / numbers[1] if len(numbers) > 1 else numbers[0]
        met = measured <= target.value if target.most else measured >= target.value
        sign = "≤" if target.most else "≥"
        word = "" if met else "missed"
        print(f"| {target.name} | {measured:.2f} | {sign} {target.value:g} | {word} |")


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=200, help="samples of each latency")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each throughput round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if sys.version_info < (3, 12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())
    with tempfile.TemporaryDirectory() as directory:
        floor = Floor(Path(directory))
        try:
            results = anyio.run(on_asyncio, floor, options.jobs, options.seconds)
            results |= trio.run(on_trio, options.jobs)
            results["start"] = first_call()
        finally:
            floor.close()
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
        targets(results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
