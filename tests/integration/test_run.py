"""The contract of run_isolated: arguments, streams, environment, results."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import isojob
from isojob import Limits, Pool, SandboxSetupError, Status, _run, run_isolated
from isojob import _stock as stock


async def test_output_and_exit() -> None:
    """A program's output, status and account come back."""
    result = await run_isolated(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert (result.status, result.returncode, result.exit_code) == (Status.NONZERO_EXIT, 3, 3)
    assert result.usage.wall_time > 0
    assert result.usage.cpu_time is not None
    assert result.usage.memory_peak is not None
    assert 0 < result.usage.memory_peak < 64 << 20
    assert result.posture.namespaces == ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")
    assert isojob.Result.model_validate_json(result.model_dump_json()) == result


async def test_two_calls_without_a_pool() -> None:
    """The second call uses the zygote of the first."""
    first = await run_isolated(["echo", "1"])
    second = await run_isolated(["echo", "2"])
    assert (first.stdout, second.stdout) == (b"1\n", b"2\n")
    assert len(_run._pools) == 1


async def test_arguments_are_exact(python: str) -> None:
    """No shell, no splitting: every byte of every argument arrives."""
    arguments = ["", " ", "a b", "$HOME", "*", "new\nline", "\\", "-x", "--", "ünï", "\udcff"]
    code = "import os,sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    result = await run_isolated([python, "-I", "-c", code, *arguments])
    assert result.stdout is not None
    assert result.stdout.split(b"\0") == [os.fsencode(item) for item in arguments]
    assert result.args[-1] == "\udcff"


async def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job sees the sandbox's variables and the call's, never the caller's."""
    monkeypatch.setenv("SECRET", "hunter2")
    result = await run_isolated(["env"], env={"A": "1", "LANG": "C"})
    assert result.stdout is not None
    assert set(result.stdout.decode().splitlines()) == {
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "HOME=/box",
        "TMPDIR=/tmp",
        "LANG=C",
        "A=1",
    }


async def test_input() -> None:
    """input= is stdin; its end is seen."""
    result = await run_isolated(["cat"], input=b"hello\0world")
    assert result.stdout == b"hello\0world"


async def test_empty_stdin_by_default() -> None:
    """Nothing is inherited: stdin is empty."""
    result = await run_isolated(["cat"])
    assert (result.status, result.stdout) == (Status.OK, b"")


async def test_input_that_is_not_read() -> None:
    """A job that does not read its input is no error."""
    result = await run_isolated(["true"], input=b"x" * 10_000_000)
    assert result.ok


async def test_large_both_ways() -> None:
    """100 MB go in and out at once without a deadlock and without loss."""
    data = os.urandom(1 << 20) * 100
    limits = Limits(output=None, wall_time=300, cpu_time=200)
    result = await run_isolated(["cat"], input=data, limits=limits)
    assert result.ok
    assert result.stdout == data


async def test_streams() -> None:
    """DEVNULL throws away, STDOUT merges."""
    script = "echo out; echo err >&2"
    merged = await run_isolated(["sh", "-c", script], stderr=isojob.STDOUT)
    assert (merged.stdout, merged.stderr) == (b"out\nerr\n", None)
    silent = await run_isolated(["sh", "-c", script], stdout=isojob.DEVNULL)
    assert (silent.stdout, silent.stderr) == (None, b"err\n")


@pytest.mark.parametrize("piped", [True, False])
async def test_each_stream_goes_where_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piped: bool
) -> None:
    """Whatever stdin, stdout and stderr are, and whether the cell came with pipes or without."""
    monkeypatch.setattr(stock, "PIPED", 8 if piped else 0)
    # Four descriptors: ls has the directory open, too.
    script = "cat; echo out; echo err >&2; ls /proc/self/fd | grep -c ."
    constants = {"capture": isojob.CAPTURE, "devnull": isojob.DEVNULL, "merge": isojob.STDOUT}
    async with Pool() as pool:
        await pool.run(["true"])  # the cells are parked when it is over
        for stdin, stdout, stderr in itertools.product(
            (None, b"in\n"),
            ("capture", "devnull", "file"),
            ("capture", "devnull", "file", "merge"),
        ):
            with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
                result = await pool.run(
                    ["sh", "-c", script],
                    input=stdin,
                    stdout=constants.get(stdout, out),
                    stderr=constants.get(stderr, err),
                )
            merged = b"err\n" if stderr == "merge" else b""
            text = (stdin or b"") + b"out\n" + merged + b"4\n"
            assert (
                result.status,
                result.stdout,
                result.stderr,
                (tmp_path / "out").read_bytes(),
                (tmp_path / "err").read_bytes(),
            ) == (
                Status.OK,
                text if stdout == "capture" else None,
                b"err\n" if stderr == "capture" else None,
                text if stdout == "file" else b"",
                b"err\n" if stderr == "file" else b"",
            ), (stdin, stdout, stderr)


async def test_output_to_a_file(tmp_path: Path) -> None:
    """A caller's own writable file takes the output."""
    with (tmp_path / "out").open("wb") as file:
        result = await run_isolated(["echo", "hi"], stdout=file)
    assert result.stdout is None
    assert (tmp_path / "out").read_bytes() == b"hi\n"


async def test_stdin_from_a_file(tmp_path: Path) -> None:
    """A regular file is read by us: the job sees a pipe, which it cannot open for writing."""
    (tmp_path / "in").write_bytes(b"abc" * 1_000_000)
    with (tmp_path / "in").open("rb") as file:
        result = await run_isolated(["sh", "-c", "readlink /proc/self/fd/0; wc -c"], stdin=file)
    assert result.stdout is not None
    link, count = result.stdout.split(b"\n", 1)
    assert link.startswith(b"pipe:")
    assert int(count) == 3_000_000


