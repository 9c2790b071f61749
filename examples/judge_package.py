"""Judges all submissions of a problem package in the Kattis format: ``python examples/judge_package.py DIR``.

The package (https://www.kattis.com/problem-package-format): ``problem.yaml``, cases as ``.in`` and
``.ans`` below ``data/sample`` and ``data/secret``, ``submissions/accepted``, ``wrong_answer``,
``time_limit_exceeded`` and ``run_time_error``, and perhaps an output validator of its own, which may be
interactive. A program is one file or a directory: its sources, or scripts ``build`` and ``run``. Each
is compiled once; its cases run side by side, each in a fresh sandbox on a private copy; validators
are strangers' programs, too. The time limit follows from the accepted submissions: the slowest of
them, times ``time_multiplier``. Groups of cases are judged as one. What of the format
there is not is refused (scores, files that are compiled along, flags for groups, versions after "legacy")
or plays no part here (other directories of submissions, limits on compiling and validating).

A verdict is that of the first case, in order, that is not accepted:

    AC accepted   WA wrong answer   TLE too slow   RTE crashed, or beyond memory or output
    CE does not compile   JE the validator is broken

The exit status is 0 if every submission got the verdict of its directory. Needs PyYAML and rich.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from isojob import (
    Cache,
    CommandNotExecutableError,
    CommandNotFoundError,
    Language,
    Limits,
    PairResult,
    Pool,
    Program,
    Result,
    Session,
    Status,
    languages,
)

EXPECTED = {
    "accepted": "AC",
    "wrong_answer": "WA",
    "time_limit_exceeded": "TLE",
    "run_time_error": "RTE",
}
ACCEPT, REJECT = 42, 43
NOT_BUILT = (CommandNotFoundError, CommandNotExecutableError)
"""A compiler can be content and make no program, as of a library."""
SCRIPTS = Language(
    name="scripts",
    extensions=("",),
    source="run",
    compile=("sh", "-ec", "[ ! -e build ] || ./build; [ -x run ] || { echo no run >&2; exit 1; }"),
    execute=("./run",),
    outputs=None,
)
"""A program that brings its own ways to be built and run."""
FIRST_SECONDS = 10.0
"""CPU time of accepted submissions, while the time limit is not known yet."""


class PackageError(Exception):
    """The package is not what it should be."""


@dataclass(frozen=True)
class Case:
    """One test case; the answer never enters the sandbox of a submission."""

    name: str
    input: bytes
    answer: bytes


@dataclass(frozen=True)
class Submission:
    """A submission, or a validator: then nothing is expected of it."""

    name: str
    program: Program
    expected: str = ""


@dataclass
class Problem:
    """What the package says."""

    name: str
    cases: list[Case]
    submissions: list[Submission]
    validator: Submission | None
    interactive: bool
    flags: list[str]
    options: dict[str, float]
    """The flags, where the validator is the default one."""
    limits: Limits
    multiplier: float


@dataclass
class Graded:
    """What came of one submission."""

    submission: Submission
    verdict: str
    why: str = ""
    cpu_time: float = 0.0
    memory: int = 0
    cases: list[str] = field(default_factory=list)


def load(directory: Path) -> Problem:
    """Reads a package.

    Raises:
        PackageError: Something is missing or unknown.
    """
    try:
        settings = yaml.safe_load(_read(directory / "problem.yaml", directory))
        return _problem(directory, _mapping(settings, "it"))
    except (
        yaml.YAMLError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise PackageError(f"problem.yaml: {error}") from error


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise PackageError(f"problem.yaml: {name} is no mapping")
    return value or {}


def _problem(directory: Path, settings: dict[str, Any]) -> Problem:
    version = settings.get("problem_format_version", "legacy")
    if version != "legacy":
        raise PackageError(f"problem.yaml: version {version} of the format is not supported")
    kind = str(settings.get("validation") or "default").split()
    if settings.get("type", "pass-fail") != "pass-fail" or "score" in kind:
        raise PackageError("problem.yaml: problems with scores are not supported")
    if kind not in (["default"], ["custom"], ["custom", "interactive"]):
        raise PackageError(f"problem.yaml: validation {' '.join(kind)!r} is not known")
    if (directory / "include").is_dir():
        raise PackageError("include: files that are compiled along are not supported")
    for path in (directory / "data").rglob("testdata.yaml"):
        if "output_validator_flags" in (yaml.safe_load(_read(path, directory)) or {}):
            raise PackageError(f"{path}: flags for a group of cases are not supported")
    cases = [
        Case(str(path.relative_to(directory / "data")), *_pair(path, directory))
        for part in ("sample", "secret")
        for path in sorted((directory / "data" / part).rglob("*.in"))
    ]
    if not cases:
        raise PackageError("data/ has no case")
    submissions = [
        one
        for name, verdict in EXPECTED.items()
        for one in _programs(directory / "submissions" / name, directory, verdict)
    ]
    if not any(one.expected == "AC" for one in submissions):
        raise PackageError("submissions/accepted is empty")
    validators = _programs(directory / "output_validators", directory) if "custom" in kind else []
    if "custom" in kind and len(validators) != 1:
        raise PackageError(
            f"validation is custom: output_validators has {len(validators)} programs, not one"
        )
    flags = str(settings.get("validator_flags") or "").split()
    limits = _mapping(settings.get("limits"), "limits")
    memory = int(limits.get("memory", 1024)) << 20
    multiplier = float(limits.get("time_multiplier", 5))
    if not 0 < multiplier < 1e6:
        raise PackageError(f"problem.yaml: time_multiplier is {multiplier:g}")
    return Problem(
        name=str(settings.get("name", directory.name)),
        cases=cases,
        submissions=submissions,
        validator=validators[0] if validators else None,
        interactive="interactive" in kind,
        flags=flags,
        options={} if validators else read_flags(flags),
        limits=Limits(
            memory=memory,
            stack=memory,
            output=int(limits.get("output", 8)) << 20,
            cpu_time=FIRST_SECONDS,
            wall_time=4 * FIRST_SECONDS,
        ),
        multiplier=multiplier,
    )


def _pair(path: Path, package: Path) -> tuple[bytes, bytes]:
    return _read(path, package), _read(path.with_suffix(".ans"), package)


def _read(path: Path, package: Path) -> bytes:
    # Where a package came from strangers a link could name any file that we can read.
    try:
        if not path.resolve().is_relative_to(package.resolve()):
            raise PackageError(f"{path} leads out of the package")
        if path.exists() and not path.is_file():
            raise PackageError(f"{path} is no file")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise PackageError(f"{path}: {error}") from error


def _programs(directory: Path, package: Path, expected: str = "") -> list[Submission]:
    """The programs of a directory: each a file or a directory of its own."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [
        Submission(path.name, _program(path, package), expected)
        for path in paths
        if not path.name.startswith(".")
    ]


