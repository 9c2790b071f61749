"""Workers side by side, asked in turn: what disturbs one, disturbs all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from worker import JOBS

HERE = Path(__file__).parent
FLOOR = "vfork+exec (C)"


class Worker:
    """A process that runs jobs in one way; see worker.py for what it understands."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> Any:
        """Sends a line and reads the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended: {question}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@dataclass(frozen=True)
class Way:
    """How a job is run.

    Attributes:
        name: What tables call it.
        kind: The way of worker.py; ``floor`` is the C program.
        isolation: What it gives, in words.
        prefix: A peer's command line.
    """

    name: str
    kind: str
    isolation: str = "none"
    prefix: tuple[str, ...] = ()


WAYS = {
    way.name: way
    for way in (
        Way(FLOOR, "floor"),
        Way("subprocess.run", "subprocess.run"),
        Way("asyncio exec", "asyncio"),
        Way("asyncio exec, thread watcher", "asyncio-threads"),
        Way("asyncio exec, uvloop", "uvloop"),
        Way("trio.run_process", "trio"),
        Way("isojob", "isojob", "all"),
        Way("isojob, uvloop", "isojob-uvloop", "all"),
        Way("isojob, trio", "isojob-trio", "all"),
        Way("isojob, none parked", "isojob-dry", "all"),
    )
}
ALL = (
    "fresh user, pid, mnt, net, ipc, uts, cgroup namespaces; own root; cgroup limits and accounts; "
    "seccomp; no capability"
)
"""What ``all`` stands for."""


def floor(directory: Path) -> Path:
    """Compiles the C program."""
    binary = directory / "vforkexec"
    if not binary.exists():
        subprocess.run(["gcc", "-O2", "-o", binary, HERE / "vforkexec.c"], check=True)
    return binary


@contextmanager
def workers(ways: Iterable[Way], job: str, directory: Path) -> Iterator[dict[str, Worker]]:
    """Starts the workers, warmed up by five jobs each."""
    started: dict[str, Worker] = {}
    try:
        for way in ways:
            command = (
                [str(floor(directory)), *JOBS[job]]
                if way.kind == "floor"
                else [sys.executable, str(HERE / "worker.py"), way.kind, job, *way.prefix]
            )
            started[way.name] = Worker(command)
        for worker in started.values():
            for _ in range(5):
                worker.ask("once")
        yield started
    finally:
        for worker in started.values():
            worker.__exit__(None, None, None)


@dataclass
class Samples:
    """Nanoseconds of one way: its jobs one by one, and by phase."""

    total: list[int] = field(default_factory=list)
    phases: dict[str, list[int]] = field(default_factory=dict)

    def add(self, answer: dict[str, int]) -> None:
        """Takes what a worker says of one job."""
        self.total.append(answer["total"])
        for name, value in answer.items():
            if name != "total":
                self.phases.setdefault(name, []).append(value)

    def quantile(self, share: float) -> float:
        """Microseconds."""
        return quantile(self.total, share) / 1e3

    def summary(self) -> dict[str, float]:
        """p50 and p99, and the median of each phase, in microseconds."""
        out = {"p50": self.quantile(0.5), "p99": self.quantile(0.99)}
        return out | {name: quantile(values, 0.5) / 1e3 for name, values in self.phases.items()}


def quantile(values: list[int], share: float) -> float:
    """The value that so large a share stays below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def interleave(started: dict[str, Worker], jobs: int, pause: float) -> dict[str, Samples]:
    """Each way in turn, `jobs` times, after so many seconds of idling."""
    samples = {name: Samples() for name in started}
    for _ in range(jobs):
        for name, worker in started.items():
            time.sleep(pause)
            samples[name].add(worker.ask("once"))
    return samples


def throughput(
    started: dict[str, Worker], at_once: int, seconds: float, rounds: int = 3
) -> dict[str, float]:
    """Jobs per second; the ways alternate, the median round counts."""
    figures: dict[str, list[float]] = {name: [] for name in started}
    for _ in range(rounds):
        for name, worker in started.items():
            figures[name].append(worker.ask(f"many {at_once} {seconds}"))
            time.sleep(0.3)
    return {name: sorted(values)[len(values) // 2] for name, values in figures.items()}


def busy() -> float:
    """CPU seconds of the whole machine so far, kernel workers included (proc(5), stat)."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(word) for word in words]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def cpu_per_job(started: dict[str, Worker], seconds: float) -> dict[str, float]:
    """Milliseconds of CPU that one job costs the machine: 4 in flight, less what idling costs."""
    out = {}
    for name, worker in started.items():
        before, start = busy(), time.perf_counter()
        rate = worker.ask(f"many 4 {seconds}")
        jobs = rate * seconds
        time.sleep(0.5)  # what ends behind the jobs belongs to them
        used, taken = busy() - before, time.perf_counter() - start
        idle_before = busy()
        time.sleep(taken)
        out[name] = max(0.0, used - (busy() - idle_before)) / jobs * 1e3
    return out
