"""The command line without a kernel: what flags mean, and what comes of mistakes."""

from __future__ import annotations

import builtins
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import isojob
from isojob import Evidence, Limits, Mount, Posture, Result, Root, SeccompProfile, Status
from isojob.cli import OUR_FAULT, _options, main
from isojob.cli._account import exit_status, print_account
from isojob.cli._app import app
from isojob.cli._collected import write_files
from isojob.cli._options import OptionError
from isojob.verdict import usage, verdict


def limits(*ulimits: str, **flags: str) -> Limits:
    """Limits from flags, as the command makes them."""
    return _options.make_limits(flags, ulimits)


def test_a_file_that_does_not_fit_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written whole is not there, not even in part."""
    fdopen = os.fdopen

    def full(fd: int, mode: str) -> Any:
        stream = fdopen(fd, mode, 0)

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *error: object) -> None:
                stream.close()

            def write(self, content: bytes) -> None:
                stream.write(content[:1])
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr(os, "fdopen", full)
    (tmp_path / "older").mkdir()
    names = ("a", "b/c/d", "older/new/e")
    failed = write_files(dict.fromkeys(names, b"content"), tmp_path, force=False)
    assert [*failed] == [*names] and "No space" in failed["a"]
    assert [*tmp_path.rglob("*")] == [tmp_path / "older"]


def test_no_flag_is_the_library_default() -> None:
    """Without flags a job has the limits that it has in Python."""
    assert limits() == Limits()
    assert _options.make_limits({"memory": None, "cpus": None}) == Limits()


def test_limits() -> None:
    """Sizes, seconds, counts and lists arrive as the models read them."""
    read = limits(
        memory="256MiB",
        cpus="0.5",
        cpuset="0-1",
        processes="7",
        cpu_time="1.5",
        wall_time="3",
        output="1kB",
        disk="1048576",
        io_read_bps="10MiB",
        io_write_iops="100",
    )
    assert read == Limits(
        memory=256 << 20,
        cpus=0.5,
        cpuset="0-1",
        processes=7,
        cpu_time=1.5,
        wall_time=3,
        output=1000,
        disk=1 << 20,
        io_read_bps=10 << 20,
        io_write_iops=100,
    )


def test_none_is_unlimited() -> None:
    """Every limit can be given up by name."""
    assert limits(memory="none", wall_time="none").memory is None
    assert limits(cpuset="none").cpuset is None


def test_one_processor_is_a_list() -> None:
    """--cpuset-cpus 0 is no number."""
    assert limits(cpuset="0").cpuset == "0"


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("memory", "64M", ["--memory", "64MiB"]),
        ("memory", "1k", ["--memory", "unit"]),
        ("processes", "many", ["--pids-limit"]),
        ("processes", "0", ["--pids-limit"]),
        ("processes", "-1", ["--pids-limit", "give none"]),
        ("memory", "-1", ["--memory", "give none"]),
        ("cpu_time", "-1", ["--cpu-time"]),
        ("wall_time", "soon", ["--wall-time"]),
        ("cpuset", "x", ["--cpuset-cpus"]),
        ("io_read_bps", "/dev/sda:1MiB", ["--device-read-bps", "rate alone (1MiB)"]),
    ],
)
def test_refused_limits_name_the_flag(field: str, text: str, words: list[str]) -> None:
    """A bad value is told by the flag that carried it, in the models' words."""
    with pytest.raises(OptionError) as caught:
        limits(**{field: text})
    assert all(word in str(caught.value) for word in words)


def test_ulimits() -> None:
    """Docker's names of rlimits; soft and hard are one number here; -1 is unlimited."""
    read = limits("nofile=50", "fsize=1024:1024", "core=0", "as=-1")
    assert (read.open_files, read.file_size, read.address_space) == (50, 1024, None)


@pytest.mark.parametrize("text", ["nofile", "nofile=x", "nofile=1:2", "locks=1", "nofile=1", "="])
def test_refused_ulimits(text: str) -> None:
    """What an rlimit cannot mean is refused under the flag's name."""
    with pytest.raises(OptionError, match="--ulimit"):
        limits(text)