def _program(path: Path, package: Path) -> Program:
    names = [path] if path.is_file() else [one for one in sorted(path.rglob("*")) if one.is_file()]
    above = path.parent if path.is_file() else path
    files = {
        str(one.relative_to(above)): (_read(one, package), one.stat().st_mode & 0o777)
        for one in names
    }
    try:
        if "build" in files or "run" in files:
            return SCRIPTS.program(files)
        # The language that most files are in; headers and data have none.
        known = [one for one in languages.values() for name in files if one.has(name)]
        if not known:
            raise PackageError(f"{path}: in none of the languages {', '.join(languages)}")
        return max(known, key=known.count).program(files)
    except ValueError as error:
        raise PackageError(f"{path}: {error}") from error


def read_flags(flags: Sequence[str]) -> dict[str, float]:
    """The default validator's flags by name, tolerances with their numbers.

    Raises:
        PackageError: One is unknown, or its number is missing.
    """
    found: dict[str, float] = {}
    words = iter(flags)
    for flag in words:
        if flag in ("case_sensitive", "space_change_sensitive"):
            found[flag] = 1
        elif flag in ("float_tolerance", "float_relative_tolerance", "float_absolute_tolerance"):
            number = _number(next(words, "").encode())
            if not 0 <= number < math.inf:
                raise PackageError(f"validator_flags: {flag} needs a number")
            found[flag] = number
        else:
            raise PackageError(f"validator_flags: {flag} is not known")
    return found


def compare(output: bytes, answer: bytes, options: dict[str, float]) -> str:
    """The default validator: token by token. Empty if they are the same, else what differs."""
    split = bytes.split if "space_change_sensitive" not in options else lambda text: [text]
    ours, theirs = split(output), split(answer)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if not _same(one, other, options):
            return f"token {number} is {one[:20]!r}"
    return "" if len(ours) == len(theirs) else f"{len(ours)} tokens, not {len(theirs)}"