async def test_stdin_from_a_file_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none can be started (pids.max) the job does not run, and the error says why."""
    start = threading.Thread.start

    def full(self: threading.Thread) -> None:
        if self.name == "isojob-stdin":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", full)
    (tmp_path / "in").write_bytes(b"abc")
    with (tmp_path / "in").open("rb") as file:
        with pytest.raises(SandboxSetupError, match=r"thread.*pids\.max") as caught:
            await run_isolated(["cat"], stdin=file)
        assert caught.value.errno == errno.EAGAIN
        monkeypatch.undo()
        assert (await run_isolated(["cat"], stdin=file)).stdout == b"abc"


async def test_stdin_from_a_socket_and_a_pipe() -> None:
    """Sockets and pipes are handed over."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"through a socket")
        ours.shutdown(socket.SHUT_WR)
        result = await run_isolated(["cat"], stdin=theirs)
    assert result.stdout == b"through a socket"
    read, write = os.pipe()
    os.write(write, b"through a pipe")
    os.close(write)
    result = await run_isolated(["cat"], stdin=read)
    os.close(read)
    assert result.stdout == b"through a pipe"


async def test_cwd() -> None:
    """cwd= is a directory inside the sandbox; the default is /box, which is also HOME."""
    assert (await run_isolated(["pwd"])).stdout == b"/box\n"
    assert (await run_isolated(["pwd"], cwd="/tmp")).stdout == b"/tmp\n"
    with pytest.raises(isojob.SandboxSetupError, match="chdir"):
        await run_isolated(["pwd"], cwd="/nowhere")


async def test_check() -> None:
    """check=True raises what handlers of subprocess catch."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        await run_isolated(["sh", "-c", "echo no; exit 9"], check=True)
    assert isinstance(caught.value, isojob.JobFailedError)
    assert (caught.value.returncode, caught.value.stdout) == (9, b"no\n")


async def test_missing_program() -> None:
    """A missing program is named, with the place that was looked in."""
    with pytest.raises(FileNotFoundError, match="no-such-program.*/usr/local/bin"):
        await run_isolated(["no-such-program"])
    with pytest.raises(isojob.CommandNotFoundError):
        await run_isolated(["/no/such/program"])


async def test_not_executable() -> None:
    """A file without execute bits, a directory, and a text without #! are not executable."""
    for command in ("/etc/passwd", "/usr"):
        with pytest.raises(PermissionError):
            await run_isolated([command])
    with pytest.raises(isojob.CommandNotExecutableError, match="Exec format"):
        await run_isolated(["./text"], files={"text": (b"just words", 0o755)})


async def test_many_arguments() -> None:
    """1 MB of arguments arrives whole; a single one beyond the kernel's limit is refused."""
    words = ["x" * 100] * 10_000
    result = await run_isolated(["sh", "-c", "echo $#", "sh", *words])
    assert result.stdout == b"10000\n"
    with pytest.raises(isojob.SandboxSetupError, match="131071"):
        await run_isolated(["echo", "x" * 1_000_000])


async def test_binary_output(python: str) -> None:
    """Bytes all the way: nothing is decoded on the way."""
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 16)"
    result = await run_isolated([python, "-I", "-c", code])
    assert result.stdout == bytes(range(256)) * 16


async def test_job_can_open_dev_stdout() -> None:
    """/dev/stdout and /dev/stderr work although the pipe belongs to another uid."""
    result = await run_isolated(["sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr"])
    assert (result.stdout, result.stderr) == (b"a\n", b"b\n")


async def test_job_can_open_dev_stdin(tmp_path: Path) -> None:
    """So does /dev/stdin, whoever feeds it; a file of the caller's stays as it was."""
    command = ["sh", "-c", "cat /dev/stdin && cat < /proc/self/fd/0"]
    result = await run_isolated(command, input=b"a\n")
    assert (result.stdout, result.stderr) == (b"a\n", b"")
    path = tmp_path / "in"
    path.write_bytes(b"b\n")
    path.chmod(0o600)
    with path.open("rb") as file:
        result = await run_isolated(command, stdin=file)
    assert (result.stdout, result.stderr) == (b"b\n", b"")
    assert path.stat().st_mode & 0o777 == 0o600
    async with Pool() as pool, pool.session() as session:
        result = await session.run(command, input=b"c\n")
        assert (result.stdout, result.stderr) == (b"c\n", b"")


async def test_pipe_of_the_callers_stays_as_it_was() -> None:
    """Who may open a pipe that others use is not for us to say."""
    read_end, write_end = os.pipe()
    try:
        modes = [os.fstat(fd).st_mode for fd in (read_end, write_end)]
        os.write(write_end, b"a")
        result = await run_isolated(["head", "-c1"], stdin=read_end)
        assert result.stdout == b"a"
        assert (await run_isolated(["true"], stdout=write_end)).ok
        assert [os.fstat(fd).st_mode for fd in (read_end, write_end)] == modes
    finally:
        os.close(read_end)
        os.close(write_end)


def test_sync() -> None:
    """Without an event loop; patience is a timeout there."""
    assert isojob.run_isolated_sync(["echo", "1"]).stdout == b"1\n"
    with pytest.raises(TimeoutError):
        isojob.run_isolated_sync(["sleep", "60"], timeout=0.2)


async def test_results_are_whole() -> None:
    """Isojob fills its models without validation; validating them changes nothing."""
    result = await run_isolated(["sh", "-c", "echo x > f; echo y"], collect=["f", "g"])
    for model in (result, result.evidence, result.usage, result.posture):
        assert model.__dict__.keys() == type(model).model_fields.keys()
        assert type(model).model_validate(dict(model.__dict__)) == model
    assert type(result).model_validate_json(result.model_dump_json()) == result
