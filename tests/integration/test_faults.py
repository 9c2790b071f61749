"""What goes wrong around a job: stopped helpers, second cancels, unreadable files, odd hosts."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from environment import PATIENT, SLOW, children_of, run_python, settle
from injection import status, told, traced

import isojob
from isojob import Limits, Pool, PoolBrokenError, run_isolated
from isojob import _cell as cell_module
from isojob import _lease as lease_module
from isojob import _run as run_module
from isojob._spec import CellSpec
from isojob._zygote import Zygote


def script(*lines: str) -> subprocess.CompletedProcess[str]:
    """A Python program of its own, for what would change the whole process."""
    head = ("import os, resource, signal, sys, isojob", "run = isojob.run_isolated_sync")
    return run_python(*head, *lines)


async def test_stopped_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zygote that somebody stopped is replaced after a bounded wait; nobody waits for ever."""
    monkeypatch.setattr(cell_module, "STUCK_SECONDS", 0.5 * SLOW)
    async with Pool(parked=0) as pool:
        assert pool._stock.zygote is not None
        os.kill(pool._stock.zygote.pid, signal.SIGSTOP)
        with anyio.fail_after(20 * SLOW), pytest.raises(PoolBrokenError, match="not answer"):
            await pool.run(["true"])
        assert (await pool.run(["true"])).ok
        assert pool.statistics().zygotes == 2


async def test_stopped_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped init cannot keep the wall time limit; the call ends, its zygote is replaced."""
    monkeypatch.setattr(cell_module, "STUCK_SECONDS", 0.5 * SLOW)
    read, write = os.pipe()
    async with Pool(parked=0) as pool:

        async def stop() -> None:
            await anyio.wait_readable(read)  # before its job begins there would be another cell
            assert pool._stock.zygote is not None
            for pid in children_of(pool._stock.zygote.pid):
                os.kill(pid, signal.SIGSTOP)

        with anyio.fail_after(20 * SLOW):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stop)
                limits = Limits(wall_time=0.6 * SLOW)
                with pytest.raises(PoolBrokenError, match="wall time"):
                    await pool.run(["sh", "-c", "echo; sleep 600"], limits=limits, stdout=write)
            assert (await pool.run(["true"])).ok
        assert pool.statistics().zygotes == 2
        assert pool._stock.retired == []
    os.close(read)
    os.close(write)


async def test_job_that_ends_beside_a_stopped_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its init has said before the zygote was given up is its result."""
    monkeypatch.setattr(cell_module, "STUCK_SECONDS", 0.3 * SLOW)

    async def answers(_: object, seconds: float) -> bool:
        await anyio.sleep(1.5 * SLOW)
        return False

    monkeypatch.setattr(Zygote, "answers", answers)
    async with Pool(parked=0) as pool:
        result = await pool.run(["sh", "-c", f"sleep {0.6 * SLOW}; echo end"])
        assert result.stdout == b"end\n"


async def test_init_that_dies_before_it_has_its_maps(is_root: bool) -> None:
    """They are written by its pid, which nobody else gets: it is the zygote's child, and not reaped."""
    seen = set()

    def kill(zygote: int) -> None:
        settle(lambda: not children_of(zygote), 10 * SLOW)
        (child,) = children_of(zygote)
        os.kill(child, signal.SIGKILL)
        settle(lambda: "State:\tZ" not in status(child), 10 * SLOW)
        for _ in range(20):
            seen.add("State:\tZ" in status(child))
            time.sleep(0.05)

    async with Pool(limits=PATIENT, parked=0) as pool:
        assert pool._stock.zygote is not None
        zygote = pool._stock.zygote.pid
        held_up = f"inject=clone3:delay_exit={2_500_000 + 500_000 * SLOW}:when=1"
        with traced(zygote, options=("-e", "trace=clone3", "-e", held_up)), told() as said:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, kill, zygote)
                assert (await pool.run(["true"])).ok, "the next cell has it"
        assert seen == {True}
        # Who has no memory any more has files in /proc that are root's.
        end = ("start init", errno.EPIPE) if is_root else ("setgroups deny", errno.EACCES)
        assert [(failure.stage, failure.errno) for failure in said] == [end]
        assert pool.statistics().zygotes == 1