def test_ulimit_of_the_user_points_to_the_job() -> None:
    """Limits that the kernel counts by user or process have a flag that counts the job."""
    with pytest.raises(OptionError, match="--pids-limit"):
        limits("nproc=4")


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only unless it says rw; a relative source counts from here."""
    monkeypatch.chdir(tmp_path)
    for name in ("in", "rw"):
        (tmp_path / name).mkdir()
    assert _options.volume("/usr:/data") == Mount.bind("/usr", "/data")
    assert _options.volume("/usr:/data:ro") == Mount.bind("/usr", "/data")
    assert _options.volume("/usr:/data:rw") == Mount.bind("/usr", "/data", read_only=False)
    assert _options.volume("./in:/data") == Mount.bind(tmp_path / "in", "/data")
    # A source called rw is no mode.
    assert _options.volume("./rw:/rw").read_only


@pytest.mark.parametrize(
    "text",
    ["/usr", "data:/data", "/usr:/data:z", ":/data", "/usr:", "/usr:data", "/:/data", "/no:/d"],
)
def test_refused_volumes(text: str) -> None:
    """Named volumes, odd modes and dangerous paths are refused under the flag's name."""
    with pytest.raises(OptionError, match="--volume"):
        _options.volume(text)


def test_mounts(tmp_path: Path) -> None:
    """Docker's long form, its aliases and its quoting."""
    assert _options.mount("type=bind,src=/usr,dst=/d") == Mount.bind("/usr", "/d")
    assert _options.mount("type=bind,source=/usr,target=/d,readonly") == Mount.bind("/usr", "/d")
    source = tmp_path / "a,b"
    source.mkdir()
    writable = Mount.bind(source, "/d", read_only=False)
    assert _options.mount(f'type=bind,"source={source}",target=/d,readonly=false') == writable
    tmpfs = Mount.tmpfs("/d", size="1MiB")
    assert _options.mount("type=tmpfs,destination=/d,tmpfs-size=1MiB") == tmpfs
    assert _options.mount("type=tmpfs,destination=/d,tmpfs-size=1048576") == tmpfs
    assert _options.tmpfs("/d:size=1MiB") == tmpfs
    assert _options.tmpfs("/d") == Mount.tmpfs("/d", size="64MiB")


@pytest.mark.parametrize(
    "text",
    [
        "source=/usr,target=/d",
        "type=volume,source=x,target=/d",
        "type=bind,source=/usr",
        "type=bind,source=/usr,target=/d,target=/e",
        "type=bind,source=/usr,target=/d,bind-propagation=shared",
        "type=bind,source=/usr,target=/d,readonly=maybe",
        "type=tmpfs,target=/d,tmpfs-size=1M",
        "type=tmpfs,target=/d\ntype=tmpfs,target=/e",
        "",
    ],
)
def test_refused_mounts(text: str) -> None:
    """What a mount cannot mean is refused under the flag's name."""
    with pytest.raises(OptionError, match="--mount"):
        _options.mount(text)


def test_refused_tmpfs() -> None:
    """A size needs its unit, and there is no other option."""
    for text in ("/d:size=1M", "/d:noexec", "d"):
        with pytest.raises(OptionError, match="--tmpfs"):
            _options.tmpfs(text)


def test_user() -> None:
    """Numbers alone; the gid is the uid's number unless given."""
    assert _options.user("77") == (77, 77)
    assert _options.user("77:88") == (77, 88)
    for text in ("nobody", "77:", "", "-1"):
        with pytest.raises(OptionError, match="--user"):
            _options.user(text)
    for text in ("0", "00:5", "5:0"):
        with pytest.raises(OptionError, match="no job is root: give 1 to 65533"):
            _options.user(text)


