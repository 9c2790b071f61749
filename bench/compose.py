"""Runs of a session, pairs and conversations against what they stand in for, interleaved.

    python bench/compose.py [--jobs 300] [--rounds 20000]

A run on a session's private copy, and one on a root of layers with ten thousand files in them, against
a plain run; a pipeline of three jobs against the same three programs of a shell; so many questions and
answers between two jobs of `run_pair` against the same two programs over bare pipes, all pinned to one
CPU; one line to ``cat`` and back by `open_isolated` against `anyio.open_process`, and through a terminal
against a bare one. Says of each target whether it was met.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import median

import anyio

import isojob

PING = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv) {
    long n = atol(argv[1]); char c = 'x';
    struct timespec from, to;
    for (long i = 0; i < n; i++) {
        if (argv[2][0] == 'a' && write(1, &c, 1) != 1) return 1;
        if (read(0, &c, 1) != 1) return 2;
        if (argv[2][0] == 'b' && write(1, &c, 1) != 1) return 3;
        if (i == 0) clock_gettime(CLOCK_MONOTONIC, &from);
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    fprintf(stderr, "%.9f", to.tv_sec - from.tv_sec + (to.tv_nsec - from.tv_nsec) / 1e9);
    return 0;
}
"""
JOB = ["/bin/true"]
FILES = 10_000


def report(
    name: str,
    ours: list[float],
    theirs: list[float],
    unit: float,
    *,
    most: float | None = None,
    least: float | None = None,
) -> None:
    """One line: both medians, both p99, the ratio, and whether it is what it should be."""

    def at(values: list[float], share: float) -> float:
        return sorted(values)[int((len(values) - 1) * share)] * unit

    ratio = median(ours) / median(theirs)
    verdict = ""
    if most is not None:
        verdict = f"target <= {most}: {'met' if ratio <= most else 'missed'}"
    if least is not None:
        verdict = f"target >= {least}: {'met' if ratio >= least else 'missed'}"
    print(
        f"{name:44} p50 {at(ours, 0.5):8.2f} / {at(theirs, 0.5):8.2f} = {ratio:5.2f}   "
        f"p99 {at(ours, 0.99):8.2f} / {at(theirs, 0.99):8.2f}   {verdict}"
    )


async def in_turn(
    jobs: int, plain: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]]
) -> tuple[list[float], list[float]]:
    """Seconds of the one and of the other, one job after the other; the first twenty do not count."""
    times = list[float](), list[float]()
    for number in range(jobs + 20):
        for run, kept in zip((plain, other), times, strict=True):
            start = time.perf_counter()
            await run()
            if number >= 20:
                kept.append(time.perf_counter() - start)
    return times


async def sessions(jobs: int) -> None:
    """Private runs, and runs that keep their changes."""
    for name, keep in (("private", False), ("kept", True)):
        async with isojob.Pool() as pool, pool.session(files={"a": b"x"}) as session:
            plain, ours = await in_turn(
                jobs, partial(pool.run, JOB), partial(session.run, JOB, keep=keep)
            )
        report(f"session run, {name} / plain run, ms", ours, plain, 1e3, most=1.3)


async def layered(jobs: int) -> None:
    """The same program below a root of three layers, read-only and writable, and the default one."""
    directory = Path(tempfile.mkdtemp(prefix="bench-compose-"))
    try:
        directory.chmod(0o755)
        layers = [directory / name for name in ("base", "tool", "app")]
        for layer in layers:
            (layer / "opt" / layer.name).mkdir(parents=True)
        for number in range(FILES):
            (layers[0] / "opt" / "base" / f"{number}").write_bytes(b"x" * 1000)
        # The program and what it loads come from the layers, as they do from an image.
        _copy("/bin/true", layers[0])
        # And a loader's cache, as both the default root and images do.
        (layers[0] / "etc").mkdir()
        subprocess.run(["/sbin/ldconfig", "-r", layers[0]], check=True, stderr=subprocess.DEVNULL)
        for writable in (False, True):
            sandbox = isojob.Sandbox(root=isojob.Root.layers(layers, writable=writable))
            async with isojob.Pool() as pool, isojob.Pool(sandbox) as other:
                plain, over = await in_turn(jobs, partial(pool.run, JOB), partial(other.run, JOB))
            name = f"root of three {'writable ' if writable else ''}layers / default root, ms"
            report(name, over, plain, 1e3, most=1.15)
    finally:
        shutil.rmtree(directory)


