"""Cancellation, pools, threads, event loops, forks, and deaths at the wrong moment."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import anyio
import pytest
import trio
from environment import SLOW, WHOLE, cgroup_version, children_of, cmdline, run_python, settle

import isojob
from isojob import Limits, Pool, PoolBrokenError, PoolClosedError, QueueFullError, run_isolated
from isojob import _run as run_module


def named(name: str) -> list[int]:
    """Host pids of processes with that name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text() == f"{name}\n":
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def cells() -> set[str]:
    """Cgroups of cells of this process that hold more than a parked launcher."""
    found: set[str] = set()
    for top, directories, _ in os.walk("/sys/fs/cgroup"):
        if f"isojob-{os.getpid()}-" in top:
            found.update(os.path.join(top, name) for name in directories)
    return found


async def test_cancel_leaves_nothing() -> None:
    """A cancelled call returns when the job's processes and cgroup are gone."""
    async with Pool(parked=0) as pool:
        with anyio.move_on_after(0.3 * SLOW) as scope:
            await pool.run(["sh", "-c", "for i in 1 2 3 4; do sleep 7654 & done; sleep 7654"])
        assert scope.cancelled_caught
        assert not cells()
        assert not [pid for pid in named("sleep") if b"7654" in cmdline(pid)]
        assert pool.statistics().running == 0
        assert (await pool.run(["echo", "next"])).stdout == b"next\n"


async def test_cancel_at_any_time() -> None:
    """Cancelled after a delay of every length, while streaming and collecting too."""
    async with Pool() as pool:
        for step in range(30):
            with anyio.move_on_after(step * 0.001 * SLOW):
                await pool.run(
                    ["sh", "-c", "head -c 100000 /dev/zero; cat; sleep 600"],
                    input=b"x" * 200_000,
                    files={"a": b"b"},
                    collect=["*"],
                )
        assert (await pool.run(["true"])).ok


async def test_storm_of_cancels() -> None:
    """Many calls cancelled at once."""
    async with Pool(max_jobs=16) as pool:
        with anyio.move_on_after(0.5 * SLOW):
            async with anyio.create_task_group() as tasks:
                for _ in range(60):
                    tasks.start_soon(pool.run, ["sleep", "600"])
        assert pool.statistics().running == 0
        assert pool.statistics().waiting == 0
        assert (await pool.run(["true"])).ok


async def test_many_at_once() -> None:
    """More calls than slots all get their turn."""
    results: list[bytes | None] = []

    async def one(number: int) -> None:
        result = await run_isolated(["echo", str(number)])
        results.append(result.stdout)

    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(one, number)
    assert sorted(results, key=str) == sorted([b"%d\n" % n for n in range(50)], key=str)


async def test_bounded_queue() -> None:
    """A full queue turns the next call away at once."""
    async with Pool(max_jobs=1, queue=1) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.run, ["sleep", "600"])
        await anyio.sleep(0.1)
        tasks.start_soon(pool.run, ["sleep", "600"])
        await anyio.sleep(0.1)
        with pytest.raises(QueueFullError):
            await pool.run(["true"])
        tasks.cancel_scope.cancel()


async def test_pool_is_closed() -> None:
    """A pool works inside its block only; calls under way end with PoolClosedError."""
    pool = Pool()
    with pytest.raises(PoolClosedError):
        await pool.run(["true"])
    errors: list[type[BaseException]] = []

    async def one() -> None:
        try:
            await pool.run(["sleep", "600"])
        except isojob.IsojobError as error:
            errors.append(type(error))

    async with anyio.create_task_group() as tasks, pool:
        tasks.start_soon(one)
        await anyio.sleep(0.3 * SLOW)
    assert errors == [PoolClosedError]
    with pytest.raises(PoolClosedError):
        await pool.run(["true"])