def test_sandbox(tmp_path: Path) -> None:
    """Flags become fields of the sandbox, and what is not given stays the default."""
    assert _options.make_sandbox() == isojob.Sandbox()
    made = _options.make_sandbox(
        rootfs=str(tmp_path),
        identity="5:6",
        hostname="here",
        workdir="/w",
        allow_missing=["io_limit"],
        seccomp=SeccompProfile.compute(),
    )
    assert made.root == Root.directory(tmp_path)
    assert (made.uid, made.gid, made.hostname, made.workdir) == (5, 6, "here", "/w")
    assert made.allow_missing == {"io_limit"}
    assert made.seccomp.name == "compute"
    made = _options.make_sandbox(rootfs=f"{tmp_path}:O")
    assert made.root == Root.directory(tmp_path, writable=True)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"identity": "0"}, "--user"),
        ({"hostname": "a b"}, "--hostname"),
        ({"workdir": "relative"}, "--workdir"),
        ({"allow_missing": ["everything"]}, "--allow-missing"),
        ({"rootfs": "/"}, "--rootfs"),
    ],
)
def test_refused_sandboxes_name_the_flag(fields: dict[str, Any], flag: str) -> None:
    """A refused field is told by its flag."""
    with pytest.raises(OptionError, match=flag):
        _options.make_sandbox(**fields)


def test_profiles(tmp_path: Path) -> None:
    """Profiles by name or file; no-new-privileges is accepted, since every job has it."""
    assert _options.profile([]) == SeccompProfile.default()
    assert _options.profile(["seccomp=compute"]) == SeccompProfile.compute()
    chosen = _options.profile(["no-new-privileges", "seccomp=unconfined"])
    assert chosen == SeccompProfile.unconfined()
    file = tmp_path / "mine=1.json"
    file.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert _options.profile([f"seccomp={file}"]).name == "mine=1.json"
    for text in ("apparmor=x", "seccomp", "no-new-privileges=false", "seccomp=/nonexistent"):
        with pytest.raises(OptionError, match="--security-opt"):
            _options.profile([text])


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files first, flags over them; a bare name passes ours on if we have it, and only that."""
    monkeypatch.setenv("OURS", "o")
    monkeypatch.delenv("UNSET", raising=False)
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=1\nB=x=y\nOURS\n")
    assert _options.environment(["A=2", "UNSET", "E="], [file]) == {
        "A": "2",
        "B": "x=y",
        "OURS": "o",
        "E": "",
    }
    file.write_bytes(b"A=\x0cOURS\x0b\xe2\x80\xa8OURS\rOURS\r\n\r\nB=1\r\n#\r\nC=\xff")
    assert _options.environment([], [file]) == {
        "A": "\x0cOURS\x0b\u2028OURS\rOURS",
        "B": "1",
        "C": "\udcff",
    }
    with pytest.raises(OptionError, match="--env:"):
        _options.environment(["=x"], [])
    with pytest.raises(OptionError, match="--env-file"):
        _options.environment([], [tmp_path / "none"])


def test_files(tmp_path: Path) -> None:
    """NAME=PATH, each name once, of files that are there."""
    file = tmp_path / "f=1"
    file.write_text("x")
    assert _options.files([f"a/b={file}"]) == {"a/b": file}
    for texts in (["a"], [f"={file}"], ["a="], [f"a={tmp_path}"], [f"a={file}", f"a={file}"]):
        with pytest.raises(OptionError, match="--file"):
            _options.files(texts)


def result(**evidence: Any) -> Result:
    """A result with this evidence."""
    fields: dict[str, Any] = {"si_code": "exited", "si_status": 0, "wall_ns": 1_000_000}
    made = Evidence(**{**fields, **evidence})
    return Result(
        args=("x",),
        status=verdict(made),
        returncode=made.returncode,
        usage=usage(made),
        evidence=made,
        posture=Posture(
            cgroup="v2", privilege="root", kernel="6.1", namespaces=("user",), seccomp="default"
        ),
    )


@pytest.mark.parametrize(
    ("evidence", "status"),
    [
        ({}, 0),
        ({"si_status": 3}, 3),
        ({"si_status": 137}, 137),
        ({"si_code": "killed", "si_status": 11}, 139),
        ({"si_code": "killed", "si_status": 9, "cause": "wall"}, 137),
        ({"si_status": 0, "stdout_exceeded": True}, 137),
        ({"cause": "stop", "stop": "kill", "si_code": "killed", "si_status": 9}, 137),
        ({"cause": "seccomp", "si_code": "killed", "si_status": 9}, 137),
    ],
)
def test_exit_status(evidence: dict[str, Any], status: int) -> None:
    """The job's own status, 128 + N for its signal, 137 for whatever isojob ended."""
    assert exit_status(result(**evidence)) == status