def _copy(program: str, top: Path) -> None:
    """A program with its libraries and loader, below another root."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for name in (program, *(word for word in listed.split() if word.startswith("/"))):
        target = top / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)


async def pipelines(jobs: int) -> None:
    """Three programs in a row, and the same by a shell."""
    script = "echo a line | cat | wc -c"

    async def plain() -> None:
        done = await anyio.run_process(["sh", "-c", script], stdin=subprocess.DEVNULL)
        assert done.stdout == b"7\n"

    async with isojob.Pool(max_jobs=4) as pool:

        async def ours() -> None:
            *_, last = await pool.run_group([["echo", "a line"], ["cat"], ["wc", "-c"]])
            assert last.stdout == b"7\n"

        shell, three = await in_turn(jobs, plain, ours)
    report("pipeline of three jobs / of a shell, ms", three, shell, 1e3)


async def pairs(rounds: int) -> None:
    """Round trips a second, by the one side's own clock, from the first answer to the last."""
    directory = Path(tempfile.mkdtemp(prefix="bench-compose-"))
    try:
        (directory / "ping.c").write_text(PING)
        program = directory / "ping"
        subprocess.run(["gcc", "-O2", "-o", program, directory / "ping.c"], check=True)
        data = program.read_bytes()
        cpu = min(os.sched_getaffinity(0))
        limits = isojob.Limits(cpuset=str(cpu), cpu_time=60, wall_time=120)
        bare, isolated, relayed = list[float](), list[float](), list[float]()
        for _ in range(5):
            bare.append(await anyio.to_thread.run_sync(_bare, str(program), rounds, cpu))
            for transcript, times in ((0, isolated), (1000, relayed)):
                count = rounds if not transcript else rounds // 10
                result = await isojob.run_pair(
                    ["./ping", str(count), "a"],
                    ["./ping", str(count), "b"],
                    limits=limits,
                    files={"ping": (data, 0o755)},
                    interactor_files={"ping": (data, 0o755)},
                    transcript=transcript,
                )
                assert result.solution.ok and result.interactor.ok, result
                times.append(float(result.solution.stderr_text) * (rounds / count))
        rate = [rounds / seconds for seconds in isolated]
        base = [rounds / seconds for seconds in bare]
        report("round trips/s of a pair / bare pipes", rate, base, 1, least=0.75)
        report("the same with a transcript", [rounds / seconds for seconds in relayed], base, 1)
    finally:
        shutil.rmtree(directory)


def _bare(program: str, rounds: int, cpu: int) -> float:
    to_b, to_a = os.pipe(), os.pipe()
    pinned = ["taskset", "-c", str(cpu), program, str(rounds)]
    a = subprocess.Popen([*pinned, "a"], stdin=to_a[0], stdout=to_b[1], stderr=subprocess.PIPE)
    b = subprocess.Popen([*pinned, "b"], stdin=to_b[0], stdout=to_a[1], stderr=subprocess.DEVNULL)
    for fd in (*to_a, *to_b):
        os.close(fd)
    _, seconds = a.communicate()
    assert (a.returncode, b.wait()) == (0, 0)
    return float(seconds)


async def conversations(rounds: int) -> None:
    """One line there and back, many times."""
    ours, theirs = list[float](), list[float]()
    limits = isojob.Limits(cpu_time=60, wall_time=120)
    async with (
        isojob.open_isolated(["cat"], limits=limits) as isolated,
        await anyio.open_process(["cat"]) as plain,
    ):
        for _ in range(rounds):
            for process, times in ((isolated, ours), (plain, theirs)):
                assert process.stdin is not None and process.stdout is not None
                start = time.perf_counter()
                await process.stdin.send(b"a line\n")
                assert await process.stdout.receive() == b"a line\n"
                times.append(time.perf_counter() - start)
        plain.terminate()
    report("a line to cat and back / anyio process, us", ours, theirs, 1e6)


async def terminals(rounds: int) -> None:
    """One line to ``cat`` on a terminal: what comes back is its echo, then the line of ``cat``."""
    ours, theirs = list[float](), list[float]()
    limits = isojob.Limits(cpu_time=60, wall_time=120)
    line, both = b"a line\n", b"a line\r\n" * 2
    master, slave = os.openpty()
    async with (
        isojob.open_isolated(["cat"], limits=limits, pty=True) as isolated,
        await anyio.open_process(
            ["cat"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        ) as plain,
    ):
        os.close(slave)
        assert isolated.stdin is not None and isolated.stdout is not None
        for _ in range(rounds):
            start = time.perf_counter()
            await isolated.stdin.send(line)
            got = b""
            while len(got) < len(both):
                got += await isolated.stdout.receive()
            ours.append(time.perf_counter() - start)
            assert got == both
            start = time.perf_counter()
            os.write(master, line)
            got = b""
            while len(got) < len(both):
                await anyio.wait_readable(master)
                got += os.read(master, 4096)
            theirs.append(time.perf_counter() - start)
            assert got == both
        plain.kill()
    os.close(master)
    report("a line to cat by a terminal / bare one, us", ours, theirs, 1e6)


async def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20_000)
    arguments = parser.parse_args()
    await sessions(arguments.jobs)
    await layered(arguments.jobs)
    await pipelines(arguments.jobs)
    await pairs(arguments.rounds)
    await conversations(2000)
    await terminals(2000)


if __name__ == "__main__":
    anyio.run(main)
