"""The command line as an operator uses it: real processes, real jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from environment import SLOW, write_image

from isojob import Limits, Result, Sandbox, Status, _job
from isojob._lease import Lease
from isojob.cli._live import Foreground, Request

ISOJOB = (sys.executable, "-m", "isojob.cli")
PATIENCE = 60 * SLOW


def isojob(*arguments: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs the command to its end."""
    return subprocess.run(
        [*ISOJOB, *arguments], input=input, capture_output=True, timeout=PATIENCE, check=False
    )


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """Starts the command, in a session of its own as a terminal's would be."""
    return subprocess.Popen(
        [*ISOJOB, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["true"], 0, "ok: the job exited with status 0"),
        (["sh", "-c", "exit 3"], 3, "nonzero_exit: the job exited with status 3"),
        (["sh", "-c", "kill -SEGV $$"], 139, "signaled: SIGSEGV"),
        (["--", "nosuchprogram"], 127, "command not found in the sandbox: 'nosuchprogram'"),
        (["/etc/hostname"], 126, "cannot be executed"),
        (["--workdir", "nowhere", "true"], 125, "--workdir"),
        (["-v", "/nonexistent:/data", "true"], 125, "--volume: '/nonexistent': No such file"),
        (["--rootfs", "/nonexistent:O", "true"], 125, "--rootfs: '/nonexistent': No such file"),
        (["--workdir", "/tmp/none", "true"], 125, "chdir /tmp/none: No such file"),
        (["-v", "/etc:/usr/none", "true"], 125, "/usr/none"),
        (["-w", "/usr", "--file", f"a={__file__}", "true"], 125, "write file a: Read-only"),
        (["--wall-time", "0.2", "sleep", "100"], 137, "wall_time_limit"),
        (["--memory", "16MiB", "sh", "-c", "x=x; while :; do x=$x$x; done"], 137, "memory_limit"),
    ],
)
def test_exit_status(arguments: list[str], status: int, told: str) -> None:
    """The exit statuses of docker run, with the reason on stderr."""
    done = isojob("run", *arguments)
    assert done.returncode == status, done.stderr
    assert told in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"isojob doctor" not in done.stderr  # the host lacks nothing


@pytest.mark.parametrize("flag", [("--tmpfs", "/d"), ("--mount", "type=tmpfs,target=/d")])
@pytest.mark.parametrize("order", [1, -1])
def test_mounts_in_mounts(tmp_path: Path, flag: tuple[str, str], order: int) -> None:
    """The outer is mounted first, whichever flag comes first."""
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("mine")
    flags = [flag, ("-v", f"{tmp_path}:/d/in")][::order]
    done = isojob("run", "-q", *flags[0], *flags[1], "cat", "/d/in/file")
    assert done.stdout == b"mine", done


@pytest.mark.parametrize(
    ("flags", "place", "told"),
    [
        (("--rootfs", "{}"), "/app", "main\n/app /box"),
        (("--rootfs", "{}:O"), "//app/", "main\n/app /box"),
        (("--rootfs", "{}"), "/empty", "/empty /empty"),
        (("--rootfs", "{}"), "/new/below", "/new/below /new/below"),
        (("-v", "{}/app:/src"), "/src", "main\n/src /box"),
        (("-v", "{}:/src"), "/src/app", "main\n/src/app /box"),
        (("--mount", "type=tmpfs,target=/src"), "/src", "/src /box"),
        (("-v", "{}:/src/in"), "/src", "in\n/src /src"),
        ((), "/tmp", "/tmp /box"),
        ((), "/usr/bin/..", None),
        ((), "/etc", None),
    ],
)
def test_workdir_hides_nothing(
    tmp_path: Path, flags: tuple[str, ...], place: str, told: str | None
) -> None:
    """It is what the root or a mount has there, or else the job's own directory."""
    for path in (tmp_path, tmp_path / "usr", tmp_path / "empty", tmp_path / "app"):
        path.mkdir(mode=0o755, exist_ok=True)
        path.chmod(0o755)
    (tmp_path / "app/main").touch()
    for name in ("bin", "lib", "lib64"):
        (tmp_path / name).symlink_to(f"usr/{name}")
    if flags[:1] == ("--rootfs",):
        flags = ("-v", "/usr:/usr", *flags)
    given = [flag.format(tmp_path) for flag in flags]
    done = isojob("run", "-q", *given, "-w", place, "sh", "-c", "ls; echo $PWD $HOME")
    assert done.returncode == 0, done
    if told is None:
        assert len(done.stdout.splitlines()) > 1, done
    else:
        assert done.stdout.decode().strip() == told