def account(made: Result, **options: Any) -> str:
    """The account as text."""
    console = Console(width=100, force_terminal=False, color_system=None)
    with console.capture() as capture:
        print_account(console, made, Limits(), {}, to=Path("out"), status=0, **options)
    return capture.get()


def test_account_tells_the_cause() -> None:
    """The account has status, sentence, use and posture; what the host cannot tell, it says."""
    text = account(result(cause="wall", wall_limit_ns=30_000_000_000))
    assert text.startswith("isojob")
    assert "wall_time_limit: the job ran into its wall time limit of 30 s" in text
    assert "not known on this host" in text
    assert "cgroup v2" in text
    assert "seccomp default" in text


def test_account_shows_names_as_they_are() -> None:
    """A file's name is never markup nor a command to the terminal."""
    made = result().model_copy(
        update={"files": {"[red]x": b"1"}, "uncollected": {"a\x1b[2Jb\n": "a symbolic link"}}
    )
    text = account(made)
    assert "[red]x" in text
    assert "\x1b" not in text
    assert r"'a\x1b[2Jb\n'" in text


def test_collected_files_are_written(tmp_path: Path) -> None:
    """Directories are made, and a file is plain, whatever the job had."""
    to = tmp_path / "deep" / "out"
    assert write_files({"a": b"1", "d/e/f": b"2"}, to, force=False) == {}
    assert (to / "a").read_bytes() == b"1"
    assert (to / "d/e/f").read_bytes() == b"2"
    assert not stat.S_IMODE((to / "a").stat().st_mode) & 0o7111


def test_collected_files_overwrite_nothing_unasked(tmp_path: Path) -> None:
    """An older file stays as it is and is named; --force replaces it, not what it links to."""
    older = tmp_path / "older"
    older.write_bytes(b"precious")
    os.link(older, tmp_path / "a")
    failed = write_files({"a": b"1", "b": b"2"}, tmp_path, force=False)
    assert list(failed) == ["a"]
    assert "--force" in failed["a"]
    assert (tmp_path / "b").read_bytes() == b"2"
    assert write_files({"a": b"1"}, tmp_path, force=True) == {}
    assert (tmp_path / "a").read_bytes() == b"1"
    assert older.read_bytes() == b"precious"


@pytest.mark.parametrize("force", [False, True])
def test_collected_files_follow_no_link(tmp_path: Path, force: bool) -> None:
    """Links in the directory lead nowhere, as a directory or as a file."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"precious")
    to = tmp_path / "to"
    to.mkdir()
    (to / "d").symlink_to(outside)
    (to / "f").symlink_to(outside / "victim")
    failed = write_files({"d/victim": b"1", "d/new": b"1", "f": b"1"}, to, force=force)
    assert {"d/victim", "d/new"} <= set(failed)
    assert (outside / "victim").read_bytes() == b"precious"
    assert sorted(os.listdir(outside)) == ["victim"]
    # Forced, the link itself is replaced.
    assert ("f" in failed) is not force


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a//b", ".", "", "a/"])
def test_collected_files_stay_inside(tmp_path: Path, name: str) -> None:
    """A name that leads away is refused, though the library sends none."""
    to = tmp_path / "to"
    assert list(write_files({name: b"1"}, to, force=True)) == [name]
    assert os.listdir(tmp_path) == ["to"]


def test_version() -> None:
    """--version prints the version and ends well."""
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"isojob {isojob.__version__}\n")


def test_help_names_every_command_and_status() -> None:
    """The help of run tells the exit statuses and the flags."""
    assert {"run", "doctor", "seccomp"} <= set(CliRunner().invoke(app, ["--help"]).output.split())
    text = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["run", "--help"]).output
    for word in ("--memory", "--pids-limit", "--volume", "--json", "125", "126", "127", "137"):
        assert word in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--nonsense", "true"],
        ["nonsense"],
        ["run", "--memory", "64M", "true"],
        ["run", "--network", "host", "true"],
        ["run", "--collect", "x", "true"],
        ["run", "--collect-to", "/tmp/x", "true"],
        ["run", "--security-opt", "seccomp=/nonexistent", "true"],
        ["seccomp", "show", "/nonexistent"],
        ["seccomp", "compile", "default"],
    ],
)
def test_mistakes_are_125(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in the flags is our fault to tell, on stderr, without a traceback."""
    assert main(arguments) == OUR_FAULT
    out, err = capsys.readouterr()
    assert err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(("command", "method"), [("prune", "prune"), ("list", "stored")])
