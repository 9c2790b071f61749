"""Many more calls than slots: what it does to the loop, to descriptors, and to those admitted.

    python bench/load.py [--calls 5000] [--overload 60]

First so many calls at once, beside a task that wants to run every 10 ms. Then, for so many seconds,
ten times as many callers as there are slots, each of which asks again as soon as it is served or turned
away: the latency of what is admitted, by thirds of the time.
"""

from __future__ import annotations

import argparse
import os
import time

import anyio

import isojob

JOB = ["/bin/true"]
BEAT = 0.01


def quantiles(values: list[float]) -> str:
    """p50, p99 and the largest, in milliseconds."""
    ordered = sorted(values)
    at = (len(ordered) // 2, int(len(ordered) * 0.99), len(ordered) - 1)
    return "p50 {:.1f}, p99 {:.1f}, max {:.1f} ms".format(*(ordered[i] * 1e3 for i in at))


async def heartbeat(late: list[float]) -> None:
    """Notes how long each beat took."""
    while True:
        start = time.perf_counter()
        await anyio.sleep(BEAT)
        late.append(time.perf_counter() - start)


async def burst(calls: int) -> None:
    """All at once."""
    late: list[float] = []
    most = 0

    async def count() -> None:
        nonlocal most
        while True:
            most = max(most, len(os.listdir("/proc/self/fd")))
            await anyio.sleep(0.05)

    async with isojob.Pool() as pool:
        await pool.run(JOB)
        start = time.perf_counter()
        async with anyio.create_task_group() as watching:
            watching.start_soon(heartbeat, late)
            watching.start_soon(count)
            async with anyio.create_task_group() as tasks:
                for _ in range(calls):
                    tasks.start_soon(pool.run, JOB)
            watching.cancel_scope.cancel()
        rate = calls / (time.perf_counter() - start)
    print(f"{calls} calls at once: {rate:.0f} jobs/s, at most {most} descriptors")
    print(f"a beat of 10 ms takes {quantiles(late)}")


async def overload(seconds: float) -> None:
    """Ten callers a slot, and a queue of one a slot."""
    done: list[tuple[float, float]] = []
    refused = 0
    async with isojob.Pool(queue=isojob.Pool().statistics().max_jobs) as pool:
        slots = pool.statistics().max_jobs
        await pool.run(JOB)
        began = time.perf_counter()

        async def caller() -> None:
            nonlocal refused
            while (start := time.perf_counter()) - began < seconds:
                try:
                    await pool.run(JOB)
                except isojob.QueueFullError:
                    refused += 1
                    await anyio.sleep(0.01)
                else:
                    done.append((start - began, time.perf_counter() - start))

        async with anyio.create_task_group() as tasks:
            for _ in range(10 * slots):
                tasks.start_soon(caller)
    print(
        f"{10 * slots} callers for {slots} slots, {seconds:.0f} s: {len(done)} jobs, {refused} refused"
    )
    for third in range(3):
        part = [taken for at, taken in done if int(at / seconds * 3) == third]
        print(f"  third {third + 1}: {quantiles(part)}")


async def run(calls: int, seconds: float) -> None:
    """Both."""
    await burst(calls)
    await overload(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--overload", type=float, default=60)
    options = parser.parse_args()
    anyio.run(run, options.calls, options.overload)