def test_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker run: its variables and directory, its program, with our arguments for its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tmp_path.chmod(0o755)
    config = {
        "Env": ["GREETING=hello"],
        "WorkingDir": "/app",
        "Entrypoint": ["/bin/sh", "main.sh"],
        "Cmd": ["world"],
    }
    write_image(tmp_path / "image", config, {"app/main.sh": b"echo $GREETING $*; pwd"})
    flags = ("run", "-q", "-v", "/usr:/usr", "--image")
    image = str(tmp_path / "image")
    assert isojob(*flags, image).stdout == b"hello world\n/app\n"
    assert isojob(*flags, image, "a", "b").stdout == b"hello a b\n/app\n"
    file = ("--file", f"main.sh={tmp_path / 'own'}")
    (tmp_path / "own").write_text("ls; pwd")
    for root in (image, f"{image}:O"):
        assert isojob(*flags, root, *file, "x").stdout == b"main.sh\n/box\n"
    given = isojob(*flags, f"{image}:O", "--env", "GREETING=bye", "x")
    assert given.stdout == b"bye x\n/app\n", given
    for arguments, told in (
        ((*flags, image, "--rootfs", "/srv", "x"), b"--image"),
        ((*flags, str(tmp_path / "none"), "x"), b"--image"),
        ((*flags, str(tmp_path), "x"), b"neither an OCI image layout"),
        ((*flags, image, "--reference", "other", "x"), b"0 images"),
        (("run", "--reference", "other", "x"), b"--reference"),
        (("run",), b"CMD"),
    ):
        done = isojob(*arguments)
        assert (done.returncode, told in done.stderr) == (125, True), done
    write_image(tmp_path / "bare", {}, {})
    assert b"the image has none" in isojob(*flags, str(tmp_path / "bare")).stderr
    assert isojob(*flags, str(tmp_path / "bare"), "pwd").stdout == b"/\n"
    assert isojob(*flags, f"{tmp_path}/bare", "-w", "/w", "pwd").stdout == b"/w\n"
    made = isojob(*flags, f"{tmp_path}/bare:O", "sh", "-c", "echo made >/it; cat /it")
    assert made.stdout == b"made\n", made


def test_flags_after_the_program_are_its_own() -> None:
    """What follows the program's name is never read as a flag of ours, with or without --."""
    assert isojob("run", "-q", "echo", "--memory", "-q").stdout == b"--memory -q\n"
    assert isojob("run", "-q", "--", "echo", "--", "-v").stdout == b"-- -v\n"


def test_output_is_passed_on_exactly() -> None:
    """Every byte arrives where it belongs, and nothing else arrives on stdout."""
    data = bytes(range(256)) * 4096
    done = isojob("run", "-q", "-i", "sh", "-c", "cat; echo end >&2", input=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"end\n")


