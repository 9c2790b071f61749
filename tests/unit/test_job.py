"""Bad input is refused before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from isojob import Limits, Pool, Sandbox, SandboxSetupError
from isojob._job import DEVNULL, Job


def make(command: Any = ("true",), **options: Any) -> Job:
    """A request that has not been sent anywhere."""
    return Job.make(command, sandbox=Sandbox(), limits=options.pop("limits", Limits()), **options)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("echo hi", TypeError),
        (b"echo", TypeError),
        (Path("/bin/true"), TypeError),
        (None, TypeError),
        (5, TypeError),
        ({"true"}, TypeError),
        ([], ValueError),
        ([""], ValueError),
        (["true", None], TypeError),
        (["true", 5], TypeError),
        (["true", "a\0b"], ValueError),
        (["tr\0ue"], ValueError),
        (["true", "x" * 131072], SandboxSetupError),
    ],
)
def test_command(command: Any, error: type[Exception]) -> None:
    """A command is a sequence of strings, bytes or paths without NUL."""
    with pytest.raises(error):
        make(command)


def test_message_for_a_string() -> None:
    """The message shows what to write."""
    with pytest.raises(TypeError, match=r'\["/bin/sh", "-c", "..."\]'):
        make("echo hi")


@pytest.mark.parametrize(
    "options",
    [
        {"input": "text"},
        {"input": 5},
        {"stdin": None},
        {"stdin": True},
        {"stdin": "file"},
        {"stdout": None},
        {"stderr": object()},
        {"files": {"a": "text"}},
        {"files": {"a": None}},
        {"files": {b"a": b""}},
        {"files": {"a": ("x", 0o644)}},
        {"files": {"a": (b"x", True)}},
        {"collect": "name"},
        {"collect": [b"name"]},
        {"cwd": 5},
        {"files": ["a"]},
        {"env": ["A=1"]},
        {"limits": {"memory": 1}},
    ],
)
def test_wrong_types(options: dict[str, Any]) -> None:
    """A wrong type is a TypeError."""
    with pytest.raises(TypeError):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"input": b"", "stdin": 0},
        {"stdin": -1},
        {"stdin": 987654},
        {"files": {"/etc/passwd": b""}},
        {"files": {"../x": b""}},
        {"files": {"a/../../x": b""}},
        {"files": {"": b""}},
        {"files": {".": b""}},
        {"files": {"a//b": b""}},
        {"files": {"a/": b""}},
        {"files": {"a\0": b""}},
        {"files": {"x" * 300: b""}},
        {"files": {"a": b"", "a/b": b""}},
        {"files": {"a": (b"", 0o4755)}},
        {"files": {"a": Path("/dev/null")}},
        {"files": {"a": Path("/usr")}},
        {"files": {"a": b"x" * 70_000}, "limits": Limits(disk="64KiB")},
        {"collect": ["/etc/passwd"]},
        {"collect": ["../x"]},
        {"collect": ["**"]},
        {"collect": [""]},
        {"cwd": "relative"},
        {"cwd": "/a/../b"},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        {"env": {"A": "b\0"}},
    ],
)
def test_wrong_values(options: dict[str, Any]) -> None:
    """A value that makes no sense is a ValueError."""
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic's is one, too
        make(**options)


def test_missing_file() -> None:
    """A path that does not exist is the caller's FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        make(files={"a": Path("/no/such/file")})


@pytest.fixture
def descriptor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """An open descriptor of the kind asked for."""
    (tmp_path / "file").write_bytes(b"")
    flags = {
        "directory": (tmp_path, os.O_RDONLY | os.O_DIRECTORY),
        "O_PATH": (tmp_path / "file", os.O_PATH),
        "writable file": (tmp_path / "file", os.O_RDWR),
        "device": (Path("/dev/null"), os.O_RDONLY),
        "read-only file": (tmp_path / "file", os.O_RDONLY),
    }
    if request.param == "terminal":
        master, fd = os.openpty()
        os.close(master)
    elif request.param == "write end":
        read, fd = os.pipe()
        os.close(read)
    else:
        path, how = flags[request.param]
        fd = os.open(path, how)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    "descriptor",
    ["directory", "O_PATH", "writable file", "device", "terminal", "write end"],
    indirect=True,
)
def test_dangerous_stdin(descriptor: int) -> None:
    """What would let a job reach the host is refused: a directory as fd 0 shows it the tree."""
    with pytest.raises(ValueError, match="stdin"):
        make(stdin=descriptor)


@pytest.mark.parametrize(
    "descriptor", ["directory", "O_PATH", "device", "terminal", "read-only file"], indirect=True
)
def test_dangerous_stdout(descriptor: int) -> None:
    """Output goes to pipes, sockets and writable files only."""
    for name in ("stdout", "stderr"):
        with pytest.raises(ValueError, match=name):
            make(**{name: descriptor})


def test_regular_file_is_not_handed_over(tmp_path: Path) -> None:
    """It is read by us instead."""
    (tmp_path / "file").write_bytes(b"")
    with (tmp_path / "file").open("rb") as file:
        job = make(stdin=file)
    assert job.stdin_fd is None
    assert job.stdin_file is not None


def test_defaults() -> None:
    """Nothing inherited, everything captured."""
    job = make()
    assert (job.stdin_fd, job.stdin_file, job.input) == (None, None, None)
    assert make(stdin=DEVNULL) == job


@pytest.mark.parametrize(
    "limits", [{"memroy": 5}, {"memory": "64M"}, {"wall_time": -1}, {"cpus": True}]
)
def test_limits(limits: dict[str, Any]) -> None:
    """A misspelt or senseless limit fails loudly."""
    with pytest.raises(ValidationError):
        Limits(**limits)


def test_pool_arguments() -> None:
    """So does a senseless pool."""
    with pytest.raises(ValueError, match="max_jobs"):
        Pool(max_jobs=0)
    with pytest.raises(ValueError, match="parked"):
        Pool(parked=-1)