async def test_dead_zygote_is_replaced() -> None:
    """Kill -9 of the zygote: a running job may report, the next call gets a new zygote."""
    async with Pool() as pool:
        outcome: list[object] = []

        async def one() -> None:
            try:
                outcome.append(
                    (await pool.run(["sh", "-c", f"sleep {0.5 * SLOW}; echo done"])).stdout
                )
            except PoolBrokenError as error:
                outcome.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            await anyio.sleep(0.2 * SLOW)
            assert pool._stock.zygote is not None
            os.kill(pool._stock.zygote.pid, signal.SIGKILL)
            # Another pool that starts now sweeps; the job of the dead zygote is not its to end.
            async with Pool(parked=0) as other:
                assert (await other.run(["true"])).ok
        assert outcome == [b"done\n"]
        assert (await pool.run(["echo", "again"])).stdout == b"again\n"
        assert pool.statistics().zygotes == 2


async def test_dead_init_is_an_error() -> None:
    """Kill -9 of a cell's init is never a verdict about the job."""
    read, write = os.pipe()
    async with Pool(parked=0) as pool:

        async def kill() -> None:
            await anyio.wait_readable(read)  # before its job begins there would be another cell
            assert pool._stock.zygote is not None
            for pid in children_of(pool._stock.zygote.pid):
                os.kill(pid, signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            with pytest.raises(PoolBrokenError):
                await pool.run(["sh", "-c", "echo; exec sleep 600"], stdout=write)
        assert (await pool.run(["true"])).ok
    os.close(read)
    os.close(write)


async def test_a_child_that_stops_does_not_wake_init(python: str) -> None:
    """An orphan, init's own child, that stops and goes on 300 times: init sleeps on."""
    code = (
        "import os, signal, sys, time\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if (orphan := os.fork()) == 0: signal.pause()\n"
        "    os.write(write, b'%d' % orphan)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "orphan = int(os.read(read, 20))\n"
        "for _ in range(300):\n"
        "    for number in (signal.SIGSTOP, signal.SIGCONT):\n"
        "        os.kill(orphan, number)\n"
        "        time.sleep(0.001)\n"
        "print(flush=True)\n"
        "sys.stdin.readline()"
    )
    async with Pool(parked=0) as pool, pool.open([python, "-I", "-S", "-c", code]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdout.receive()
        assert pool._stock.zygote is not None
        (init,) = children_of(pool._stock.zygote.pid)
        status = Path(f"/proc/{init}/status").read_text()
        await process.stdin.send(b"\n")
        assert (await process.result()).ok
    switches = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)
    assert switches is not None
    assert int(switches[1]) < 100


THROTTLED = """
import os, sys, anyio
from isojob import Limits, Pool, PythonPool
limits = Limits(cpus=0.5)
async def main(warm):
    read, write = os.pipe()
    async with (PythonPool() if warm else Pool()) as pool, anyio.create_task_group() as tasks:
        async def run():
            if warm:
                code = "import time; print(flush=True); time.sleep(900)"
                await pool.run_python(code, limits=limits, stdout=write)
            else:
                await pool.run(["sh", "-c", "echo; exec sleep 900"], limits=limits, stdout=write)
        tasks.start_soon(run)
        await anyio.wait_readable(read)
        zygote = (pool._pool if warm else pool)._stock.zygote
        print(zygote.pid, -1 if zygote._ids is None else zygote._ids.first, flush=True)
        await anyio.sleep(900)
anyio.run(main, len(sys.argv) > 1)
"""


@pytest.mark.parametrize("how", [[], ["warm"]])
def test_a_host_that_dies_lifts_quotas(how: list[str], is_root: bool) -> None:
    """Each cell does by itself: else what is throttled would be taken apart at its quota.

    And the ids stay taken as long as there is a zygote.
    """
    with subprocess.Popen(
        [sys.executable, "-c", THROTTLED, *how], stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        zygote, first = map(int, host.stdout.readline().split())
        name = "cpu.max" if cgroup_version() == 2 else "cpu.cfs_quota_us"
        found = list(Path("/sys/fs/cgroup").rglob(f"isojob-{host.pid}-*/cell-*/{name}"))
        quotas = [file for file in found if not file.read_text().startswith(("max", "-1"))]
        assert quotas
        os.kill(zygote, signal.SIGSTOP)  # it would remove them
        host.kill()
    try:
        left = [file for file in quotas if not file.read_text().startswith(("max", "-1"))]
        end = time.monotonic() + 10 * SLOW
        while left and time.monotonic() < end:
            time.sleep(0.01)
            left = [file for file in left if not file.read_text().startswith(("max", "-1"))]
        assert left == []
        assert (first > 0) == is_root
        if is_root:
            lock = os.open(f"/run/isojob/uids-{first}-8192", os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(lock)
    finally:
        os.kill(zygote, signal.SIGCONT)
    assert not settle(lambda: cmdline(zygote), 30 * SLOW)


async def test_stalled_loop_does_not_stretch_wall_time() -> None:
    """The wall limit is enforced in the cell: a stalled event loop learns of it later."""
    results: list[isojob.Result] = []
    async with Pool() as pool, anyio.create_task_group() as tasks:

        async def one() -> None:
            results.append(await pool.run(["sleep", "600"], limits=Limits(wall_time=0.3)))

        async def stall() -> None:
            await anyio.sleep(0.1)
            time.sleep(10 if WHOLE else 1.5)

        tasks.start_soon(one)
        tasks.start_soon(stall)
    assert results[0].status == "wall_time_limit"
    assert results[0].usage.wall_time < 1.2 * SLOW


def test_closed_loops_are_not_kept() -> None:
    """Nor what their jobs were given, ended or not; and what one of them held is free again."""
    pool = Pool(max_jobs=2)
    pool.open_now()
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    for abandoned in (False, False, True):
        loop = asyncio.new_event_loop()
        loops.append(weakref.ref(loop))
        for _ in range(2):
            loop.run_until_complete(pool.run(["true"]))
        if abandoned:
            task = loop.create_task(pool.run(["sleep", "600"]))
            loop.run_until_complete(asyncio.sleep(0.05))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            del task
        loop.close()
        del loop
    end = time.monotonic() + 10 * SLOW
    while time.monotonic() < end and (pool.statistics().running or any(ref() for ref in loops)):
        gc.collect()
        time.sleep(0.01)
    assert pool.statistics().running == 0
    assert [ref() for ref in loops] == [None] * 3
    pool.close()


async def test_a_call_whose_task_nobody_holds(anyio_backend_name: str) -> None:
    """The loop does, as long as it is open: a collection in between ends no job."""
    if anyio_backend_name == "trio":
        return  # its tasks are held by their nurseries
    ended: list[bool] = []

    async def call(pool: Pool) -> None:
        ended.append((await pool.run(["sleep", "0.05"])).ok)

    async with Pool() as pool:
        for _ in range(3):
            asyncio.get_running_loop().create_task(call(pool))
            for _ in range(5):
                await asyncio.sleep(0.004)
                gc.collect()
        with anyio.fail_after(60):
            while len(ended) < 3:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
    assert ended == [True] * 3


def test_a_child_lets_go_of_all() -> None:
    """Whatever one owner raises, and whatever lock a thread of the parent holds."""
    done = run_python(
        "import asyncio, os, signal, threading, isojob",
        "from isojob import _shutdown",
        "from isojob._watch import Watch",
        "class Bad:",
        "    def close(self): pass",
        "    def forget(self): raise OSError(9, 'x')",
        "bad, told = Bad(), []",
        "class Good(Bad):",
        "    def forget(self): told.append(1)",
        "good = [Good() for _ in range(9)]",
        "async def main():",
        "    async with isojob.Pool() as pool:",
        "        assert (await pool.run(['true'])).ok",
        "        for one in (bad, *good): _shutdown.end_with_process(one)",
        "        held, over = threading.Event(), threading.Event()",
        "        def hold():",
        "            with Watch._lock: held.set(); over.wait()",
        "        thread = threading.Thread(target=hold)",
        "        thread.start(); held.wait()",
        "        if (child := os.fork()) == 0:",
        "            signal.alarm(20)",
        "            os._exit(0 if len(told) == 9 and pool._stock.open else 1)",
        "        over.set(); thread.join()",
        "        assert os.waitpid(child, 0)[1] == 0",
        "asyncio.run(main())",
    )
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" in done.stderr


def test_threads_and_loops() -> None:
    """Several event loops in several threads, asyncio and trio, share one pool."""
    results: list[bytes | None] = []
    errors: list[BaseException] = []

    async def work() -> None:
        for number in range(5):
            result = await run_isolated(["echo", str(number)])
            results.append(result.stdout)

    def thread(backend: str) -> None:
        try:
            anyio.run(work, backend=backend)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=thread, args=(backend,)) for backend in ("asyncio", "trio") * 2
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors
    assert len(results) == 20
    assert len(run_module._pools) == 1


def test_plain_asyncio() -> None:
    """asyncio.run, gather, cancel of a task: nothing of anyio shows."""

    async def main() -> None:
        results = await asyncio.gather(*(run_isolated(["echo", str(n)]) for n in range(5)))
        assert [result.stdout for result in results] == [b"%d\n" % n for n in range(5)]
        task = asyncio.create_task(run_isolated(["sleep", "600"]))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await run_isolated(["sleep", "600"])

    asyncio.run(main())


def test_forked_child_has_its_own_pool() -> None:
    """A forked worker never uses the parent's leases; both go on, and end cleanly."""
    program = """
import os, sys, asyncio, isojob
async def go(n):
    return (await isojob.run_isolated(["echo", str(n)])).stdout
assert asyncio.run(go(1)) == b"1\\n"
parent = next(iter(isojob._run._pools.values()))._stock.zygote.pid
children = []
for i in range(3):
    pid = os.fork()
    if pid == 0:
        ok = asyncio.run(go(i)) == b"%d\\n" % i
        mine = next(iter(isojob._run._pools.values()))._stock.zygote.pid
        ok = ok and mine != parent
        isojob._run._close_pools()
        os._exit(0 if ok else 1)
    children.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
assert asyncio.run(go(9)) == b"9\\n"
assert next(iter(isojob._run._pools.values()))._stock.zygote.pid == parent
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", ["return", "kill", "os._exit", "exception"])
def test_end_of_the_host_process(how: str) -> None:
    """However the host ends, zygote, cells and cgroups end with it."""
    program = f"""
import asyncio, os, signal, sys, isojob
async def main():
    task = asyncio.create_task(isojob.run_isolated(["sleep", "4321"]))
    await asyncio.sleep({0.5 * SLOW})
    zygote = next(iter(isojob._run._pools.values()))._stock.zygote
    print(zygote.pid, zygote.subtree.directories[0], flush=True)
    how = {how!r}
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "os._exit": os._exit(0)
    if how == "exception": raise RuntimeError
asyncio.run(main())
"""
    done = run_python(program)
    pid, directory = done.stdout.split()
    left: list[int] = []
    end = time.monotonic() + 5 * SLOW
    while time.monotonic() < end:
        left = [p for p in named("sleep") if b"4321" in cmdline(p)]
        if not left and not Path(directory).exists() and not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    pytest.fail(f"left: {left}, {directory} {Path(directory).exists()}, zygote {pid}")


def test_leftovers_are_swept() -> None:
    """Cgroups of a host and a zygote that were both killed go away with the next start."""
    program = f"""
import asyncio, os, signal, isojob
async def main():
    task = asyncio.create_task(isojob.run_isolated(["sleep", "600"]))
    await asyncio.sleep({0.5 * SLOW})
    zygote = next(iter(isojob._run._pools.values()))._stock.zygote
    print(*zygote.subtree.directories, flush=True)
    os.kill(zygote.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    for _ in range(5):  # somebody else's pool on this machine may sweep first
        done = run_python(program)
        directories = [Path(word) for word in done.stdout.split()]
        assert directories
        time.sleep(0.2 * SLOW)
        if directories[0].exists():
            break
    else:
        pytest.fail("nothing was left: the test shows nothing")
    assert isojob.run_isolated_sync(["true"]).ok
    assert not any(directory.exists() for directory in directories)


async def test_close_ends_the_jobs_of_a_dead_zygote() -> None:
    """Closing the pool ends them, too, with the error that says so."""
    errors: list[type[BaseException]] = []
    pool = Pool(parked=0)

    async def one() -> None:
        try:
            await pool.run(["sleep", "600"])
        except isojob.IsojobError as error:
            errors.append(type(error))

    async with anyio.create_task_group() as tasks, pool:
        tasks.start_soon(one)
        await anyio.sleep(0.3 * SLOW)
        assert pool._stock.zygote is not None
        os.kill(pool._stock.zygote.pid, signal.SIGKILL)
        await anyio.sleep(0.1 * SLOW)
    assert errors == [PoolClosedError]


async def test_many_sandboxes() -> None:
    """More sandboxes at once than pools are kept: none is closed under a call."""
    outputs: list[bytes | None] = []

    async def one(number: int) -> None:
        sandbox = isojob.Sandbox(hostname=f"host-{number}")
        outputs.append((await run_isolated(["hostname"], sandbox=sandbox)).stdout)

    for number in range(run_module.MAX_POOLS):
        await one(number)
    async with anyio.create_task_group() as tasks:
        for number in range(20, 26):
            tasks.start_soon(one, number)
    assert len(outputs) == run_module.MAX_POOLS + 6


def test_signals_that_the_host_ignores() -> None:
    """A host that ignores SIGCHLD, SIGTERM or SIGHUP does not pass that on."""
    program = """
import signal, isojob
for name in ("SIGCHLD", "SIGTERM", "SIGHUP", "SIGINT"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
result = isojob.run_isolated_sync(["grep", "SigIgn", "/proc/self/status"])
print(result.status, result.stdout.split())
"""
    done = run_python(program)
    assert done.stdout == "ok [b'SigIgn:', b'0000000000000000']\n", done.stderr


def test_large_stock() -> None:
    """More cells than the zygote's socket takes requests at once are parked without another job."""
    asyncio.run(_large_stock())  # not anyio.run: callbacks do not know where they are
    trio.run(_large_stock)


async def test_stock_learns_what_jobs_bring() -> None:
    """Cells with limits that cannot be changed later are parked for those who ask for them again."""
    limits = Limits(disk="8MiB")
    async with Pool(parked=2) as pool:
        for expected in (2, 3):
            assert (await pool.run(["true"], limits=limits)).ok
            await _until_parked(pool, expected)
        assert pool.statistics().parked_target == 3
        size = ["sh", "-c", "df -B1M --output=size /box | tail -n 1"]
        for _ in range(2):
            assert (await pool.run(size, limits=limits)).stdout_text.split() == ["8"]
        assert (await pool.run(size)).stdout_text.split() == ["128"]


async def test_kinds_are_bounded() -> None:
    """Twelve kinds of limits, each asked for three times, leave cells for the last eight."""
    async with Pool(parked=1) as pool:
        for number in range(12):
            for _ in range(3):
                result = await pool.run(["true"], limits=Limits(disk=(number + 1) * 2**20))
                assert result.ok
        await _until_parked(pool, 1 + 8)


async def _until_parked(pool: Pool, expected: int) -> None:
    with anyio.fail_after(30 * SLOW):
        while pool.statistics().parked != expected:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)


async def _large_stock() -> None:
    async with Pool(parked=300) as pool:
        assert (await pool.run(["true"])).ok
        await _until_parked(pool, 300)
        assert (await pool.run(["true"])).ok
