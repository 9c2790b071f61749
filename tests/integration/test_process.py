"""open_isolated: talking to a job while it runs."""

from __future__ import annotations

import array
import hashlib
import os
import signal
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from environment import SLOW

import isojob
from isojob import (
    DEVNULL,
    PIPE,
    STDOUT,
    CommandNotExecutableError,
    CommandNotFoundError,
    Limits,
    Pool,
    PoolClosedError,
    SandboxSetupError,
    Status,
    open_isolated,
)


async def lines(process: isojob.IsolatedProcess, count: int) -> bytes:
    """So many lines of its stdout."""
    assert process.stdout is not None
    data = b""
    while data.count(b"\n") < count:
        data += await process.stdout.receive()
    return data


async def rest(stream: anyio.abc.ByteReceiveStream | None) -> bytes:
    assert stream is not None
    return b"".join([chunk async for chunk in stream])


async def keep_sending(stream: anyio.abc.ByteSendStream | None) -> None:
    assert stream is not None
    while True:
        await stream.send(bytes(200_000))


async def test_conversation() -> None:
    """Each word is answered before the next is sent; the end of stdin ends it."""
    async with open_isolated(["sh", "-c", "while read x; do echo $x$x; done; exit 3"]) as process:
        assert isinstance(process, anyio.abc.Process)
        assert process.stdin is not None
        for word in (b"a", b"bc", b"d"):
            await process.stdin.send(word + b"\n")
            assert await lines(process, 1) == word * 2 + b"\n"
        assert process.returncode is None
        await process.stdin.aclose()
        assert await process.wait() == 3
        assert process.returncode == 3
        assert await rest(process.stdout) == await rest(process.stderr) == b""
        result = await process.result()
    assert (result.status, result.stdout, result.stderr) == (Status.NONZERO_EXIT, None, None)
    assert result.evidence.stdout_bytes == len(b"aa\nbcbc\ndd\n")


async def test_job_can_open_dev_stdin() -> None:
    """And /dev/stdout, although the pipes are made by another uid."""
    async with open_isolated(["sh", "-c", "cat < /dev/stdin > /dev/stdout"]) as process:
        assert process.stdin is not None
        await process.stdin.send(b"a\n")
        await process.stdin.aclose()
        assert await rest(process.stdout) == b"a\n"
        assert (await process.result()).ok


async def test_large_both_ways() -> None:
    """As much as there is, at the pace of the slower side, whatever the host's memory."""
    size = 20_000_000
    limits = Limits(output=size, cpu_time=20 * SLOW, wall_time=60 * SLOW)
    async with open_isolated(["cat"], limits=limits) as process:
        assert process.stdin is not None and process.stdout is not None

        async def feed() -> None:
            assert process.stdin is not None
            for _ in range(size // 100_000):
                await process.stdin.send(b"x" * 100_000)
            await process.stdin.aclose()

        got = 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed)
            async for chunk in process.stdout:
                got += len(chunk)
        assert got == size
        assert (await process.result()).ok


async def test_sending_wider_items() -> None:
    """All bytes of a buffer whose items have several; one with gaps is refused."""
    data = array.array("I", range(100_000))
    async with open_isolated(["sha256sum"]) as process:
        assert process.stdin is not None
        with pytest.raises(TypeError, match="contiguous"):
            await process.stdin.send(memoryview(b"abcd")[::2])  # type: ignore[arg-type]
        await process.stdin.send(data)  # type: ignore[arg-type]
        await process.stdin.send(b"")
        await process.stdin.aclose()
        digest = hashlib.sha256(data).hexdigest().encode()
        assert (await rest(process.stdout)).split()[0] == digest


async def test_backpressure() -> None:
    """A job whose output nobody reads waits; it does not fill the host."""
    script = "head -c 10000000 /dev/zero; echo done >&2"
    async with open_isolated(["sh", "-c", script]) as process:
        assert process.stderr is not None
        with anyio.move_on_after(0.5 * SLOW) as scope:
            await process.stderr.receive()
        assert scope.cancelled_caught
        assert len(await rest(process.stdout)) == 10_000_000
        assert await process.stderr.receive() == b"done\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_output_is_capped(stream: str) -> None:
    """The prefix can be read, then the stream ends, and the job has."""
    command = ["sh", "-c", "yes 1>&2" if stream == "stderr" else "yes"]
    async with open_isolated(command, limits=Limits(output=100_001)) as process:
        assert len(await rest(getattr(process, stream))) == 100_001
        result = await process.result()
    assert result.status == Status.OUTPUT_LIMIT
    async with open_isolated(
        ["head", "-c", "100000", "/dev/zero"], limits=Limits(output=100_000)
    ) as process:
        assert len(await rest(process.stdout)) == 100_000
        assert (await process.result()).ok


