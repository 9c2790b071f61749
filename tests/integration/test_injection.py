"""Every system call of zygote, init and launcher made to fail in turn: nothing runs half isolated.

strace injects the error (its -e inject), into the code as it is shipped. Needs root and strace.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import anyio
import pytest
from environment import PATIENT, SLOW, WHOLE, seeded, settle

from isojob import IsojobError, Mount, Pool, Root, Sandbox, Status
from isojob.errors import SandboxSetupError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to trace the zygote"),
]

SHARE = 40
"""Calls that fail in an ordinary run; all of some 200 with ISOJOB_TEST_WHOLE=1."""
LIMITS = PATIENT.model_copy(update={"memory": 64 << 20, "wall_time": 20 * max(1, SLOW / 4)})
SHOW = """set -e
grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Cap|SigIgn|SigBlk|Umask)' /proc/self/status
cat /proc/self/mounts /proc/self/limits /proc/self/cgroup /proc/sys/kernel/hostname
for link in /proc/self/ns/*; do readlink $link; done
ls /proc/self/fd
pwd; ulimit -a; id; echo $PPID
"""
MEMORY = Status.MEMORY_LIMIT
BAD = {Status.NONZERO_EXIT, Status.SIGNALED, MEMORY}
HOG = "exec dd if=/dev/zero of=/tmp/x bs=8M count=16 status=none"
"""Few calls: each costs the job CPU time, since it is traced as well."""


@contextmanager
def traced(pid: int, *options: str) -> Iterator[None]:
    """Strace on the process, and on each that it makes."""
    tracer = subprocess.Popen(["strace", "-qq", "-p", str(pid), *options])
    deadline = time.monotonic() + 10
    while f"TracerPid:\t{tracer.pid}" not in (status := Path(f"/proc/{pid}/status").read_text()):
        if "State:\tZ" in status:
            break  # the very first call is the one it waits in
        assert time.monotonic() < deadline, "strace did not attach"
        time.sleep(0.002)
    try:
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def sandbox(directory: Path, *, writable: bool) -> Sandbox:
    """The usual one, or one with a root that jobs write to."""
    if not writable:
        return Sandbox()
    directory.chmod(0o755)
    for name in ("bin", "lib", "lib64"):
        (directory / "root" / name).parent.mkdir(exist_ok=True)
        (directory / "root" / name).symlink_to(f"usr/{name}")
    (directory / "root/usr").mkdir()
    root = Root.directory(directory / "root", writable=True)
    return Sandbox(root=root, mounts=(Mount.bind("/usr", "/usr"),))


async def calls(directory: Path, seen: Sandbox) -> list[tuple[str, int]]:
    """What zygote, init and launcher call to make a cell and run a job: names, each with a count."""
    directory.mkdir()
    async with Pool(seen, limits=LIMITS, parked=0) as pool:
        await pool.run(["true"])
        assert pool._stock.zygote is not None
        with traced(pool._stock.zygote.pid, "-ff", "-o", str(directory / "trace")):
            await pool.run(["true"])
            await anyio.sleep(0.2 * SLOW)  # until the cell is gone
    most: Counter[str] = Counter()
    for path in directory.iterdir():
        text = path.read_text(errors="replace").partition("\nexecve(")[0]
        most |= Counter(re.findall(r"^(\w+)\(", text, flags=re.MULTILINE))
    most["execve"] = 1
    return [
        (name, number)
        for name, count in sorted(most.items())
        if name not in ("exit_group", "restart_syscall")
        for number in range(1, count + 1)
    ]


def program(pid: int) -> tuple[int, int]:
    """Which file the process executes: of a zygote, a memfd of its own, and of all that it forks."""
    of = os.stat(f"/proc/{pid}/exe")
    return of.st_dev, of.st_ino


def executing(file: tuple[int, int]) -> list[int]:
    """Processes that execute it."""
    found = []
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and program(int(name)) == file:
                found.append(int(name))
    return found


def normal(text: str) -> list[str]:
    """What a job sees, without what differs from cell to cell."""
    text = re.sub(r"^(Uid|Gid|uid).*\n", "", text, flags=re.MULTILINE)
    return sorted(re.sub(r":\[\d+\]|[ug]id=\d+", "", text).splitlines())


def spaces(text: str) -> set[str]:
    return set(re.findall(r"\w+:\[\d+\]", text))


@pytest.mark.parametrize("writable", [False, True], ids=["read-only", "writable"])
async def test_each_call_fails_in_turn(
    anyio_backend_name: str, tmp_path: Path, *, writable: bool
) -> None:
    """A job runs in a whole sandbox or not at all; the next one runs in any case."""
    assert shutil.which("strace"), "this test needs strace"
    outside = {os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")}
    outside = {name for name in outside if not name.startswith("time")}
    view = sandbox(tmp_path, writable=writable)
    everything = await calls(tmp_path / "calls", view)
    assert len(everything) > 100
    stages: set[str] = set()
    ran = failed = 0
    if not WHOLE:
        print(f"a share of {len(everything)}")
        everything = seeded().sample(everything, max(4, SHARE // SLOW))
    for name, number in everything:
        which = f"inject={name}:error=EIO:when={number}"
        async with Pool(view, limits=LIMITS, parked=0) as pool:
            expected = normal((await pool.run(["sh", "-c", SHOW])).stdout_text)
            assert pool._stock.zygote is not None
            file = program(pool._stock.zygote.pid)
            assert executing(file)
            options = ("-f", "-o", "/dev/null", "-e", which)
            with traced(pool._stock.zygote.pid, *options), anyio.fail_after(30 * SLOW):
                for script in (SHOW, HOG):
                    try:
                        result = await pool.run(["sh", "-c", script])
                    except IsojobError as error:
                        failed += 1
                        if isinstance(error, SandboxSetupError):
                            stages.add(error.stage)
                        continue
                    ran += 1
                    # Calls of the job itself fail, too: that is no limit's fault. To init waitid
                    # says nothing but ECHILD: else it sees no end, and the time limit does.
                    allowed = BAD if script is HOG else {Status.OK, *BAD} - {MEMORY}
                    late = {Status.WALL_TIME_LIMIT} if name == "waitid" else set()
                    assert result.status in allowed | late, (which, result)
                    if script is HOG:
                        continue
                    seen = normal(result.stdout_text)
                    if name == "close":  # the job's own fail, too
                        seen = [line for line in seen if line in expected]
                    if result.ok:
                        assert seen == expected, which
                    assert set(seen) <= set(expected), which
                    assert not spaces(result.stdout_text) & outside, which
            with anyio.fail_after(30 * SLOW):
                assert (await pool.run(["true"])).ok, which
        assert not settle(partial(executing, file)), which
    print(f"{ran} jobs ran, {failed} failed, at {len(stages)} stages: {sorted(stages)}")
    assert failed > len(everything) // 4, "no failure was hit: is strace at work?"