def test_output_is_live() -> None:
    """The first line can be read while the job runs: it ends only after we have answered it."""
    process = subprocess.Popen(
        [*ISOJOB, "run", "-q", "-i", "sh", "-c", "echo first; read answer; echo got $answer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        assert process.stdout.readline() == b"first\n"
        process.stdin.write(b"this\n")
        process.stdin.flush()
        assert process.stdout.read() == b"got this\n"
    assert process.returncode == 0


def test_no_stdin_unless_interactive() -> None:
    """Without -i the job's stdin is empty, whatever ours is."""
    assert isojob("run", "-q", "cat", input=b"secret").stdout == b""


def test_stdin_from_a_file(tmp_path: Path) -> None:
    """A regular file as stdin is read to its end, and /dev/null is empty."""
    (tmp_path / "in").write_bytes(b"x" * 300_000)
    for path, size in ((tmp_path / "in", 300_000), (Path("/dev/null"), 0)):
        with path.open("rb") as file:
            done = subprocess.run(
                [*ISOJOB, "run", "-q", "-i", "wc", "-c"],
                stdin=file,
                capture_output=True,
                check=True,
                timeout=PATIENCE,
            )
        assert int(done.stdout) == size


def test_dev_stdin() -> None:
    """The job may open its stdin by name, where we copy ours into a pipe for it."""
    done = isojob("run", "-q", "-i", "cat", "/dev/stdin", input=b"a\n")
    assert (done.stdout, done.stderr) == (b"a\n", b"")


def test_a_job_that_does_not_read_its_stdin() -> None:
    """Input that nobody takes is no error."""
    assert isojob("run", "-q", "-i", "true", input=b"x" * 1_000_000).returncode == 0


def test_output_limit() -> None:
    """One byte over ends the job; what came until then is passed on, and the account is whole."""
    done = isojob("run", "--output-limit", "100kB", "yes")
    assert (done.returncode, len(done.stdout)) == (137, 100_000)
    account = done.stderr.decode()
    assert "output_limit: the job wrote more to stdout than its output limit" in account
    assert "memory peak" in account


def test_output_limit_to_the_byte() -> None:
    """Exactly the limit is within it."""
    done = isojob("run", "-q", "--output-limit", "1000B", "head", "-c", "1000", "/dev/zero")
    assert (done.returncode, len(done.stdout)) == (0, 1000)


def test_reader_that_goes_away() -> None:
    """If nobody reads our stdout any more the job is ended, and we say SIGPIPE."""
    process = start("run", "-q", "yes")
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(PATIENCE) == 128 + signal.SIGPIPE


def test_full_disk() -> None:
    """If our stdout takes no more the job is ended, and it is our fault."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*ISOJOB, "run", "-q", "echo", "x"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 125
    assert b"No space left" in done.stderr


def test_closed_standard_streams() -> None:
    """A caller that closed its standard streams gets the job's status all the same."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-", *ISOJOB, "run", "sh", "-c", "echo x; exit 4"],
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_job(number: signal.Signals) -> None:
    """Ctrl-C and its like end the job in order: account, status 128+N, no traceback."""
    process = start("run", "sh", "-c", "echo ready; sleep 1000")
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        # As a terminal does it: to the whole group.
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert "killed: the caller killed the job" in err.decode()
    assert b"Traceback" not in err


def early(monkeypatch: pytest.MonkeyPatch, when: str, interrupt: Callable[[], None]) -> None:
    """Has something happen at a moment of a job of `isojob run` that is before its start."""

    def after(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            monkeypatch.setattr(owner, name, function)  # a second signal would be another story
            value = function(*args)
            interrupt()
            return value

        monkeypatch.setattr(owner, name, wrapped)

    async def job(self: Foreground) -> None:
        interrupt()
        while self.signal is None:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.01)
        await begin(self)

    begin = Foreground._job
    if when == "before the pool":
        monkeypatch.setattr(Foreground, "_job", job)
    elif when == "files are read":
        after(_job, "read_content")
    else:
        after(Lease, "send")


@pytest.mark.parametrize("collect", [[], ["made"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["before the pool", "files are read", "the job was sent"])
async def test_a_signal_before_the_start(
    when: str,
    number: signal.Signals,
    collect: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one counts, whatever is being made ready: the job does not run, or not on."""
    early(monkeypatch, when, lambda: os.kill(os.getpid(), number))
    (tmp_path / "file").write_bytes(b"x")
    request = Request(
        ["sh", "-c", f"sleep {2 * SLOW}; touch made"],
        Limits(),
        Sandbox(),
        files={"file": tmp_path / "file"},
        collect=collect,
        capture=True,
    )
    foreground = Foreground(request)
    with anyio.fail_after(PATIENCE):
        result = await foreground.run()
    assert foreground.signal == number
    assert result is None or result.status is Status.KILLED, result


def test_json() -> None:
    """--json prints the whole Result and nothing else, whatever becomes of the job."""
    done = isojob(
        *("run", "--json", "--collect", "out", "-e", "A=1", "--hostname", "here"),
        *("sh", "-c", "hostname; echo $A >&2; echo x >out; kill -9 $$"),
    )
    result = Result.model_validate_json(done.stdout)
    assert (done.returncode, done.stderr) == (137, b"")
    assert (result.status, result.returncode) == (Status.SIGNALED, -9)
    assert (result.stdout, result.stderr) == (b"here\n", b"1\n")
    assert result.files == {"out": b"x\n"}
    assert result.args[0] == "sh"


def test_json_of_a_limit() -> None:
    """With --json the library captures the output, up to its limit."""
    done = isojob("run", "--json", "--output-limit", "10B", "yes")
    result = Result.model_validate_json(done.stdout)
    assert (done.returncode, result.status) == (137, Status.OUTPUT_LIMIT)
    assert result.stdout == b"y\n" * 5


def test_json_of_a_job_that_never_ran() -> None:
    """There is no Result then: stdout stays empty, stderr has the reason."""
    done = isojob("run", "--json", "nosuchprogram")
    assert (done.returncode, done.stdout) == (127, b"")
    assert b"nosuchprogram" in done.stderr


def test_json_that_nobody_takes() -> None:
    """A full disk is our fault and is said in a line; a closed pipe ends us as it ends others."""
    command = [sys.executable, "-m", "isojob.cli", "run", "--json", "true"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


def test_docker_spellings() -> None:
    """-h is the hostname, a quota may begin with its point, and every job goes as with --rm."""
    done = isojob("run", "-q", "--rm", "-h", "here", "--cpus", ".5", "hostname")
    assert (done.returncode, done.stdout) == (0, b"here\n")
    done = isojob("run", "--rm", "-it", "true")
    assert (done.returncode, b"open_isolated(pty=True)" in done.stderr) == (125, True)


def test_files_in_and_out(tmp_path: Path) -> None:
    """--file brings files in, --collect out; links and files that are not there are told."""
    (tmp_path / "in").write_text("content\n")
    to = tmp_path / "to"
    arguments = (
        *("run", "--file", f"dir/a={tmp_path}/in", "--collect", "*", "--collect", "none"),
        *("--collect-to", str(to)),
        *("--", "sh", "-c", "cp dir/a b; ln -s /etc/passwd link"),
    )
    done = isojob(*arguments)
    assert done.returncode == 125, done.stderr
    assert (to / "b").read_text() == "content\n"
    assert sorted(os.listdir(to)) == ["b"]
    account = done.stderr.decode()
    assert "'link': a symbolic link" in account
    assert "'none': not found" in account
    (to / "b").write_text("older\n")
    done = isojob(*arguments)
    assert (done.returncode, (to / "b").read_text()) == (125, "older\n")
    assert "--force" in done.stderr.decode()
    assert b"--force" not in isojob(arguments[0], "--force", *arguments[1:]).stderr
    assert (to / "b").read_text() == "content\n"


@pytest.mark.parametrize(
    ("options", "script", "status", "files"),
    [
        ([], "head -c 3000 /dev/zero >big", 0, ["big"]),
        (["--collect-limit", "1kB"], "head -c 3000 /dev/zero >big", 125, []),
        ([], "exit 3", 3, []),
    ],
)
def test_what_is_not_brought_back_is_told(
    options: list[str], script: str, status: int, files: list[str], tmp_path: Path
) -> None:
    """With --quiet, too; and no job is well whose files are lost."""
    collect = ("--collect", "big", "--collect-to", str(tmp_path))
    done = isojob("run", "-q", *options, *collect, "--", "sh", "-c", script)
    assert (done.returncode, os.listdir(tmp_path)) == (status, files)
    assert (b"isojob: not collected: 'big': " in done.stderr) is (not files)


def test_what_json_does_not_have_is_told() -> None:
    """The same status as with --collect-to."""
    for script, status in (("true", 125), ("exit 3", 3), ("echo >big", 0)):
        done = isojob("run", "--json", "--collect", "big", "--", "sh", "-c", script)
        assert done.returncode == status
        assert ("big" in json.loads(done.stdout)["uncollected"]) is (status != 0)


def test_what_wildcards_fit_of_mounts_is_not_missed(tmp_path: Path) -> None:
    """The caller has it: bringing back the rest is success."""
    (tmp_path / "in.txt").write_text("content\n")
    tmp_path.chmod(0o755)
    collect = ("--collect", "*.txt", "--collect-to", str(tmp_path / "out"))
    shown = ("-v", f"{tmp_path}/in.txt:/box/in.txt")
    done = isojob("run", "-q", *shown, *collect, "--", "cp", "in.txt", "out.txt")
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(tmp_path / "out") == ["out.txt"]


@pytest.mark.parametrize("is_reset", [True, False])
def test_stdin_that_cannot_be_read(is_reset: bool) -> None:
    """Is told, and ends the input, not the job; what it made of half its input is no success."""
    status, said = (3, 3) if is_reset else (0, 125)
    ours, theirs = socket.socketpair()
    with ours, theirs, open("/dev/null", "wb") as written:
        if is_reset:
            ours.send(b"unread")
            theirs.close()
        done = subprocess.run(
            [*ISOJOB, "run", "-q", "-i", "sh", "-c", f"cat; echo done; exit {status}"],
            stdin=(ours if is_reset else written).fileno(),
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stdout) == (said, b"done\n"), done.stderr
    assert done.stderr.startswith(b"isojob: cannot read all of stdin: ")
    assert done.stderr.count(b"\n") == 1


def test_what_the_job_sees(tmp_path: Path) -> None:
    """Mounts, ids, working directory and environment are as the flags say, and no more."""
    (tmp_path / "f").write_text("shown\n")
    os.chmod(tmp_path, 0o755)
    script = "cat /data/f; touch /data/x || echo refused; touch /s/x; id -u; id -g; pwd; env"
    done = isojob(
        *("run", "-q", "-v", f"{tmp_path}:/data", "--tmpfs", "/s:size=1MiB", "-u", "5:6"),
        *("-w", "/work", "-e", "A=b", "--", "sh", "-c", script),
    )
    lines = done.stdout.decode().splitlines()
    assert lines[:5] == ["shown", "refused", "5", "6", "/work"], done
    assert {line.partition("=")[0] for line in lines[5:]} <= {
        *("A", "PATH", "HOME", "TMPDIR", "LANG", "PWD", "OLDPWD", "SHLVL", "_"),
    }
    assert not (tmp_path / "x").exists()


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    """--security-opt seccomp=FILE is what the job runs under, and the account names the call."""
    profile = tmp_path / "p.json"
    profile.write_text(
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": '
        '[{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}]}'
    )
    done = isojob("run", "--security-opt", f"seccomp={profile}", "sh", "-c", "mkdir x; echo on")
    assert (done.returncode, done.stdout) == (137, b"")
    assert "seccomp_violation: the job made the system call mkdir" in done.stderr.decode()
    assert "seccomp p.json" in done.stderr.decode()
