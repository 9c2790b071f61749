"""Very many jobs of mixed kinds, some cancelled, some over a limit: is anything left, does anything grow?

    python bench/soak.py [--jobs 100000] [--json FILE] [--plot FILE]

Prints, every tenth of the way, the latency of a plain job and the memory of host and zygote; at the
end what is left of processes, cgroups, mounts, descriptors, namespaces and System V segments.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import anyio

import isojob
from isojob import Limits

SHORT = Limits(wall_time=0.05, memory="64MiB", output="64KiB")
KINDS = (
    (["true"], Limits()),
    (["sh", "-c", "echo out; echo err >&2; exit 3"], Limits()),
    (["sh", "-c", "for i in 1 2 3 4 5; do sleep 60 & done; echo"], Limits()),
    (["head", "-c", "300000", "/dev/zero"], Limits()),
    (["yes"], SHORT),
    (["sleep", "60"], SHORT),
    (["sh", "-c", "ulimit -c 0; kill -SEGV $$"], Limits()),
    (["sh", "-c", "ipcmk -M 4096; touch /tmp/a /dev/shm/b; mkdir -p x/y"], Limits()),
)


def resident(pid: int) -> float:
    """Megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def left_over() -> dict[str, int]:
    """What there is of everything that jobs are made of."""
    cgroups = sum(
        name.startswith("cell-") for _, names, _ in os.walk("/sys/fs/cgroup") for name in names
    )
    slabs = Path("/proc/slabinfo").read_text() if os.geteuid() == 0 else ""
    nets = [line for line in slabs.splitlines() if line.startswith("net_namespace ")]
    return {
        "network namespaces": int(nets[0].split()[1]) if nets else 0,
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "cell cgroups": cgroups,
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory segments": len(Path("/proc/sysvipc/shm").read_text().splitlines()) - 1,
        "files in /tmp and /dev/shm": len(os.listdir("/tmp")) + len(os.listdir("/dev/shm")),
    }


async def one(pool: isojob.Pool, chance: random.Random) -> None:
    """One job, perhaps cancelled."""
    command, limits = chance.choice(KINDS)
    patience = chance.uniform(0, 0.01) if chance.random() < 0.1 else 60
    with anyio.move_on_after(patience):
        await pool.run(command, limits=limits)


async def run(jobs: int) -> list[dict[str, float]]:
    """The samples."""
    samples: list[dict[str, float]] = []
    chance = random.Random(1)
    async with isojob.Pool() as pool:
        await pool.run(["true"])
        for tenth in range(11):
            taken = []
            for _ in range(50):
                await anyio.sleep(0.002)
                start = time.perf_counter()
                await pool.run(["true"])
                taken.append(time.perf_counter() - start)
            zygote = pool._stock.zygote
            assert zygote is not None
            sample = {
                "jobs": tenth * jobs // 10,
                "p50 ms": sorted(taken)[25] * 1e3,
                "host MB": resident(os.getpid()),
                "zygote MB": resident(zygote.pid),
            }
            samples.append(sample)
            print({name: round(value, 2) for name, value in sample.items()}, flush=True)
            if tenth == 10:
                return samples
            todo = jobs // 10

            async def worker() -> None:
                nonlocal todo
                while todo > 0:
                    todo -= 1
                    await one(pool, chance)

            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(worker)
    return samples


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args()
    anyio.run(_once)
    before = left_over()
    samples = anyio.run(run, options.jobs)
    time.sleep(3)
    after = left_over()
    for name, count in before.items():
        print(f"{name}: {count} before, {after[name]} after")
    if options.json:
        options.json.write_text(json.dumps({"samples": samples, "before": before, "after": after}))
    if options.plot:
        import plots

        plots.soak(samples, options.plot)


async def _once() -> None:
    """What a process keeps once it has run a job (imports, caches) is no leak."""
    async with isojob.Pool() as pool:
        await pool.run(["true"])


if __name__ == "__main__":
    main()
