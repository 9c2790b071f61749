"""A judge as programming contests have it: ``python examples/judge.py [solution.cpp|package]``.

Compiles a C++ program, runs it on each test case and gives a verdict for each:

    AC accepted     WA wrong answer     TLE, MLE, OLE too much time, memory or output
    RE ended by a signal or with a status other than 0     CE does not compile

Given a directory it grades a whole problem package, by `judge_package.py`. Without an argument it
judges a few solutions of its own, one for each verdict. The problem: from the numbers read (first
how many), choose a run of neighbours, at least one, with the largest sum.

Needs nothing but isojob, and a C++ compiler in /usr.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import anyio

from isojob import (
    CommandNotExecutableError,
    CommandNotFoundError,
    Limits,
    Pool,
    Program,
    Result,
    Session,
    Status,
    languages,
)

Verdict: TypeAlias = Literal["AC", "WA", "TLE", "MLE", "OLE", "RE"]

# A compile is a job like any other: a program can make its compiler loop, take all memory, or
# quote /etc/passwd in a message. The language brings limits for it.
CPP = languages["cpp"]
RUN_LIMITS = Limits(
    cpu_time=1, wall_time=10, memory="64MiB", processes=1, output="64KiB", disk="1MiB"
)

VERDICTS: dict[Status, Verdict] = {
    Status.OK: "AC",
    Status.NONZERO_EXIT: "RE",
    Status.SIGNALED: "RE",
    Status.SECCOMP_VIOLATION: "RE",
    Status.CPU_TIME_LIMIT: "TLE",
    Status.WALL_TIME_LIMIT: "TLE",
    Status.MEMORY_LIMIT: "MLE",
    Status.OUTPUT_LIMIT: "OLE",
}


@dataclass(frozen=True)
class Case:
    """A test case: what the program reads, and what it must print."""

    name: str
    input: bytes
    expected: bytes


@dataclass(frozen=True)
class Judged:
    """What came of one case."""

    case: Case
    verdict: Verdict
    result: Result


class CompileError(Exception):
    """The compiler refused the program; the message is the compiler's."""


async def judge_case(program: Program, session: Session, case: Case, limits: Limits) -> Judged:
    """Runs the program on one case. The expected output never enters the sandbox."""
    result = await program.run(session, input=case.input, limits=limits)
    verdict = VERDICTS[result.status]
    if verdict == "AC" and (result.stdout or b"").split() != case.expected.split():
        verdict = "WA"
    return Judged(case, verdict, result)


async def judge(source: bytes, cases: Sequence[Case], limits: Limits = RUN_LIMITS) -> list[Judged]:
    """Compiles a program once and runs it on all cases, each in a fresh sandbox.

    Each run works on a private copy of the directory that it was compiled in. One at a time, so that
    no case takes the caches and the turbo of another; a busier judge runs one for each core, with
    ``Limits(cpuset=...)``.

    Raises:
        CompileError: It does not compile, or not within the limits.
    """
    async with Pool() as pool, pool.session() as session:
        program = CPP.program(source)
        built = await program.build(session)
        if built is not None and not built.ok:
            raise CompileError(f"{built}\n{built.stderr_text}")
        try:
            return [await judge_case(program, session, case, limits) for case in cases]
        except (CommandNotFoundError, CommandNotExecutableError) as error:
            raise CompileError(f"it makes no program: {error}") from error


def make_cases() -> list[Case]:
    """The cases of the problem."""

    def case(name: str, numbers: Sequence[int]) -> Case:
        best = ending_here = numbers[0]
        for number in numbers[1:]:
            ending_here = max(number, ending_here + number)
            best = max(best, ending_here)
        words = " ".join(map(str, numbers))
        return Case(name, f"{len(numbers)}\n{words}\n".encode(), f"{best}\n".encode())

    return [
        case("sample", [3, -4, 5, -1, 2, -9]),
        case("one", [7]),
        case("negative", [-8, -3, -5]),
        case("large", [(i * i * 7919 + 104729) % 2003 - 1000 for i in range(200_000)]),
    ]


