"""kill -9 at random moments: of zygote, init, job and host. Seeds are printed.

ISOJOB_TEST_ROUNDS says how many rounds; an ordinary run has a few.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import anyio
from environment import SLOW, children_of

from isojob import IsojobError, Limits, Pool, PoolBrokenError, Result, Status

ROUNDS = int(os.environ.get("ISOJOB_TEST_ROUNDS", "25" if SLOW == 1 else "5"))
BOUND = 20 * SLOW
LIMITS = Limits(wall_time=10 * SLOW)
JOBS = (
    ["sh", "-c", "echo hi"],
    ["sh", "-c", "sleep 0.05; echo hi"],
    ["sh", "-c", "sleep 60 & sleep 0.02; echo hi"],
)


def seeded() -> random.Random:
    seed = int(os.environ.get("ISOJOB_TEST_SEED", random.randrange(2**32)))
    print(f"seed {seed}")
    return random.Random(seed)


def victims(zygote: int, chance: random.Random) -> list[int]:
    """The zygote, or an init of its cells, or what an init has for a child."""
    kind = chance.randrange(3)
    if kind == 0:
        return [zygote]
    inits = children_of(zygote)
    if kind == 1:
        return inits
    found = []
    for pid in inits:
        with suppress(OSError):
            found += children_of(pid)
    return found


async def test_random_kills() -> None:
    """Each call ends with a true verdict or a named error, and the next one works."""
    chance, ends = seeded(), dict[str, int]()
    async with Pool(limits=LIMITS, parked=4, max_jobs=4) as pool:
        for _ in range(ROUNDS):
            outcomes: list[Result | IsojobError] = []

            async def one(
                command: list[str], outcomes: list[Result | IsojobError] = outcomes
            ) -> None:
                try:
                    outcomes.append(await pool.run(command))
                except IsojobError as error:
                    outcomes.append(error)

            with anyio.fail_after(BOUND):
                async with anyio.create_task_group() as tasks:
                    for command in JOBS:
                        tasks.start_soon(one, command)
                    await anyio.sleep(chance.uniform(0, 0.06 * SLOW))
                    zygote = pool._stock.zygote
                    if zygote is not None:
                        with suppress(OSError):
                            if found := victims(zygote.pid, chance):
                                os.kill(chance.choice(found), signal.SIGKILL)
            assert len(outcomes) == len(JOBS)
            for outcome in outcomes:
                name = type(outcome).__name__
                if isinstance(outcome, Result):
                    name = str(outcome.status)
                    if outcome.status == Status.OK:
                        assert outcome.stdout == b"hi\n"
                    else:  # the one that was killed
                        assert outcome.signal == signal.SIGKILL, outcome
                ends[name] = ends.get(name, 0) + 1
            with anyio.fail_after(BOUND):
                for attempt in range(2):
                    try:
                        assert (await pool.run(JOBS[0])).stdout == b"hi\n"
                        break
                    except PoolBrokenError:  # its cell was dying as it read the job
                        if attempt:
                            raise
    print(ends)
    assert set(ends) <= {"ok", "signaled", "PoolBrokenError", "SandboxSetupError"}
    assert ends["ok"] > ROUNDS


HOST = """
import sys, anyio, isojob
async def main():
    async with isojob.Pool() as pool:
        async def loop(n):
            while True:
                await pool.run(["sh", "-c", "sleep 60 & sleep 0.0" + str(n), sys.argv[1]])
        async with anyio.create_task_group() as tasks:
            for n in range(4):
                tasks.start_soon(loop, n)
            await anyio.sleep(0.05)
            print("ready", flush=True)
anyio.run(main)
"""


def of(pid: int, token: str) -> list[str]:
    """What there is of a host process: its jobs' processes and its pools' cgroups."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if token.encode() in (entry / "cmdline").read_bytes():
                    found.append(f"process {entry.name}")
    for top, names, _ in os.walk("/sys/fs/cgroup"):
        found += [f"{top}/{name}" for name in names if name.startswith(f"isojob-{pid}-")]
    return found


def test_host_is_killed() -> None:
    """Nothing of a host that was killed survives it for long."""
    chance = seeded()
    for number in range(max(2, ROUNDS // 5)):
        token = f"host-{os.getpid()}-{number}"
        with subprocess.Popen(
            [sys.executable, "-c", HOST, token], stdout=subprocess.PIPE, text=True
        ) as host:
            assert host.stdout is not None
            assert host.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.1 * SLOW))
            host.kill()
        deadline = time.monotonic() + BOUND
        while left := of(host.pid, token):
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