def test_a_store_that_is_closed(
    command: str,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A store that may not be read or written is told of, without a traceback, and is not empty."""

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/store")

    monkeypatch.setattr(f"isojob.cli._images.Image.{method}", refused)
    assert main(["image", command, "--store", "/store"]) == OUR_FAULT
    err = capsys.readouterr().err
    assert "--store" in err and "Permission denied" in err
    assert "Traceback" not in err


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without typer and rich, main says what to install."""
    original = builtins.__import__

    def importing(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] in ("typer", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert main(["--version"]) == OUR_FAULT
    assert 'pip install "isojob[cli]"' in capsys.readouterr().err


def test_a_fault_of_ours_is_no_status_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unforeseen exception shows its traceback and ends with 125."""

    def fail(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("isojob.cli._app.invoke", fail)
    assert main([]) == OUR_FAULT
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_seccomp_show() -> None:
    """Show lists what is allowed, what depends on arguments and what is denied."""
    text = CliRunner().invoke(app, ["seccomp", "show", "compute"]).output
    sections: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.splitlines():
        if line.endswith(")"):
            current = sections.setdefault(line.rpartition(" (")[0], set())
        else:
            current.update(line.split())
    assert {"read", "write", "execve"} <= sections["allow"]
    assert {"ptrace", "mount"} <= sections["kill"]
    assert "connect" in sections["errno EPERM"]
    assert any("prlimit64" in names for title, names in sections.items() if "arguments" in title)


def test_seccomp_show_tells_unresolved_names(tmp_path: Path) -> None:
    """A call that nobody knows stays denied, and show says so."""
    file = tmp_path / "p.json"
    file.write_text(
        '{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": '
        '[{"names": ["execve", "read", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]}'
    )
    text = CliRunner().invoke(app, ["seccomp", "show", str(file)]).output
    assert "no_such_call" in text.partition("known nowhere")[2]
    text = CliRunner().invoke(app, ["seccomp", "check", str(file)]).output
    assert "no_such_call" in text


def test_seccomp_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check is 0 for what can be enforced, and 1 with the reason for what cannot."""
    assert main(["seccomp", "check", "default"]) == 0
    file = tmp_path / "bad.json"
    file.write_text('{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}')
    capsys.readouterr()
    assert main(["seccomp", "check", str(file)]) == 1
    assert "execve" in capsys.readouterr().err


def test_seccomp_compile(tmp_path: Path) -> None:
    """Compile writes the very filter that jobs get."""
    file = tmp_path / "bpf"
    assert main(["seccomp", "compile", "default", "-o", str(file)]) == 0
    assert file.read_bytes() == SeccompProfile.default().compile().bpf


def test_status_of_the_models() -> None:
    """The statuses that end with 137 are all but three: a new one needs a decision here."""
    own = {Status.OK, Status.NONZERO_EXIT, Status.SIGNALED}
    assert len(set(Status) - own) == 6
