"""No verdict is wrong: jobs whose end is known, many at once, good ones close to each limit.

Where a limit is counted in bytes, pages or descriptors, the good one takes all of it and the bad one
a single one more.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from environment import PYTHON, SLOW, cgroup_version, rounds, seeded

from isojob import Limits, Pool, Result, Sandbox, Status

AT_ONCE = 6
MIB = 2**20


def python(code: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", code]


@dataclass(frozen=True)
class Known:
    """A job, and how it must end."""

    command: list[str]
    status: Status
    limits: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Result], object] = lambda result: True
    collect: tuple[str, ...] = ()


def exited(code: int) -> Callable[[Result], object]:
    return lambda result: result.exit_code == code


def ended_by(number: int) -> Callable[[Result], object]:
    return lambda result: result.signal == number


def output(expected: bytes) -> Callable[[Result], object]:
    return lambda result: result.stdout == expected


def file_of(size: int) -> Callable[[Result], object]:
    return lambda result: len(result.files["a"]) == size


def peak_of(size: int) -> Callable[[Result], object]:
    return lambda result: (result.usage.memory_peak or 0) >= size


BURN = "import os, time\nwhile sum(os.times()[:4]) < %s: pass\n"
TOLD = "import os\nprint(os.times(), flush=True)\n"
"""What its start cost by its own account: a limit can be used up before a program looks at its clock."""
TOUCH = "m = bytearray(%d)\nfor i in range(0, len(m), 4096): m[i] = 1\n"
MARGIN = 1.0 * max(1, SLOW / 4)
"""Seconds that starting `sleep` may take on a busy machine: nearer than that no wall clock is honest."""
STACK = """
import ctypes
top = next(int(l.split()[0].split("-")[1], 16) for l in open("/proc/self/maps") if "[stack]" in l)
ctypes.memset(top - %d, 1, 1)
"""
DUPLICATE = "import os\nfor _ in range(%d): os.dup(0)"
SEGMENT = """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
ctypes.memset(libc.shmat(libc.shmget(0, %d, 0o1600), None, 0), 1, %d)
""".replace("%d", str(200 * MIB))
SOCKETS = """
import socket
pairs = [one for _ in range(500) for one in socket.socketpair()]
for one in pairs:
    one.setblocking(False)
    try:
        while True: one.send(bytes(65536))
    except BlockingIOError: pass