READ = """
#include <cstdio>
#include <vector>
int main() {
    int n;
    if (scanf("%d", &n) != 1) return 1;
    std::vector<long long> a(n);
    for (auto &x : a) if (scanf("%lld", &x) != 1) return 1;
"""
PRINT = """
    printf("%lld\\n", best);
}
"""
SOLUTIONS = {
    "linear": """
    long long best = a[0], here = a[0];
    for (int i = 1; i < n; i++) {
        here = here > 0 ? here + a[i] : a[i];
        if (here > best) best = here;
    }""",
    "may choose none": """
    long long best = 0, here = 0;
    for (int i = 0; i < n; i++) {
        here = here + a[i] > 0 ? here + a[i] : 0;
        if (here > best) best = here;
    }""",
    "quadratic": """
    volatile long long best = a[0];
    for (int i = 0; i < n; i++) {
        long long sum = 0;
        for (int j = i; j < n; j++) if ((sum += a[j]) > best) best = sum;
    }""",
    "all sums": """
    long long best = a[0];
    std::vector<std::vector<long long>> sum(n, std::vector<long long>(n));
    for (int i = 0; i < n; i++)
        for (int j = i; j < n; j++) {
            sum[i][j] = (j > i ? sum[i][j - 1] : 0) + a[j];
            if (sum[i][j] > best) best = sum[i][j];
        }""",
    "short array": """
    std::vector<long long> sum(1000);
    long long best = sum.at(0) = a[0];
    for (int i = 1; i < n; i++) {
        sum.at(i) = sum[i - 1] > 0 ? sum[i - 1] + a[i] : a[i];
        if (sum[i] > best) best = sum[i];
    }""",
    "debugging": """
    long long best = a[0], here = a[0];
    for (int i = 1; i < n; i++) {
        here = here > 0 ? here + a[i] : a[i];
        if (here > best) printf("better: %lld\\n", best = here);
        else if (n > 1000) puts("not better");
    }""",
}


def show(name: str, judged: Sequence[Judged]) -> None:
    """Prints the verdicts of one program."""
    print(name)
    for item in judged:
        usage = item.result.usage
        cpu = f"{(usage.cpu_time or 0) * 1e3:.0f} ms"
        memory = f"{(usage.memory_peak or 0) / 2**20:.1f} MiB"
        line = f"  {item.case.name:10} {item.verdict:4} {cpu:>8} {memory:>9}  {explain(item)}"
        print(line.rstrip())


def explain(item: Judged) -> str:
    """Says why, in a few words."""
    match item.verdict:
        case "AC":
            return ""
        case "WA":
            return f"printed {item.result.stdout_text.strip()[:30]!r}"
        case "RE":
            signal = item.result.signal
            return f"exit {item.result.exit_code}" if signal is None else f"signal {signal!r}"
        case _:
            return item.result.status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if the solution is accepted (or without one: the sample that must be)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("solution", nargs="?", type=Path, help="a C++ program, or a package")
    path: Path | None = parser.parse_args(arguments).solution
    if path is not None and path.is_dir():
        package = runpy.run_path(str(Path(__file__).with_name("judge_package.py")))
        return int(package["main"]([str(path)]))
    if path is None:
        sources = {name: (READ + body + PRINT).encode() for name, body in SOLUTIONS.items()}
    else:
        sources = {path.name: path.read_bytes()}
    cases = make_cases()
    accepted = False
    for name, source in sources.items():
        try:
            judged = anyio.run(judge, source, cases)
        except CompileError as error:
            # What a compiler quotes, its input wrote: no control codes for the terminal.
            text = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
            print(f"{name}\n  CE {text[:2000]}")
            continue
        show(name, judged)
        accepted |= all(item.verdict == "AC" for item in judged)
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