def _same(one: bytes, other: bytes, options: dict[str, float]) -> bool:
    if one == other or ("case_sensitive" not in options and one.lower() == other.lower()):
        return True
    both = options.get("float_tolerance", 0)
    relative = options.get("float_relative_tolerance", both)
    absolute = options.get("float_absolute_tolerance", both)
    if not relative and not absolute:
        return False
    answer = _number(other)
    # Never true of what is no number; nor is every number close to an infinite one.
    return abs(_number(one) - answer) <= max(absolute, relative * abs(answer)) < math.inf


def _number(text: bytes) -> float:
    """NaN: it is none."""
    try:
        return math.nan if b"_" in text else float(text)  # 1_0 is one for Python only
    except ValueError:
        return math.nan


class Judge:
    """Judges the submissions of one problem."""

    def __init__(
        self, problem: Problem, pool: Pool, at_once: int, done: Callable[[], None]
    ) -> None:
        self.problem = problem
        self.pool = pool
        self.limits = problem.limits
        self.cache = Cache()
        self.slots = anyio.CapacityLimiter(at_once)
        self.done = done

    async def grade(self, submission: Submission, validator: Session | None) -> Graded:
        """One submission on all cases, side by side."""
        program = submission.program
        async with self.pool.session(cache=self.cache, disk="128MiB") as session:
            built = await program.build(session)
            if built is not None and not built.ok:
                return Graded(submission, "CE", f"{built}: {built.stderr_text[:200]}")
            verdicts: dict[str, tuple[str, str, Result]] = {}
            unbuilt = ""

            async def one(case: Case) -> None:
                async with self.slots:
                    if self.problem.interactive:
                        assert validator is not None
                        verdicts[case.name] = await self._talk(program, session, validator, case)
                    else:
                        verdicts[case.name] = await self._case(program, session, validator, case)
                self.done()

            try:
                async with anyio.create_task_group() as tasks:
                    for case in self.problem.cases:
                        tasks.start_soon(one, case)
            except* NOT_BUILT as errors:
                unbuilt = str(errors.exceptions[0])
        if unbuilt:
            return Graded(submission, "CE", f"it makes no program: {unbuilt}")
        graded = Graded(submission, "AC")
        for case in self.problem.cases:
            verdict, why, result = verdicts[case.name]
            graded.cases.append(verdict)
            graded.cpu_time = max(graded.cpu_time, result.usage.cpu_time or 0)
            graded.memory = max(graded.memory, result.usage.memory_peak or 0)
            if graded.verdict == "AC" and verdict != "AC":
                graded.verdict, graded.why = verdict, f"{case.name}: {why}"
        return graded

    async def _case(
        self, program: Program, session: Session, validator: Session | None, case: Case
    ) -> tuple[str, str, Result]:
        result = await program.run(session, input=case.input, limits=self.limits)
        if not result.ok:
            return _crash(result), _how(result), result
        if validator is None:
            why = compare(result.stdout or b"", case.answer, self.problem.options)
            return ("WA" if why else "AC"), why, result
        said = await validator.run(
            self._validation(),
            keep=False,
            input=result.stdout or b"",
            files={"input": case.input, "answer": case.answer, "feedback/empty": b""},
            env=self._validator.env(_VALIDATION),
            limits=_VALIDATION,
        )
        return *_said(said), result

    async def _talk(
        self, program: Program, session: Session, validator: Session, case: Case
    ) -> tuple[str, str, Result]:
        pair = await session.run_pair(
            program.command(self.limits),
            self._validation(),
            interactor_session=validator,
            limits=self.limits,
            interactor_limits=_VALIDATION,
            env=program.env(self.limits),
            interactor_env=self._validator.env(_VALIDATION),
            interactor_files={
                "input": case.input,
                "answer": case.answer,
                "feedback/empty": b"",
            },
            idle_time=5,
            transcript=1,  # tells for sure who ended first
        )
        return *talked(pair), pair.solution

    @property
    def _validator(self) -> Program:
        assert self.problem.validator is not None
        return self.problem.validator.program

    def _validation(self) -> list[str]:
        command = self._validator.command(_VALIDATION)
        return [*command, "input", "answer", "feedback/", *self.problem.flags]


