"""Latency, throughput and CPU of isolated jobs, as ratios to bare process creation in the same run.

    make bench                      or  python bench/run.py [--jobs N] [--seconds S] [--json FILE]
    make bench ARGS=--peers         other sandboxes, too; --peers=install gets what is missing
    make bench ARGS="--plots DIR"   and pictures (needs matplotlib)

Each way of running a job is a process of its own (worker.py); all take turns, job by job, so that the
neighbours of a shared machine disturb all alike. Baselines: ``vfork+exec`` in C with captured pipes
(the floor), and what one writes without isolation: ``asyncio.create_subprocess_exec`` with the pidfd
watcher (the default since Python 3.12), ``trio.run_process``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
import inside
import peers
import report
from driver import ALL, FLOOR, WAYS, Samples, Way, cpu_per_job, interleave, throughput, workers

import isojob

LATENCY = (
    FLOOR,
    "subprocess.run",
    "asyncio exec",
    "asyncio exec, thread watcher",
    "asyncio exec, uvloop",
    "trio.run_process",
    "isojob",
    "isojob, uvloop",
    "isojob, trio",
    "isojob, none parked",
)
BOTH = ("asyncio exec", "isojob")


def ways(names: tuple[str, ...]) -> list[Way]:
    """Those that can run here: uvloop is no dependency of ours."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        names = tuple(name for name in names if "uvloop" not in name)
    if sys.version_info >= (3, 12):  # where the pidfd watcher is the only one in use
        names = tuple(name for name in names if "thread watcher" not in name)
    return [WAYS[name] for name in names]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    out: dict[str, Any] = {"latency": {}, "throughput": {}, "absent": [], "isolation": {}}
    jobs, few = options.jobs, max(30, options.jobs // 3)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = ways(LATENCY)
        if options.peers:
            if options.peers == "install":
                peers.install()
            others, out["absent"] = peers.ways(directory)
            found += others
        out["isolation"] = {way.name: way.isolation for way in found}
        samples: dict[str, Samples]
        with workers(found, "true", directory) as started:
            samples = interleave(started, jobs, 0.003)
            out["latency"]["3 ms apart"] = samples
            out["latency"]["50 ms of idling"] = interleave(
                {name: started[name] for name in (FLOOR, *BOTH)}, few, 0.05
            )
        for job in ("c", "python", "output", "compile"):
            with workers(
                ways((FLOOR, *BOTH)) if job == "python" else ways(BOTH), job, directory
            ) as (started):
                out["latency"][f"job {job}"] = interleave(started, few // 2, 0.003)
        with workers(ways(BOTH), "true", directory) as started:
            for at_once in (1, 4, 8, 32):
                out["throughput"][at_once] = throughput(started, at_once, options.seconds)
            out["CPU of the machine, ms/job"] = cpu_per_job(started, 3 * options.seconds)
            out["CPU of the loop's thread, ms/job"] = {
                name: worker.ask(f"cpu 4 {4 * jobs}") / 1e6 for name, worker in started.items()
            }
    out["streams"] = anyio.run(inside.streams, 256)
    out["parked"] = {"MB a parked cell, of 200": anyio.run(inside.parked_cell, 200)}
    out["start"] = inside.first_call()
    return out


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=200, help="samples of each latency")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each throughput round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures there")
    parser.add_argument("--peers", nargs="?", const="found", choices=("found", "install"))
    options = parser.parse_args()
    results = measure(options)
    cpu = platform.processor() or platform.machine()
    print(f"isojob {isojob.__version__}, Python {platform.python_version()}, Linux ", end="")
    print(f"{os.uname().release}, {os.cpu_count()} CPUs ({cpu})")
    print(f"{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}\nisolation 'all': {ALL}\n")
    report.show(results)
    report.targets(results)
    if options.json:
        options.json.write_text(json.dumps(report.plain(results), indent=1))
    if options.plots:
        import plots

        plots.draw(results, options.plots)


if __name__ == "__main__":
    main()