async def test_limits_hold() -> None:
    """Also while nobody looks."""
    async with open_isolated(["sleep", "60"], limits=Limits(wall_time=0.3)) as process:
        assert (await process.result()).status == Status.WALL_TIME_LIMIT
    command = ["sh", "-c", "while :; do :; done"]
    async with open_isolated(command, limits=Limits(cpu_time=0.3)) as process:
        assert await process.wait() == -signal.SIGKILL
        assert (await process.result()).status == Status.CPU_TIME_LIMIT


async def test_kill_and_signals() -> None:
    """`kill` ends all of it, other signals reach the main process, and who was late is no error."""
    async with open_isolated(["sh", "-c", "sleep 60 & sleep 60"]) as process:
        process.kill()
        result = await process.result()
        assert (result.status, result.returncode) == (Status.KILLED, -signal.SIGKILL)
        process.kill()
        process.terminate()
    script = (
        "trap 'echo got; exit 7' TERM; trap 'echo usr' USR1; echo up; while :; do sleep 0.02; done"
    )
    async with open_isolated(["sh", "-c", script], stderr=DEVNULL) as process:
        await lines(process, 1)
        pid = process.pid
        assert Path(f"/proc/{pid}/comm").read_text() == "sh\n"
        process.send_signal(signal.SIGUSR1)
        assert await lines(process, 1) == b"usr\n"
        process.terminate()
        assert await process.wait() == 7
        with pytest.raises(ProcessLookupError):
            _ = process.pid
    async with open_isolated(["sleep", "60"]) as process:
        process.send_signal(signal.SIGKILL)
        assert (await process.result()).status == Status.SIGNALED, "not by isojob"


async def test_a_name_that_is_no_text(python: str) -> None:
    """A job cannot hide from signals by what it calls itself (prctl(2), PR_SET_NAME)."""
    code = (
        "import ctypes, time; ctypes.CDLL(None).prctl(15, b'\\xff\\nNSpid:\\t1'); "
        "print(flush=True); time.sleep(600)"
    )
    async with open_isolated([python, "-c", code]) as process:
        await lines(process, 1)
        assert Path(f"/proc/{process.pid}/comm").read_bytes()[:1] == b"\xff"
        process.terminate()
        assert await process.wait() == -signal.SIGTERM


async def test_leaving_the_block_ends_it() -> None:
    """By its end, by an error, by cancelling: when the block is left nothing is left."""
    async with Pool(parked=0) as pool:
        async with pool.open(["sleep", "600"]) as process:
            pid = process.pid
        assert not Path(f"/proc/{pid}").exists()
        assert (await process.result()).status == Status.KILLED
        with pytest.raises(KeyError):  # noqa: PT012
            async with pool.open(["sleep", "600"]) as process:
                pid = process.pid
                raise KeyError
        assert not Path(f"/proc/{pid}").exists()
        with anyio.move_on_after(0.3 * SLOW) as scope:
            async with pool.open(["sleep", "600"]) as process:
                pid = process.pid
                await process.wait()
        assert scope.cancelled_caught
        assert not Path(f"/proc/{pid}").exists()
        assert (pool.statistics().running, pool.statistics().waiting) == (0, 0)


@pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning")  # trio's, for good reasons
@pytest.mark.parametrize("session", [False, True])
async def test_generator_that_is_left_early(session: bool) -> None:
    """Whoever has seen enough goes on; the job ends, although another task leaves the block."""
    async with Pool() as pool, pool.session() as other:
        place = other if session else pool

        async def chunks() -> AsyncIterator[bytes]:
            async with place.open(["sh", "-c", "echo a; sleep 600"]) as process:
                assert process.stdout is not None
                async for chunk in process.stdout:
                    yield chunk

        async for chunk in chunks():
            assert chunk == b"a\n"
            break
        with anyio.fail_after(30 * SLOW):
            while pool.statistics().running:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.01)
        assert (await place.run(["true"])).ok