_VALIDATION = Limits(cpu_time=20, wall_time=60, memory="1GiB")


def talked(pair: PairResult) -> tuple[str, str]:
    """The verdict on a solution that talked to the validator, and why."""
    result, verdict, why = pair.solution, *_said(pair.interactor)
    by_validator = pair.first_to_end == "interactor"
    if (pair.interactor if by_validator else result).status == Status.KILLED:
        return "TLE", "idle"  # each waited for the other; how the second took its end is no matter
    # Who ends first decides: a solution that dies of a closed pipe, or waits on, had been rejected.
    if not result.ok and not (verdict in ("WA", "JE") and by_validator):
        return _crash(result), _how(result)
    return verdict, why


def _crash(result: Result) -> str:
    slow = (Status.CPU_TIME_LIMIT, Status.WALL_TIME_LIMIT, Status.KILLED)  # killed: it was idle
    return "TLE" if result.status in slow else "RTE"


def _how(result: Result) -> str:
    if result.status == Status.KILLED:
        return "idle"
    plain = result.status in (Status.NONZERO_EXIT, Status.SIGNALED)
    return f"exit status {result.returncode}" if plain else str(result.status)


def _said(result: Result) -> tuple[str, str]:
    """What a validator's exit status means."""
    if result.exit_code == ACCEPT:
        return "AC", ""
    if result.exit_code == REJECT:
        return "WA", "the validator rejects it"
    return "JE", f"the validator: {result}"


async def judge(directory: Path, console: Console, at_once: int = 2) -> list[Graded]:
    """Judges a package, with a progress bar.

    Raises:
        PackageError: The package, or its validator, is broken.
    """
    problem = load(directory)
    graded: list[Graded] = []
    async with Pool() as pool, pool.session() as validator:
        if problem.validator is not None:
            built = await problem.validator.program.build(validator)
            if built is not None and not built.ok:
                raise PackageError(f"the validator does not compile: {built.stderr_text[:500]}")
            try:
                await problem.validator.program.run(validator, limits=_VALIDATION)
            except NOT_BUILT as error:
                raise PackageError(f"the validator makes no program: {error}") from error
        custom = validator if problem.validator is not None else None
        with Progress(console=console, transient=True) as progress:
            steps = len(problem.cases)
            bar = progress.add_task(escape(problem.name), total=steps * len(problem.submissions))
            judge = Judge(problem, pool, at_once, partial(progress.advance, bar))
            for submission in problem.submissions:  # the accepted ones first
                if submission.expected != "AC" and judge.limits is problem.limits:
                    slowest = max(one.cpu_time for one in graded)
                    limit = float(max(1, math.ceil(slowest * problem.multiplier)))
                    judge.limits = problem.limits.model_copy(
                        update={"cpu_time": limit, "wall_time": 4 * limit}
                    )
                graded.append(await judge.grade(submission, custom))
                progress.update(bar, completed=steps * len(graded))  # also of what was not run
    show(problem, judge.limits, graded, console)
    return graded


def show(problem: Problem, limits: Limits, graded: Sequence[Graded], console: Console) -> None:
    """The table of verdicts."""
    table = Table(
        title=f"{escape(problem.name)}: {len(problem.cases)} cases, {limits.cpu_time:g} s"
    )
    for heading in ("submission", "expected", "verdict", "cases", "slowest", "memory", "why"):
        table.add_column(heading)
    for one in graded:
        right = one.verdict == one.submission.expected
        table.add_row(
            escape(one.submission.name),
            one.submission.expected,
            f"[{'green' if right else 'red'}]{one.verdict}[/]",
            f"{one.cases.count('AC')}/{len(problem.cases)}",
            f"{one.cpu_time:.2f} s",
            f"{one.memory / 2**20:.0f} MiB",
            escape("".join(c if c.isprintable() else "?" for c in one.why)[:100]),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="the directory with problem.yaml")
    parser.add_argument("--at-once", type=int, default=2, help="cases side by side (2)")
    given = parser.parse_args(arguments)
    if given.at_once < 1:
        parser.error("--at-once must be at least 1")
    try:
        graded = anyio.run(judge, given.package, Console(), given.at_once)
    except PackageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(one.verdict == one.submission.expected for one in graded) else 1


if __name__ == "__main__":
    sys.exit(main())
