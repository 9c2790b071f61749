"""Every limit, and the verdict it leads to."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from environment import SLOW, cgroup_version, cmdline

from isojob import Limits, Result, Sandbox, SeccompProfile, Status, run_isolated
from isojob._streams import TURN_CALLS

MIB = 1 << 20


def usage_is_sane(result: Result) -> None:
    """The account fits the limits in force."""
    evidence = result.evidence
    assert result.usage.wall_time >= 0
    if evidence.memory_limit is not None and result.usage.memory_peak is not None:
        assert result.usage.memory_peak <= evidence.memory_limit


async def test_wall_time() -> None:
    """A sleeper is ended by the wall clock."""
    result = await run_isolated(["sleep", "600"], limits=Limits(wall_time=0.5))
    assert result.status is Status.WALL_TIME_LIMIT
    assert result.signal is signal.SIGKILL
    assert result.usage.wall_time >= 0.5
    assert "wall time limit of 0.5 s" in str(result)
    usage_is_sane(result)


async def test_trace_stop_is_no_end(python: str) -> None:
    """A job that has init for its tracer and stops has not ended: it meets its wall time."""
    program = (
        "import ctypes, os; ctypes.CDLL(None).ptrace(0, 0, None, None); os.kill(os.getpid(), 19)"
    )
    result = await run_isolated(
        [python, "-c", program],
        limits=Limits(wall_time=1 * SLOW),
        sandbox=Sandbox(seccomp=SeccompProfile.unconfined()),
    )
    assert result.status == Status.WALL_TIME_LIMIT, result


async def test_stopped_job_meets_wall_time() -> None:
    """SIGSTOP of itself does not stop the clock."""
    result = await run_isolated(["sh", "-c", "kill -STOP $$"], limits=Limits(wall_time=0.5))
    assert result.status is Status.WALL_TIME_LIMIT


async def test_cpu_time(python: str) -> None:
    """A busy loop is ended by its CPU time."""
    limits = Limits(cpu_time=0.3, wall_time=60)
    result = await run_isolated([python, "-I", "-c", "while True: pass"], limits=limits)
    assert result.status is Status.CPU_TIME_LIMIT
    assert result.usage.cpu_time is not None
    assert result.usage.cpu_time >= 0.3
    usage_is_sane(result)


async def test_cpu_time_of_children(python: str) -> None:
    """Children burn the job's budget, not one each; ignored signals do not help."""
    code = (
        "import os, signal\n"
        "for s in (signal.SIGTERM, signal.SIGXCPU, signal.SIGCHLD): signal.signal(s, signal.SIG_IGN)\n"
        "for i in range(3): os.fork()\n"
        "while True: pass"
    )
    result = await run_isolated([python, "-I", "-c", code], limits=Limits(cpu_time=0.4))
    assert result.status is Status.CPU_TIME_LIMIT
    assert result.usage.cpu_time is not None
    assert 0.4 <= result.usage.cpu_time < 0.4 + 0.5 * SLOW


async def test_orphans_are_charged(python: str) -> None:
    """CPU time burnt in an orphan whose parent is gone is in the account."""
    code = (
        "import os, time\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        t = time.process_time()\n"
        "        while time.process_time() - t < 0.3: pass\n"
        "        os.write(w, b'x')\n"
        "    os._exit(0)\n"
        "os.wait(); os.read(r, 1)"
    )
    result = await run_isolated([python, "-I", "-c", code])
    assert result.ok
    assert result.usage.cpu_time is not None
    assert result.usage.cpu_time >= 0.3


async def test_memory(python: str) -> None:
    """Touching more than the limit ends the job."""
    result = await run_isolated(
        [python, "-I", "-c", "x = bytearray(1 << 28)"], limits=Limits(memory="48MiB")
    )
    assert result.status is Status.MEMORY_LIMIT
    assert result.usage.oom_kills
    usage_is_sane(result)


async def test_memory_in_a_child(python: str) -> None:
    """An OOM-killed child makes it a memory_limit, whatever the main process returns."""
    code = "import os\nif os.fork() == 0:\n    x = bytearray(1 << 28)\n    os._exit(0)\nos.wait()"
    result = await run_isolated([python, "-I", "-c", code], limits=Limits(memory="48MiB"))
    assert result.status is Status.MEMORY_LIMIT


async def test_memory_in_files() -> None:
    """Tmpfs pages are memory."""
    result = await run_isolated(
        ["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=100"],
        limits=Limits(memory="32MiB", disk="1GiB"),
    )
    assert result.status is Status.MEMORY_LIMIT


