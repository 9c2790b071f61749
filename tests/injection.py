"""System calls of zygotes, templates and cells that fail: what is traced, and what of it is ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import pytest
from environment import PATIENT, PYTHON, SLOW, WHOLE, children_of

from isojob import Mount, Pool, Root, Sandbox, SeccompProfile, Status, wire, wire_result
from isojob._python import PythonPool
from isojob._stock import Stock
from isojob._zygote import Zygote
from isojob.wire import Failure

LIMITS = PATIENT.model_copy(update={"memory": 64 << 20, "wall_time": 20 * max(1, SLOW / 4)})
ALL_LIMITS = LIMITS.model_copy(
    update={
        "cpus": 1.5,
        "cpuset": "0",
        "io_read_bps": 1 << 30,
        "io_write_bps": 1 << 30,
        "io_read_iops": 1 << 20,
        "io_write_iops": 1 << 20,
        "address_space": 1 << 40,
    }
)
SHOW = """set -e
grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Cap|SigIgn|SigBlk|Umask)' /proc/self/status
cat /proc/self/mounts /proc/self/limits /proc/self/cgroup /proc/sys/kernel/hostname
for link in /proc/self/ns/*; do readlink $link; done
ls -1 /proc/self/fd
pwd; ulimit -a; id; echo $PPID
"""
HOG = "exec dd if=/dev/zero of=/tmp/x bs=8M count=16 status=none"
"""Few calls: each costs the job CPU time, since it is traced as well."""
BECOME = "import os; os.execv('/bin/sh', ['sh', '-c', argument])"
NEVER = ("exit_group", "restart_syscall", "getpid", "getuid", "getgid", "umask")
"""They do not fail."""
LOOPS = {"madvise": 5}
"""Calls of a loop that may fail, of which the first are as good as all: pages got ahead of time."""

Shown = tuple[Status, str]
Run = Callable[[str], Awaitable[Shown]]
"""Runs a shell script in a job: its status, and what it has written."""


class Kind(NamedTuple):
    """A sandbox, and a pool of it with a way to run a job there."""

    sandbox: Callable[[Path, Sandbox], Sandbox]
    opened: Callable[[Sandbox], AbstractAsyncContextManager[tuple[Stock, Run]]]


def usual(directory: Path, disk: Sandbox) -> Sandbox:
    return Sandbox()


def writable(directory: Path, disk: Sandbox) -> Sandbox:
    """Its root is one that jobs write to."""
    directory.chmod(0o755)
    root = directory / "root"
    (root / "usr").mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    return Sandbox(root=Root.directory(root, writable=True), mounts=(Mount.bind("/usr", "/usr"),))


def layers(directory: Path, disk: Sandbox) -> Sandbox:
    below = writable(directory, disk)
    (directory / "top").mkdir()
    root = Root.layers([directory / "root", directory / "top"])
    return below.model_copy(update={"root": root})


def laden(directory: Path, disk: Sandbox) -> Sandbox:
    """Mounts of each kind, and a filter that its launchers cannot have ahead of time."""
    deadly = {
        "name": "deadly",
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["chdir"], "action": "SCMP_ACT_KILL_PROCESS"}],
    }
    more = (Mount.tmpfs("/mnt", size="1MiB"), Mount.bind("/usr/bin", "/box/programs"))
    return Sandbox(mounts=(*disk.mounts, *more), seccomp=SeccompProfile.model_validate(deadly))


@asynccontextmanager
async def one_job(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    async with Pool(sandbox, limits=LIMITS, parked=0) as pool:

        async def run(script: str) -> Shown:
            result = await pool.run(["sh", "-c", script])
            return result.status, result.stdout_text

        yield pool.stock, run


@asynccontextmanager
async def parked(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    """In a cell that waits for its job. It is traced, not its makers: their calls do not fail first."""
    more = LIMITS.model_copy(update={"memory": 80 << 20})
    async with Pool(sandbox, limits=more, parked=1) as pool:

        async def run(script: str) -> Shown:
            command = ["sh", "-c", script]
            result = await pool.run(command, limits=LIMITS, files={"a": b"x"}, cwd="/box")
            return result.status, result.stdout_text

        await run("true")
        await one_waits(pool.stock)
        yield pool.stock, run


@asynccontextmanager
async def all_options(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    """With all that a job can be given."""
    async with Pool(sandbox, limits=LIMITS, parked=0) as pool:

        async def run(script: str) -> Shown:
            command, text = ["sh", "-c", script], b""
            files = {"a/b": b"x", "a/c": b"y"}
            async with pool.open(
                command, limits=ALL_LIMITS, pty=True, cwd="/box", files=files, collect=["a/*"]
            ) as process:
                assert process.stdout is not None
                async for chunk in process.stdout:
                    text += chunk
                result = await process.result()
            assert result.files == files or result.uncollected, result
            return result.status, text.decode()

        yield pool.stock, run


@asynccontextmanager
async def session(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    """A session that opens, a run that has a copy of its directory, one that changes it."""
    async with Pool(sandbox, limits=LIMITS, parked=0) as pool:

        async def run(script: str) -> Shown:
            async with pool.session() as session:
                result = await session.run(["sh", "-c", script], keep=False)
                await session.run(["true"])
            return result.status, result.stdout_text

        yield pool.stock, run


@asynccontextmanager
async def warm(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    """Forks of an interpreter that become shells; for one of the scripts, of another template."""
    async with PythonPool(python=PYTHON, sandbox=sandbox, limits=LIMITS, parked=0) as pool:

        async def run(script: str) -> Shown:
            preload = ["bisect"] if script == HOG else []
            result = await pool.run_python(BECOME, argument=script, preload=preload)
            return result.status, result.stdout_text

        yield pool._pool.stock, run


@asynccontextmanager
async def parked_warm(sandbox: Sandbox) -> AsyncIterator[tuple[Stock, Run]]:
    """A fork that waits for its job. It is traced with its init, not their makers."""
    async with PythonPool(python=PYTHON, sandbox=sandbox, limits=LIMITS, parked=1) as pool:

        async def run(script: str) -> Shown:
            result = await pool.run_python(BECOME, argument=script)
            return result.status, result.stdout_text

        await run("true")
        await one_waits(pool._pool.stock)
        yield pool._pool.stock, run


KINDS = {
    "read-only": Kind(usual, one_job),
    "writable": Kind(writable, one_job),
    "all options": Kind(laden, all_options),
    "parked": Kind(usual, parked),
    "session": Kind(usual, session),
    "warm": Kind(usual, warm),
}
if os.geteuid() != 0:
    del KINDS["parked"]  # its init is not dumpable: nobody else attaches to it
elif WHOLE:  # most of its calls are not fatal: a share of them may prove nothing
    KINDS["parked, warm"] = Kind(usual, parked_warm)
STARTS = {"writable": Kind(writable, one_job), "layers, warm": Kind(layers, warm)}


def status(pid: int) -> str:
    """What the kernel tells of the process; nothing: it is gone."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def traced(*pids: int, options: tuple[str, ...]) -> Iterator[None]:
    """Strace on the processes, and on each that they make."""
    which = [word for pid in pids for word in ("-p", str(pid))]
    words = ["strace", "-qq", *which, *options]
    tracer = subprocess.Popen(words, stderr=subprocess.DEVNULL)  # it wonders about vfork
    deadline = time.monotonic() + 10 * SLOW
    for pid in pids:
        while f"TracerPid:\t{tracer.pid}" not in (text := status(pid)):
            if not text or "State:\tZ" in text:
                break  # the very first call is the one it waits in
            assert time.monotonic() < deadline, "strace did not attach"
            time.sleep(0.002)
    try:
        yield
    finally:
        tracer.terminate()
        try:
            tracer.wait(10 * SLOW)
        except subprocess.TimeoutExpired:
            # It waits to detach a cell's pid 1, whose end waits for a child that it has to reap.
            tracer.kill()
            tracer.wait()


@contextmanager
def traced_from_birth(*options: str) -> Iterator[set[tuple[int, int]]]:
    """Strace on each zygote that is started meanwhile, from its execve on; what they execute."""
    programs = set()
    with ExitStack() as tracers, pytest.MonkeyPatch.context() as patch:

        def start(words: list[str], *, executable: str, **more: Any) -> Any:
            of = os.stat(executable)
            programs.add((of.st_dev, of.st_ino))
            waiting = ["sh", "-c", 'kill -STOP $$; exec "$0" "$@"', executable, *words[1:]]
            child = subprocess.Popen(waiting, **more)
            while "State:\tT" not in status(child.pid):
                time.sleep(0.001)
            tracers.enter_context(traced(child.pid, options=options))
            child.send_signal(signal.SIGCONT)
            return child

        module = SimpleNamespace(**{**vars(subprocess), "Popen": start})
        patch.setattr("isojob._zygote.subprocess", module)
        yield programs


def cell(stock: Stock) -> list[int]:
    """The init and the launcher of the one that there is; nothing, while there is another or none."""
    assert stock.zygote is not None
    with suppress(OSError):
        children = children_of(stock.zygote.pid)
        # A template and what reaps it have no children of their own.
        makers = 0 if stock.template is None else 2
        cells = [[pid, *of] for pid in children if (of := children_of(pid))]
        if len(cells) == 1 == len(children) - makers:
            return cells[0]
    return []


async def one_waits(stock: Stock) -> None:
    """Until a cell waits for its job, and there is no other."""
    while not cell(stock):  # noqa: ASYNC110 - another process's doing
        await anyio.sleep(0.01)
    await anyio.sleep(0.1 * SLOW)  # until it waits


def makers(stock: Stock) -> list[int]:
    """The zygote, and the template if it has one; a cell if one is parked."""
    if stock.parked:
        return cell(stock)
    assert isinstance(stock.zygote, Zygote)
    return list(dict.fromkeys((stock.zygote.pid, stock.zygote.template_pid)))


def calls(traces: Path) -> list[tuple[str, int]]:
    """The names of what each process calls until it executes a stranger's program, with counts."""
    most: Counter[str] = Counter(execve=1)
    for path in traces.iterdir():
        text = path.read_text(errors="replace")
        _, ours, rest = text.partition('\nexecve("/proc/self/fd/')  # of a zygote
        text = (rest if ours else text).partition("\nexecve(")[0]
        most |= Counter(re.findall(r"^(\w+)\(", text, re.MULTILINE))
    return [
        (name, number)
        for name, count in sorted(most.items())
        if name not in NEVER
        for number in range(1, min(count, LOOPS.get(name, count)) + 1)
    ]


@contextmanager
def told() -> Iterator[list[Failure]]:
    """What the native code tells of its failures, whatever comes of it."""
    said: list[Failure] = []
    parse = wire.parse_failure

    def hear(message: wire.Message) -> Failure:
        said.append(failure := parse(message))
        return failure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "parse_failure", hear)
        patch.setattr(wire_result, "parse_failure", hear)
        yield said


def program(pid: int) -> tuple[int, int]:
    """Which file the process executes: of a zygote, a memfd of its own, and of all that it forks."""
    of = os.stat(f"/proc/{pid}/exe")
    return of.st_dev, of.st_ino


def executing(programs: set[tuple[int, int]]) -> list[int]:
    """Processes that execute one of them."""
    found = []
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and program(int(name)) in programs:
                found.append(int(name))
    return found


def stages(native: Path) -> dict[str, bool]:
    """The stages that the sources name; whether a subject follows."""
    found = {}
    for path in (*native.glob("*.c"), *native.glob("warm/*.c")):
        for at, words in re.findall(
            r'\bfail(_at)?\(\s*&?\w+,\s*((?:[^()";]|"[^"]*")*)', path.read_text()
        ):
            found.update(dict.fromkeys(re.findall(r'"([^"]*)"', words), bool(at)))
    return found