async def test_long_jobs_are_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life is all it takes, with a wall time limit and without."""
    stuck = max(0.6, 0.1 * SLOW)  # what a busy machine may take to answer
    monkeypatch.setattr(cell_module, "STUCK_SECONDS", stuck)
    for limits in (Limits(), Limits(wall_time=None)):
        result = await run_isolated(["sh", "-c", f"sleep {2.5 * stuck}; echo end"], limits=limits)
        assert result.stdout == b"end\n"


async def test_dead_zygotes_do_not_pile_up() -> None:
    """A dead zygote's cgroups and uids go with its last job, not only with the pool."""
    async with Pool(parked=1) as pool:
        for number in range(3):
            assert pool._stock.zygote is not None
            subtree = pool._stock.zygote.subtree
            assert subtree is not None
            os.kill(pool._stock.zygote.pid, signal.SIGKILL)
            with anyio.fail_after(10 * SLOW):
                while pool.statistics().zygotes < number + 2:
                    with suppress(PoolBrokenError):  # met the dying one
                        assert (await pool.run(["true"])).ok
            assert pool._stock.retired == []
            assert not any(directory.exists() for directory in subtree.directories)


def test_second_native_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel by asyncio itself goes through anyio's shield: the call returns with nothing left anyway."""
    gone: list[bool] = []
    original = lease_module.Lease._until_end_of_file

    async def recorded(self: lease_module.Lease, deadline: float) -> bool:
        gone.append(await original(self, deadline))
        return gone[-1]

    monkeypatch.setattr(lease_module.Lease, "_until_end_of_file", recorded)

    async def main() -> None:
        async with Pool(parked=0) as pool:
            for number, pause in enumerate((0.0, 0.0005, 0.002, 0.005)):
                task = asyncio.create_task(
                    pool.run(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 600 & done; wait"])
                )
                await asyncio.sleep(0.3 * SLOW)
                task.cancel()
                await asyncio.sleep(pause)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert gone == [True] * (number + 1)
            assert pool.statistics().running == 0

    asyncio.run(main())


def test_cancel_while_the_pool_opens() -> None:
    """A native cancel of `async with Pool()` leaves no zygote behind."""

    async def main() -> None:
        for pause in (0.0, 0.001, 0.003, 0.01):
            pool = Pool()
            task = asyncio.create_task(pool.__aenter__())
            await asyncio.sleep(pause)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                assert pool._stock.zygote is None
            else:  # was faster
                await pool.aclose()

    asyncio.run(main())


async def test_unreadable_stdin() -> None:
    """A read error of the caller's file is the caller's OSError, not half an input."""
    with open("/proc/self/mem", "rb") as unreadable, pytest.raises(OSError, match="Input/output"):
        await run_isolated(["sleep", "5"], stdin=unreadable)


def test_host_with_default_sigpipe() -> None:
    """A job that closes its stdin does not kill a host that put SIGPIPE back to its default."""
    done = script(
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
        "for job in ('exec <&-; sleep 0.1', 'exit 3', 'sleep 0.02; exit 3'):",
        "    run(['sh', '-c', job], input=bytes(10_000_000))",
        "print(signal.sigpending(), run(['true']).status)",
    )
    assert (done.stdout, done.returncode) == ("set() ok\n", 0), done.stderr


def test_protection_from_the_oom_killer_is_not_inherited() -> None:
    """A daemon with OOMScoreAdjust=-900 does not pass that on to jobs."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to lower its own oom_score_adj")
    done = script(
        "open('/proc/self/oom_score_adj', 'w').write('-900')",
        "print(run(['cat', '/proc/self/oom_score_adj']).stdout)",
    )
    assert done.stdout == "b'0\\n'\n", done.stderr


def test_no_descriptor_for_collected_files() -> None:
    """The result comes back; what could not be taken is named."""
    done = script(
        "run(['true'])",
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]",
        "room = max(map(int, os.listdir('/proc/self/fd')))",
        "reasons = set()",
        "for more in range(1, 16):",
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (room + more, hard))",
        "    try: r = run(['sh', '-c', 'echo 1 > a; echo 2 > b'], collect=['a', 'b'])",
        "    except (OSError, isojob.SandboxSetupError): continue",
        "    except isojob.PoolBrokenError as e: reasons.add(str(e)); continue",
        "    assert r.ok and len(r.files) + len(r.uncollected) == 2, r",
        "    reasons.update(r.uncollected.values())",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))",
        "assert run(['true']).ok",
        "print(sorted(reason for reason in reasons if 'nonsense' in reason))",
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


async def test_collect_says_what_it_skips(tmp_path: Path) -> None:
    """Too deep, in another mount: named, never silently left out."""
    (tmp_path / "there").write_text("x")
    tmp_path.chmod(0o755)
    (tmp_path / "there").chmod(0o644)
    sandbox = isojob.Sandbox(mounts=[isojob.Mount.bind(tmp_path, "/box/bound")])
    deep = "/".join("d" * 40)
    result = await run_isolated(
        ["sh", "-c", f"mkdir -p {deep}; touch {deep}/file"],
        collect=["bound/there", f"{deep}/file"],
        sandbox=sandbox,
    )
    assert result.uncollected == {
        "bound/there": "in another mount",
        f"{deep}/file": "too many directories deep",
    }


async def test_dead_zygote_under_a_full_stock() -> None:
    """Not one call fails for the parked cells of a zygote that was killed in idle times."""
    async with Pool(parked=8) as pool:
        await pool.run(["true"])
        await anyio.sleep(0.2 * SLOW)
        assert pool.statistics().parked == 8
        assert pool._stock.zygote is not None
        os.kill(pool._stock.zygote.pid, signal.SIGKILL)
        await anyio.sleep(0.2 * SLOW)
        for _ in range(4):
            assert (await pool.run(["true"])).ok
        assert pool.statistics().zygotes == 2


@pytest.mark.parametrize("who", ["init", "launcher"])
async def test_dead_parked_cells(who: str) -> None:
    """A job that finds its parked cell dead has not been read, and runs in another one."""
    async with Pool(parked=3) as pool:
        await pool.run(["true"])
        await anyio.sleep(0.3 * SLOW)
        zygote = pool._stock.zygote
        assert zygote is not None
        inits = children_of(zygote.pid)
        assert len(inits) == 3
        for pid in inits:
            victims = [pid] if who == "init" else children_of(pid)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
        await anyio.sleep(0.3 * SLOW)
        for _ in range(5):
            assert (await pool.run(["echo", "hi"], collect=["none"])).stdout == b"hi\n"
        assert pool.statistics().zygotes == 1


async def test_opened_again() -> None:
    """A call of the pool's former life ends with PoolClosedError, and harms nothing."""
    errors: list[type[BaseException]] = []
    pool = Pool(parked=0)

    async def one() -> None:
        try:
            await pool.run(["sleep", "600"])
        except isojob.IsojobError as error:
            errors.append(type(error))

    async with anyio.create_task_group() as tasks:
        pool.open_now()
        tasks.start_soon(one)
        await anyio.sleep(0.3 * SLOW)
        pool.close()
        async with pool:
            assert (await pool.run(["true"])).ok
            await anyio.sleep(0.2 * SLOW)
    assert errors == [isojob.PoolClosedError]


def test_fork_while_a_job_reads_its_stdin() -> None:
    """The child's copy of the pipe does not keep the job from its end of file, nor us busy."""
    done = script(
        "import threading, time",
        "child = []",
        "def fork():",
        f"    time.sleep({0.3 * SLOW})",
        "    pid = os.fork()",
        f"    if pid == 0: time.sleep({SLOW}); os._exit(0)",
        "    child.append(pid)",
        "threading.Thread(target=fork).start()",
        f"code = 'sleep {0.6 * SLOW}; wc -c; echo end'",
        "r = run(['sh', '-c', code], input=bytes(1_000_000))",
        "print(r.status, r.stdout)",
        "os.waitpid(child[0], 0)",
    )
    assert done.stdout == "ok b'1000000\\nend\\n'\n", done.stderr


def test_many_open_files() -> None:
    """Descriptors above 1023 are as good as others when something goes wrong."""
    done = script(
        "import asyncio, pathlib",
        "def children(pid):",
        "    return pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()",
        "def runs(pid): return pathlib.Path(f'/proc/{pid}/comm').read_text() == 'sleep\\n'",
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))",
        "held = [open('/dev/null') for _ in range(1100)]",
        "async def main():",
        "    async with isojob.Pool(parked=0) as pool:",
        "        task = asyncio.create_task(pool.run(['sleep', '600']))",
        "        while pool._stock.zygote is None: await asyncio.sleep(0.01)",
        "        zygote = pool._stock.zygote.pid",
        "        while not any(runs(job) for init in children(zygote) for job in children(init)):",
        "            await asyncio.sleep(0.01)",
        "        for pid in children(zygote): os.kill(int(pid), signal.SIGKILL)",
        "        try: await task",
        "        except isojob.PoolBrokenError as e: print('broken')",
        "asyncio.run(main())",
    )
    assert (done.stdout, done.stderr) == ("broken\n", "")