async def test_usage_while_it_runs() -> None:
    """The accounts grow; at the end they are the result's."""
    script = "x=0; while [ $x -lt 30000 ]; do x=$((x+1)); done; echo; read y; exit 0"
    async with open_isolated(["sh", "-c", script]) as process:
        assert process.stdin is not None
        await lines(process, 1)
        first = process.usage()
        assert first.cpu_time is not None and first.cpu_time > 0.005
        assert first.memory_peak is None or first.memory_peak > 100_000
        await anyio.sleep(0.1)
        assert process.usage().wall_time > first.wall_time
        await process.stdin.send(b"\n")
        result = await process.result()
        assert process.usage() == result.usage
        assert (result.usage.cpu_time or 0) >= first.cpu_time * 0.9


async def test_throttled_while_it_runs() -> None:
    """What `Limits.cpus` holds back shows before the end."""
    script = "echo; while :; do :; done"
    async with open_isolated(["sh", "-c", script], limits=Limits(cpus=0.1)) as process:
        await lines(process, 1)
        held_back = 0.0
        with anyio.fail_after(60 * SLOW):  # a busy host may hold it back longer than the limit does
            while held_back <= 0.1:
                await anyio.sleep(0.1)
                held_back = process.usage().cpu_throttled_time or 0
        process.kill()
        assert ((await process.result()).usage.cpu_throttled_time or 0) >= held_back


async def test_where_it_cannot_start() -> None:
    """The error comes as the block is entered, as it does for subprocesses."""
    with pytest.raises(CommandNotFoundError):
        async with open_isolated(["no-such-program"]):
            pytest.fail("entered")
    with pytest.raises(CommandNotExecutableError):
        async with open_isolated(["/etc/passwd"]):
            pytest.fail("entered")


async def test_launcher_that_gives_up() -> None:
    """What fails before the program is executed fails as the block is entered, each time."""
    for _ in range(10):
        with pytest.raises(SandboxSetupError, match="chdir"):
            async with open_isolated(["cat"], cwd="/nowhere"):
                pytest.fail("entered")


@pytest.mark.parametrize("pty", [False, True])
async def test_output_that_nobody_has_read(pty: bool) -> None:
    """It counts, whenever it is read; also what a terminal holds behind the page that it tells of."""
    limit = 6000
    for size, status in ((limit, "ok"), (limit + 1, "output_limit")):
        async with open_isolated(
            ["head", "-c", str(size), "/dev/zero"], limits=Limits(output=limit), pty=pty
        ) as process:
            result = await process.result()
            assert process.stdout is not None
            first = await process.stdout.receive(100)
            assert 0 < len(first) <= 100
            assert first + await rest(process.stdout) == bytes(limit)
        assert result.status == status
        assert result.stdout_truncated == (status != "ok")
        assert result.evidence.stdout_bytes == size


@pytest.mark.parametrize("pty", [False, True])
@pytest.mark.parametrize("read", [0, 5])
async def test_output_of_a_stream_that_is_closed(pty: bool, read: int) -> None:
    """What was written before counts, whoever reads it."""
    script = "printf %0100d; read x; exit 0"
    limits = Limits(output=10)
    async with open_isolated(["sh", "-c", script], pty=pty, limits=limits) as process:
        assert process.stdout is not None
        if read:
            assert len(await process.stdout.receive(read)) == read
        else:
            await anyio.wait_readable(process.stdout._fd)  # type: ignore[attr-defined]
            await anyio.sleep(0.2 * SLOW)
        await process.stdout.aclose()
        result = await process.result()
    assert result.status is Status.OUTPUT_LIMIT
    assert result.evidence.stdout_exceeded


async def test_launcher_that_is_killed() -> None:
    """The block is not entered for a program that never was, whoever ends the launcher."""
    files = {"large": bytes(20 << 20)}
    for _ in range(10):
        with pytest.raises(SandboxSetupError, match="before execve"):
            async with open_isolated(["true"], files=files, limits=Limits(memory="8MiB")):
                raise AssertionError("entered")