"""
CACHED = 64 * MIB
READ = """
import fcntl, os
file = open("/disk/cached", "rb", 0)
fcntl.flock(file, fcntl.LOCK_EX)  # others drop what we read
os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
while file.read(1 << 20): pass
"""

JOBS: dict[str, Known] = {
    "ok": Known(["echo", "hi"], Status.OK, check=output(b"hi\n")),
    "exit 3": Known(["sh", "-c", "exit 3"], Status.NONZERO_EXIT, check=exited(3)),
    "exit 137": Known(["sh", "-c", "exit 137"], Status.NONZERO_EXIT, check=exited(137)),
    "SIGKILL": Known(["sh", "-c", "kill -9 $$"], Status.SIGNALED, check=ended_by(signal.SIGKILL)),
    "SIGSYS": Known(["sh", "-c", "kill -SYS $$"], Status.SIGNALED, check=ended_by(signal.SIGSYS)),
    "SIGXCPU": Known(
        ["sh", "-c", "kill -XCPU $$"], Status.SIGNALED, check=ended_by(signal.SIGXCPU)
    ),
    "CPU": Known(python(BURN % 9), Status.CPU_TIME_LIMIT, {"cpu_time": 0.3}),
    "CPU, almost": Known(python(TOLD + BURN % 0.95), Status.OK, {"cpu_time": 1.0 * SLOW}),
    "CPU of orphans": Known(
        python("import os\nfor _ in range(2): os.fork()\nos.fork() and os.wait()\nwhile 1: pass"),
        Status.CPU_TIME_LIMIT,
        {"cpu_time": 0.3},
    ),
    "CPU of children that are not waited for": Known(
        python(
            "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
            "while True:\n  if os.fork() == 0:\n    while time.process_time() < 0.05: pass\n"
            "    os._exit(0)\n  time.sleep(0.02)"
        ),
        Status.CPU_TIME_LIMIT,
        {"cpu_time": 0.4},
    ),
    "wall": Known(["sleep", "60"], Status.WALL_TIME_LIMIT, {"wall_time": 0.2}),
    "wall, stopped": Known(
        ["sh", "-c", "kill -STOP $$"], Status.WALL_TIME_LIMIT, {"wall_time": 0.3}
    ),
    "wall, almost": Known(["sleep", str(4 * MARGIN)], Status.OK, {"wall_time": 5 * MARGIN}),
    "memory": Known(python(TOUCH % (200 * MIB)), Status.MEMORY_LIMIT, {"memory": 64 * MIB}),
    "memory of a child": Known(
        python(f"import os\nif os.fork() == 0:\n  m = bytearray({200 * MIB})\n"
               f"  for i in range(0, len(m), 4096): m[i] = 1\nos.wait(); os.pause()"),
        Status.MEMORY_LIMIT,
        {"memory": 64 * MIB},
    ),
    "memory of files": Known(
        ["sh", "-c", "exec head -c 200000000 /dev/zero >/tmp/x"],
        Status.MEMORY_LIMIT,
        {"memory": 64 * MIB, "disk": 512 * MIB, "file_size": None},
    ),
    "memory, almost": Known(
        python(TOUCH % (119 * MIB)),  # and the interpreter: 95 %
        Status.OK,
        {"memory": 128 * MIB},
        peak_of(118 * MIB),
    ),
    "memory refused": Known(
        python("try: bytearray(1 << 45)\nexcept MemoryError: raise SystemExit(5)"),
        Status.NONZERO_EXIT,
        {"memory": 64 * MIB},
        exited(5),
    ),
    "memory of a memfd": Known(
        python(f"import os\nf = os.memfd_create('')\nfor _ in range(200): os.write(f, bytes({MIB}))"),
        Status.MEMORY_LIMIT,
        {"memory": 64 * MIB, "file_size": None},
    ),
    "memory of System V": Known(python(SEGMENT), Status.MEMORY_LIMIT, {"memory": 64 * MIB}),
    "memory of sockets": Known(python(SOCKETS), Status.MEMORY_LIMIT, {"memory": 32 * MIB}),
    "page cache": Known(python(READ), Status.OK, {"memory": 32 * MIB}, peak_of(31 * MIB)),
    "output": Known(["yes"], Status.OUTPUT_LIMIT, {"output": 100_000}),
    "output, all of it": Known(
        ["head", "-c", "100000", "/dev/zero"],
        Status.OK,
        {"output": 100_000},
        output(bytes(100_000)),
    ),
    "output, one byte more": Known(
        ["head", "-c", "100001", "/dev/zero"],
        Status.OUTPUT_LIMIT,
        {"output": 100_000},
        output(bytes(100_000)),
    ),
    "processes, all of them": Known(
        python("import os, time\nfor _ in range(15):\n  if os.fork() == 0: time.sleep(9); os._exit(0)"),
        Status.OK,
        {"processes": 16},
    ),
    "processes, one more": Known(
        python(
            "import os, time\nfor _ in range(15):\n  if os.fork() == 0: time.sleep(9); os._exit(0)\n"
            "try: os.fork()\nexcept BlockingIOError: raise SystemExit(6)"
        ),
        Status.NONZERO_EXIT,
        {"processes": 16},
        exited(6),
    ),
    "disk, all of it": Known(
        ["sh", "-c", f"head -c {MIB} /dev/zero >a"],
        Status.OK,
        {"disk": MIB},
        file_of(MIB),
        ("a",),
    ),
    "disk, one byte more": Known(
        ["sh", "-c", f"head -c {MIB + 1} /dev/zero >a || exit 7"],
        Status.NONZERO_EXIT,
        {"disk": MIB},
        lambda result: exited(7)(result) and file_of(MIB)(result),
        ("a",),
    ),
    "inodes, almost": Known(
        python("for n in range(95): open(str(n), 'x')"), Status.OK, {"inodes": 100}
    ),
    "inodes, one more": Known(
        python("for n in range(101): open(str(n), 'x')"), Status.NONZERO_EXIT, {"inodes": 100}
    ),
    "file size, all of it": Known(
        ["sh", "-c", "exec head -c 100000 /dev/zero >a"],
        Status.OK,
        {"file_size": 100_000},
        file_of(100_000),
        ("a",),
    ),
    "file size, one byte more": Known(
        ["sh", "-c", "exec head -c 100001 /dev/zero >a"],
        Status.SIGNALED,
        {"file_size": 100_000},
        lambda result: ended_by(signal.SIGXFSZ)(result) and file_of(100_000)(result),
        ("a",),
    ),
    "open files, all of them": Known(python(DUPLICATE % 61), Status.OK, {"open_files": 64}),
    "open files, one more": Known(
        python(DUPLICATE % 62), Status.NONZERO_EXIT, {"open_files": 64}, exited(1)
    ),
    "stack, all of it": Known(python(STACK % (8 * MIB)), Status.OK, {"stack": 8 * MIB}),
    "stack, one byte more": Known(
        python(STACK % (8 * MIB + 1)),
        Status.SIGNALED,
        {"stack": 8 * MIB},
        ended_by(signal.SIGSEGV),
    ),
    "ends in time, its children do not": Known(
        ["sh", "-c", "sleep 60 & sleep 60 & echo hi"], Status.OK, check=output(b"hi\n")
    ),
}  # fmt: skip


async def test_known_ends(disk: Sandbox) -> None:
    """Each has its status, whatever runs beside it."""
    assert disk.mounts[0].source
    with open(Path(disk.mounts[0].source, "cached"), "xb") as cached:  # clean, so that it can go
        cached.write(bytes(CACHED))
        os.fsync(cached)
    chance = seeded()
    names = [
        name for name in JOBS for _ in range(1 if SLOW > 1 else rounds(2, 5000 // len(JOBS) + 1))
    ]
    chance.shuffle(names)
    wrong: list[str] = []
    seen: Counter[str] = Counter()
    slots = anyio.CapacityLimiter(AT_ONCE)
    base = {"wall_time": 20 * SLOW, "cpu_time": 10 * SLOW, "memory": 256 * MIB}
    async with Pool(disk, max_jobs=AT_ONCE) as pool:

        async def one(name: str) -> None:
            job = JOBS[name]
            async with slots:
                limits = Limits(**{**base, **job.limits})
                result = await pool.run(job.command, limits=limits, collect=job.collect)
            seen[str(result.status)] += 1
            if result.status != job.status or not job.check(result):
                said = (result.stdout or b"")[:200]
                wrong.append(f"{name}: {result} {said!r} {result.evidence}")

        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(one, name)
    print(len(names), "jobs on cgroup", cgroup_version(), dict(seen))
    assert not wrong, "\n".join(wrong)