async def test_sign_of_life_without_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the host is out of descriptors when it asks is no reason to end a job."""
    monkeypatch.setattr(cell_module, "STUCK_SECONDS", 0.2 * SLOW)
    async with Pool(parked=0) as pool:
        assert pool._stock.zygote is not None
        make = pool._stock.zygote.make

        def no_room(spec: CellSpec | None, output: Sequence[int] = ()) -> tuple[socket.socket, int]:
            if spec is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return make(spec, output)

        monkeypatch.setattr(pool._stock.zygote, "make", no_room)
        result = await pool.run(["sh", "-c", f"sleep {0.8 * SLOW}; echo end"])
        assert result.stdout == b"end\n"


def test_stdin_that_blocks() -> None:
    """A file whose read never returns does not keep the call, nor the process from ending."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to open /proc/kmsg")
    done = script(
        "file = open('/proc/kmsg', 'rb', buffering=0)",  # waits for the kernel's next message
        f"print(run(['sleep', '0.3'], stdin=file, timeout={20 * SLOW}).status)",
        f"try: run(['sleep', '600'], stdin=file, timeout={0.5 * SLOW})",
        "except TimeoutError: print('timeout')",
    )
    assert (done.stdout, done.returncode) == ("ok\ntimeout\n", 0), done.stderr