@pytest.mark.parametrize("session", [False, True])
async def test_leaving_the_block_beside_a_stopped_init(
    session: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot hear that it is to end its job keeps nobody in the block."""
    monkeypatch.setattr("isojob._process.STUCK_SECONDS", 0.3 * SLOW)
    monkeypatch.setattr("isojob._lease.GONE_SECONDS", 0.3 * SLOW)
    limits = Limits(wall_time=None)
    async with Pool(parked=0) as pool, AsyncExitStack() as stack:
        opener = await stack.enter_async_context(pool.session()) if session else pool
        with anyio.fail_after(20 * SLOW):
            async with opener.open(["sleep", "600"], limits=limits) as process:
                init = int(Path(f"/proc/{process.pid}/stat").read_text().split()[3])
                os.kill(init, signal.SIGSTOP)
        with pytest.raises(PoolClosedError):
            await process.result()


async def test_forked_child_holds_nothing() -> None:
    """A child of the host does not keep the job from the end of its stdin."""
    async with open_isolated(["cat"]) as process:
        assert process.stdin is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: we may have threads
            child = os.fork()
        if child == 0:
            signal.pause()
        try:
            with anyio.fail_after(20 * SLOW):
                await process.stdin.aclose()
                assert (await process.result()).ok
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stdin": None}, TypeError),
        ({"stdin": STDOUT}, ValueError),
        ({"stdout": STDOUT}, ValueError),
        ({"pty": True, "stderr": DEVNULL}, ValueError),
        ({"pty": (0, 80)}, ValueError),
        ({"pty": (24, "80")}, ValueError),
        ({"pty": (24, 80, 1)}, "pty must be True, False or"),
        ({"pty": "80x24"}, "pty must be True, False or"),
        ({"pty": 5}, "pty must be True, False or"),
        ({"input": b"x"}, TypeError),
        ({"cwd": "relative"}, ValueError),
        ({"limits": {}}, TypeError),
    ],
)
async def test_bad_arguments(options: dict[str, Any], error: type[Exception] | str) -> None:
    """Named before anything starts, and no descriptor is left."""
    kind, message = (TypeError, error) if isinstance(error, str) else (error, None)
    with pytest.raises(kind, match=message):
        async with open_isolated(["true"], **options):
            pytest.fail("entered")


async def test_streams_of_the_callers() -> None:
    """Merged, thrown away, or a file of the caller's: then there is nothing to read here."""
    async with open_isolated(["sh", "-c", "echo a; echo b >&2"], stderr=STDOUT) as process:
        assert process.stderr is None
        assert sorted((await rest(process.stdout)).split()) == [b"a", b"b"]
    async with open_isolated(["cat"], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL) as process:
        assert (process.stdin, process.stdout, process.stderr) == (None, None, None)
        assert (await process.result()).ok
    read_end, write_end = os.pipe()
    try:
        async with open_isolated(["echo", "hi"], stdout=write_end) as process:
            assert process.stdout is None
            await process.wait()
        assert os.read(read_end, 100) == b"hi\n"
    finally:
        os.close(read_end)
        os.close(write_end)


async def test_files_and_collect() -> None:
    """As in run_isolated."""
    async with open_isolated(
        ["sh", "-c", "read x; cp a b"], files={"a": b"1"}, collect=["b"]
    ) as process:
        assert process.stdin is not None
        await process.stdin.send(b"\n")
        assert (await process.result()).files == {"b": b"1"}


async def test_closed_and_broken_streams() -> None:
    """Anyio's errors, for whoever waits as well."""
    async with open_isolated(["sh", "-c", "exec <&-; echo; sleep 60"]) as process:
        assert process.stdin is not None and process.stdout is not None
        await lines(process, 1)
        with pytest.raises(anyio.BrokenResourceError):
            await process.stdin.send(b"x")
        errors: list[BaseException] = []

        async def wait() -> None:
            assert process.stdout is not None
            try:
                await process.stdout.receive()
            except anyio.ClosedResourceError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.sleep(0.1)
            await process.stdout.aclose()
        assert len(errors) == 1
        with pytest.raises(anyio.ClosedResourceError):
            await process.stdout.receive()


async def test_terminal() -> None:
    """A terminal of its own: a size, a controlling one, Ctrl-C, and no way to type for others."""
    script = (
        "import os, signal, sys, fcntl, time\n"
        "print(os.get_terminal_size(), [os.isatty(n) for n in (0, 1, 2)])\n"
        "open('/dev/tty', 'w').write('to the terminal\\n')\n"
        "try: fcntl.ioctl(0, 0x5412, b'x')\n"
        "except OSError as e: print('typing', e.errno)\n"
        "signal.signal(signal.SIGWINCH, lambda *a: os.write(1, b'%r\\n' % (os.get_terminal_size(),)))\n"
        "try: print('ready', flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    async with open_isolated(["python3", "-c", script], pty=(10, 40)) as process:
        assert process.stdin is not None and process.stderr is None
        seen = await lines(process, 4)
        assert b"os.terminal_size(columns=40, lines=10) [True, True, True]" in seen
        assert b"to the terminal" in seen
        assert b"typing 1\r\n" in seen
        process.resize(20, 50)
        assert b"columns=50, lines=20" in await lines(process, 1)
        await process.stdin.send(b"\x03")
        assert b"interrupted" in await rest(process.stdout)
        assert (await process.result()).ok
    async with open_isolated(["true"], stdin=PIPE) as process:
        with pytest.raises(ValueError, match="no terminal"):
            process.resize(1, 1)


@pytest.mark.parametrize("mode", ["pass", "tty.setraw(0)"])
@pytest.mark.parametrize("then", ["", "for fd in range(3): os.close(fd)\ntime.sleep(600)"])
async def test_terminal_that_nobody_has_open(mode: str, then: str) -> None:
    """Who types is told, in the midst of it too: the kernel takes it all, or says "again" for ever."""
    script = f"import os, time, tty\n{mode}\nprint('ready', flush=True)\n{then}"
    async with open_isolated(["python3", "-c", script], pty=True) as process:
        await lines(process, 1)
        with anyio.fail_after(20 * SLOW), pytest.raises(anyio.BrokenResourceError):
            await keep_sending(process.stdin)


async def test_terminal_opened_again() -> None:
    """The streams go on where a job finds back to its terminal."""
    script = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "print('ready', flush=True)\n"
        "for fd in range(3): os.close(fd)\n"
        "signal.sigwait([signal.SIGUSR1])\n"
        "fd = os.open('/dev/tty', os.O_RDWR)\n"
        "os.write(fd, b'again\\n')\n"
        "raise SystemExit(os.read(fd, 9) != b'word\\n')\n"
    )
    async with open_isolated(["python3", "-c", script], pty=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert await rest(process.stdout) == b"ready\r\n"
        with pytest.raises(anyio.BrokenResourceError):
            await process.stdin.send(b"lost\n")
        process.send_signal(signal.SIGUSR1)
        seen = b""
        while b"again" not in seen:
            await anyio.sleep(0.01)
            with suppress(anyio.EndOfStream):
                seen += await process.stdout.receive()
        await process.stdin.send(b"word\n")
        assert (await process.result()).ok


async def test_end_of_file_on_a_terminal() -> None:
    """It is typed."""
    async with open_isolated(["cat"], pty=True) as process:
        assert process.stdin is not None
        await process.stdin.send(b"a\n\x04")
        assert await rest(process.stdout) == b"a\r\na\r\n"
        assert (await process.result()).ok


async def test_dead_parked_cell() -> None:
    """Nobody notices that the parked cell was dead."""
    async with Pool(parked=1) as pool:
        await pool.run(["true"])
        await anyio.sleep(0.3 * SLOW)
        assert pool._stock.zygote is not None
        children = Path(f"/proc/{pool._stock.zygote.pid}/task/{pool._stock.zygote.pid}/children")
        for word in children.read_text().split():
            os.kill(int(word), signal.SIGKILL)
        await anyio.sleep(0.1 * SLOW)
        async with pool.open(["echo", "hi"]) as process:
            assert await rest(process.stdout) == b"hi\n"


async def test_several_wait() -> None:
    """Any number of tasks may ask for the end."""
    codes: list[int] = []
    async with open_isolated(["sh", "-c", "sleep 0.1; exit 4"]) as process:

        async def ask() -> None:
            codes.append(await process.wait())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
    assert codes == [4, 4, 4]
