"""How many system calls one job takes in the host, the zygote, init and the launcher.

    python bench/syscalls.py [--jobs 20] [--all]

Needs root and strace. What is counted is a plain job on asyncio with both streams captured, whose cell
was parked, and the making of the cell that takes its place. No time is measured: these are the figures
that can be compared between cgroup v1 and v2, and between machines.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import anyio

import isojob

_CALL = re.compile(r"(?:[0-9.]+ )?([a-z_0-9]+)\(")
_MARK = "/isojob-syscalls-mark"
PARKED = 4
ROLES = ("host", "zygote", "init", "launcher", "job")


def attach(pid: int, prefix: Path) -> subprocess.Popen[bytes]:
    """Traces a process and all that it makes, one file a process."""
    tracer = subprocess.Popen(
        ["strace", "-q", "-ff", "-o", prefix, "-p", str(pid)], stderr=subprocess.DEVNULL
    )
    while not prefix.with_name(f"{prefix.name}.{pid}").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    return tracer


async def run(jobs: int, directory: Path) -> None:
    """Jobs one after the other, each after the cells have settled."""
    async with isojob.Pool(parked=PARKED) as pool:
        for _ in range(2 * PARKED):
            await pool.run(["/bin/true"])
        await anyio.sleep(0.3)
        zygote = pool._stock.zygote
        assert zygote is not None
        tracers = [
            attach(pid, directory / name)
            for name, pid in (("zygote", zygote.pid), ("host", os.getpid()))
        ]
        await anyio.sleep(0.3)
        for _ in range(jobs):
            os.access(_MARK, os.F_OK)
            result = await pool.run(["/bin/true"])
            assert result.ok
            await anyio.sleep(0.1)
        os.access(_MARK, os.F_OK)
        for tracer in reversed(tracers):
            tracer.send_signal(signal.SIGINT)
            tracer.wait()


def calls(path: Path) -> list[str]:
    """The names of the calls of a process, in order, and the marks."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        if _MARK in line:
            found.append(_MARK)
        elif match := _CALL.match(line):
            found.append(match[1])
    return found


def count(directory: Path, jobs: int) -> dict[str, Counter[str]]:
    """Calls by role, of all jobs together; and how many jobs that were."""
    by_role: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
    lives = Counter(host=jobs, zygote=jobs)
    for path in directory.iterdir():
        names = calls(path)
        if _MARK in names:
            first, last = names.index(_MARK), len(names) - names[::-1].index(_MARK)
            by_role["host"].update(name for name in names[first:last] if name != _MARK)
        elif "mkdirat" in names and "wait4" in names:
            by_role["zygote"].update(names)
        elif "execve" in names:
            # Whole lives only: cells that were parked at the beginning were not seen being made.
            at = names.index("execve") + 1
            by_role["launcher"].update(names[:at])
            by_role["job"].update(names[at:])
            lives.update(("launcher", "job"))
        elif "sched_yield" in names:
            by_role["init"].update(names)
            lives["init"] += 1
    for role, counter in by_role.items():
        for name in counter:
            counter[name] = round(counter[name] / max(1, lives[role]), 1)  # type: ignore[assignment]
    return by_role


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="every call, not the totals alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        anyio.run(run, options.jobs, directory)
        counted = count(directory, options.jobs)
    print(f"| {' | '.join(ROLES)} |\n|{'---|' * len(ROLES)}")
    print(f"| {' | '.join(f'{sum(counted[role].values()):.0f}' for role in ROLES)} |\n")
    if options.all:
        for role in ROLES:
            listed = ", ".join(f"{name} {n:g}" for name, n in counted[role].most_common())
            print(f"{role}: {listed}\n")


if __name__ == "__main__":
    main()