async def test_displaced_pools_are_all_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel while pools make room for another one loses none of them."""
    monkeypatch.setattr(run_module, "MAX_POOLS", 1)
    pools = [run_module._default_pool(isojob.Sandbox(hostname=f"h{n}"))[0] for n in range(3)]
    for pool in pools:
        pool.pins -= 1
        await pool.run(["true"])
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run_isolated(["true"])
    await run_isolated(["true"])
    assert [pool._stock.open for pool in pools] == [False, False, False]


SIBLINGS = b"""
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static char stacks[8][8192];
static int nothing(void *at) { syscall(SYS_exit, 0); return 0; }
static int sleeps(void *at) { for (;;) syscall(SYS_pause); return 0; }
int main(int argc, char **argv)
{
    const int flags = CLONE_VM | CLONE_PARENT | SIGCHLD;
    for (int i = atoi(argv[1]); i > 0; i--)
        clone(sleeps, (char *)malloc(1024) + 1000, flags, 0);
    int own = 0;
    for (int i = 1; i < 6 && own == 0; i++)
        if (syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0) == 0)
            own = i;
    for (;;)
        clone(nothing, stacks[own] + 8000, flags, 0);
}
"""


async def test_siblings_that_die_all_the_time() -> None:
    """Init, whose children they are, has thousands to search for each, and looks at its timers."""
    limits = Limits(wall_time=1, cpu_time=None, memory="1GiB", processes=5000)
    count = str(4000 if SLOW == 1 else 1000)
    async with Pool(parked=0) as pool, pool.session(files={"main.c": SIBLINGS}) as session:
        await session.run(["gcc", "-o", "main", "main.c"], check=True)
        with anyio.fail_after(20 * SLOW):
            result = await session.run(["./main", count], keep=False, limits=limits)
        assert result.status == "wall_time_limit", result
        with anyio.move_on_after(0.5) as scope:
            await session.run(["./main", count], keep=False, limits=limits)
        assert scope.cancelled_caught