async def test_page_cache_is_not_a_memory_limit(disk: Sandbox, python: str) -> None:
    """Reading more than the limit reclaims, and is no verdict.

    One process reads, and nothing ahead: what several have in flight from a cold disk can be all of
    a small limit, and then the kernel does kill (docs/limits.md).
    """
    with Path(str(disk.mounts[0].source), "file").open("wb") as file:
        file.write(bytes(96 * MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = (
        "import os; file = os.open('/disk/file', os.O_RDONLY)\n"
        "os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)\n"
        "while os.read(file, 1 << 17): pass"
    )
    result = await run_isolated(
        [python, "-I", "-c", code],
        sandbox=disk,
        limits=Limits(memory="48MiB", wall_time=300, cpu_time=200),
    )
    assert result.status is Status.OK
    peak = result.usage.memory_peak
    assert peak is None or peak >= 40 * MIB


async def test_processes() -> None:
    """Forks beyond the limit fail; the count is in the account, and no verdict by itself."""
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done 2>/dev/null; true"
    result = await run_isolated(["bash", "-c", script], limits=Limits(processes=4))
    assert result.status in (Status.OK, Status.NONZERO_EXIT)
    assert result.usage.process_limit_hits
    assert result.usage.processes_peak is None or result.usage.processes_peak <= 4


async def test_output() -> None:
    """Output beyond the cap ends the job; the prefix is kept."""
    result = await run_isolated(["yes"], limits=Limits(output=100_000))
    assert result.status is Status.OUTPUT_LIMIT
    assert result.stdout is not None
    assert len(result.stdout) == 100_000
    assert result.stdout.startswith(b"y\ny\n")
    assert result.stdout_truncated
    assert not result.stderr_truncated


async def test_output_of_a_short_job() -> None:
    """A job that ends by itself after one byte too many is over the limit, too."""
    fits = await run_isolated(["echo", "12345"], limits=Limits(output=6))
    assert (fits.status, fits.stdout, fits.stdout_truncated) == (Status.OK, b"12345\n", False)
    over = await run_isolated(["echo", "12345"], limits=Limits(output=5))
    assert (over.status, over.stdout, over.stdout_truncated) == (
        Status.OUTPUT_LIMIT,
        b"12345",
        True,
    )


@pytest.mark.parametrize(
    ("command", "output"),
    [
        # Just one byte too many, and nothing more: not the next byte ends it, nor its own end.
        ("printf 123456; exec sleep 600", 5),
        ("printf x >&2; exec sleep 600", 0),
        # As many packets as are read in one turn (O_DIRECT), the last of them too many.
        ("exec PYTHON -c 'CODE'", TURN_CALLS - 1),
    ],
)
@pytest.mark.parametrize("pause", [0, 0.3], ids=["at once", "later"])
async def test_one_byte_too_many(command: str, output: int, pause: float, python: str) -> None:
    """It ends the job at once, also one that is silent from then on."""
    code = (
        "import fcntl, os, time; fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT); "
        f'[os.write(1, b"x") for _ in range({TURN_CALLS})]; time.sleep(600)'
    )
    command = command.replace("PYTHON", python).replace("CODE", code)
    limits = Limits(output=output, wall_time=15 * SLOW, cpu_time=None)
    result = await run_isolated(["sh", "-c", f"sleep {pause}; {command}"], limits=limits)
    assert (result.status, result.evidence.output_limit) == (Status.OUTPUT_LIMIT, output)


async def test_disk_and_inodes() -> None:
    """/box, /tmp and /dev/shm share one size and one number of inodes."""
    script = "dd if=/dev/zero of=/box/a bs=1M count=3 2>/dev/null; dd if=/dev/zero of=/tmp/b bs=1M count=3 2>&1"
    result = await run_isolated(["sh", "-c", script], limits=Limits(disk="4MiB"))
    assert result.stdout is not None
    assert b"No space left" in result.stdout
    script = "i=0; while [ $i -lt 200 ]; do : > /box/$i || exit 5; i=$((i+1)); done"
    result = await run_isolated(["sh", "-c", script], limits=Limits(inodes=100))
    assert result.exit_code not in (0, None)


async def test_file_size(python: str) -> None:
    """RLIMIT_FSIZE: SIGXFSZ, or EFBIG where it is ignored."""
    code = "open('x', 'wb').write(b'x' * 2000000)"
    result = await run_isolated([python, "-I", "-c", code], limits=Limits(file_size="1MiB"))
    assert b"File too large" in (result.stderr or b"")


async def test_open_files_and_stack_and_core() -> None:
    """The rlimits in force are those asked for."""
    limits = Limits(open_files=50, stack="16MiB", file_size="1MiB", address_space="1GiB")
    result = await run_isolated(
        ["sh", "-c", "ulimit -n; ulimit -Hn; ulimit -s; ulimit -f; ulimit -v; ulimit -c"],
        limits=limits,
    )
    assert result.stdout is not None
    assert result.stdout.split() == [b"50", b"50", b"16384", b"2048", b"1048576", b"0"]


async def test_cpus(python: str) -> None:
    """cpus= throttles."""
    code = (
        "import time\n"
        "t, c = time.monotonic(), time.process_time()\n"
        "while time.monotonic() - t < 1.5: pass\n"
        "print(time.process_time() - c)"
    )
    result = await run_isolated([python, "-I", "-c", code], limits=Limits(cpus=0.2))
    assert result.ok
    assert float(result.stdout or b"9") < 0.9
    assert result.usage.cpu_throttled_time
    if cgroup_version() == 2 and Path("/proc/pressure/cpu").exists():  # CONFIG_PSI, from 4.20
        assert result.usage.pressure is not None
        assert result.usage.pressure["cpu"]["some_total"] > 0.1


async def test_cpuset(python: str) -> None:
    """cpuset= pins."""
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    result = await run_isolated([python, "-I", "-c", code], limits=Limits(cpuset="1"))
    assert result.stdout == b"[1]\n"
    with pytest.raises(ValueError, match=r"limits.cpuset: '1,8191'.*there are 0"):
        await run_isolated(["true"], limits=Limits(cpuset="1,8191"))


@pytest.mark.parametrize(
    ("script", "status", "returncode"),
    [
        ("exit 137", Status.NONZERO_EXIT, 137),
        ("exit 159", Status.NONZERO_EXIT, 159),
        ("kill -KILL $$", Status.SIGNALED, -9),
        ("kill -SYS $$", Status.SIGNALED, -31),
        ("kill -XCPU $$", Status.SIGNALED, -24),
        ("kill -SEGV $$", Status.SIGNALED, -11),
        ("kill -TERM $$", Status.SIGNALED, -15),
    ],
)
async def test_forged_ends(script: str, status: Status, returncode: int) -> None:
    """What a job does to itself is never taken for a limit."""
    result = await run_isolated(["sh", "-c", script])
    assert (result.status, result.returncode) == (status, returncode)


async def test_end_is_the_main_process() -> None:
    """The end is the exit of the main process; stragglers die, what they wrote before is kept."""
    script = "echo early; (echo child; sleep 600) & sleep 0.3; echo late"
    result = await run_isolated(["sh", "-c", script], limits=Limits(wall_time=60))
    assert result.ok
    assert result.stdout is not None
    assert sorted(result.stdout.split()) == [b"child", b"early", b"late"]
    assert result.usage.wall_time < 30


async def test_closed_stdio_is_not_the_end() -> None:
    """A job that closes its output goes on."""
    result = await run_isolated(["sh", "-c", "exec >&- 2>&-; sleep 0.5; exit 3"])
    assert result.exit_code == 3
    assert result.usage.wall_time >= 0.5


async def test_daemons_die(python: str) -> None:
    """Double fork, setsid and ignored signals do not survive the main process."""
    code = (
        "import os, signal, time\n"
        "ready, there = os.pipe()\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        for s in range(1, 32):\n"
        "            try: signal.signal(s, signal.SIG_IGN)\n"
        "            except OSError: pass\n"
        "        if os.fork(): os._exit(0)\n"
        "        os.write(there, b'x')\n"
        "        time.sleep(600)\n"
        "for _ in range(5): assert os.read(ready, 1)"
    )
    token = f"daemons-{os.getpid()}"
    result = await run_isolated([python, "-I", "-c", code, token])
    assert result.ok
    there = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    assert [pid for pid in there if token.encode() in cmdline(pid)] == []


async def test_unlimited() -> None:
    """None lifts a limit."""
    limits = Limits(
        cpu_time=None, wall_time=None, memory=None, processes=None, output=None, file_size=None
    )
    result = await run_isolated(["echo", "free"], limits=limits)
    assert result.stdout == b"free\n"


async def test_limits_of_the_call_differ_from_the_stock(python: str) -> None:
    """Raised and lowered limits hold in a cell that was parked with others."""
    code = "x = bytearray({} << 20)"
    stock = Limits(cpu_time=10 * SLOW, wall_time=30 * SLOW)
    assert (await run_isolated([python, "-I", "-c", code.format(100)], limits=stock)).ok
    small = stock.model_copy(update={"memory": 64 * MIB})
    result = await run_isolated([python, "-I", "-c", code.format(100)], limits=small)
    assert result.status is Status.MEMORY_LIMIT
    large = stock.model_copy(update={"memory": 1024 * MIB})
    assert (await run_isolated([python, "-I", "-c", code.format(530)], limits=large)).ok
