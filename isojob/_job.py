"""What the caller asked for, checked before anything starts, and its message to the launcher."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeAlias

from isojob._spec import CellSpec
from isojob.errors import SandboxSetupError
from isojob.limits import Limits
from isojob.sandbox import Sandbox
from isojob.wire import MessageType, Tag, Writer

if TYPE_CHECKING:
    from isojob._attended import Attended

__all__ = [
    "CAPTURE",
    "DEVNULL",
    "STDOUT",
    "Content",
    "HasFileno",
    "Job",
    "StdioArg",
    "StrOrBytesPath",
    "read_content",
]

CAPTURE = subprocess.PIPE
"""Collect the stream in the result (the value of `subprocess.PIPE`)."""
DEVNULL = subprocess.DEVNULL
"""An empty stdin, or output thrown away inside the sandbox."""
STDOUT = subprocess.STDOUT
"""For ``stderr=``: into the same stream as stdout."""

StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Content: TypeAlias = bytes | Path | tuple[bytes, int]


class HasFileno(Protocol):
    """Anything with a descriptor, such as an open file or a socket."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


StdioArg: TypeAlias = int | HasFileno

_NOTHING: Mapping[str, Content] = MappingProxyType({})

# One argument or variable with its NUL (MAX_ARG_STRLEN, execve(2)).
_MAX_STRING = 131072


@dataclass(frozen=True, slots=True)
class Environment:
    """A job's variables, as fields of its message, and where its program is looked up."""

    path: str
    fields: bytes

    @classmethod
    def make(cls, variables: Mapping[str, str]) -> Environment:
        """Writes the fields.

        Raises:
            SandboxSetupError: A variable is longer than the kernel takes (E2BIG).
        """
        out = Writer(MessageType.JOB)
        for name, value in variables.items():
            _check_length(os.fsencode(f"{name}={value}"))
            out.text(Tag.ENV, f"{name}={value}")
        path = variables.get("PATH", "")
        out.text(Tag.PATH, path)
        return cls(path, out.body())


@dataclass(slots=True)
class Job:
    """One checked request."""

    args: tuple[str, ...]
    argv: list[bytes]
    limits: Limits
    environment: Environment
    cwd: str | None
    workdir: str
    input: bytes | None = None
    stdin_fd: int | None = None
    stdin_file: int | None = None
    stdout: int = CAPTURE
    stderr: int = CAPTURE
    files: Mapping[str, Content] = field(default_factory=dict)
    collect: tuple[str, ...] = ()
    attended: Attended | None = None
    no_exec: bool = False
    """Its files are all there is to do."""
    result_size: int = 0
    """Bytes of a memfd for the words of a warm interpreter; 0: it is none."""
    result_fd: int = -1
    """That memfd, made with the job's streams; who asked for it closes it."""
    modes: dict[str, int] = field(default_factory=dict)
    patterns: dict[str, int] = field(default_factory=dict)
    """Of what was collected, by name: permissions, and which of `collect` asked for it last."""

    @classmethod
    def make(
        cls,
        command: Sequence[StrOrBytesPath],
        *,
        sandbox: Sandbox,
        limits: Limits,
        environment: Environment | None = None,
        input: bytes | None = None,
        stdin: StdioArg = DEVNULL,
        stdout: StdioArg = CAPTURE,
        stderr: StdioArg = CAPTURE,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        files: Mapping[str, Content] | None = None,
        collect: Sequence[str] = (),
    ) -> Job:
        """Checks everything that can be checked without the kernel.

        Raises:
            TypeError: An argument of the wrong type, such as a str for the command.
            ValueError: An argument that makes no sense.
            SandboxSetupError: An argument or variable longer than the kernel takes (E2BIG).
        """
        if not isinstance(limits, Limits):
            raise TypeError(f"limits must be isojob.Limits, not {type(limits).__name__}")
        if env is not None and not isinstance(env, Mapping):
            raise TypeError(f"env must be a mapping, not {type(env).__name__}")
        args, argv = _argv(command)
        job = cls(
            args=args,
            argv=argv,
            limits=limits,
            environment=environment
            if environment is not None and not env
            else Environment.make(sandbox.environment(env)),
            cwd=None if cwd is None else _cwd(cwd),
            workdir=sandbox.workdir,
            files=_NOTHING if files is None else check_files(files, limits),
            collect=_patterns(collect) if collect else (),
        )
        if input is not None:
            if not _is(stdin, DEVNULL):
                raise ValueError("give either input= or stdin=, not both")
            if not isinstance(input, (bytes, bytearray, memoryview)):
                raise TypeError(f"input must be bytes, not {type(input).__name__}: encode it first")
            job.input = bytes(input)
        elif stdin is not DEVNULL:
            job._set_stdin(stdin)
        if stdout is not CAPTURE:
            job.stdout = _output(stdout, "stdout")
        if stderr is not CAPTURE:
            job.stderr = STDOUT if _is(stderr, STDOUT) else _output(stderr, "stderr")
        return job

    def _set_stdin(self, stdin: StdioArg) -> None:
        if _is(stdin, DEVNULL):
            return
        fd = _fileno(stdin, "stdin")
        mode, flags = _describe(fd, "stdin")
        if stat.S_ISREG(mode):
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise ValueError("stdin: a regular file must be opened read-only")
            # Never handed over: the job could open it again, for writing, by /proc/self/fd.
            self.stdin_file = fd
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            if flags & os.O_ACCMODE == os.O_WRONLY:
                raise ValueError("stdin: this pipe can only be written to")
            self.stdin_fd = fd
        else:
            raise ValueError(
                f"stdin: {_kind(mode)} would let the job reach the host; give a pipe, a socket "
                "or a regular file opened read-only"
            )

    @property
    def reads_files(self) -> bool:
        """Whether making its message reads files of the host, and so blocks."""
        return any(isinstance(content, Path) for content in self.files.values())

    def message(self, spec: CellSpec, stdio: int) -> Writer:
        """The JOB message; contents of `files` that are paths are read here (blocking)."""
        out = Writer(MessageType.JOB)
        for argument in self.argv:
            out.put(Tag.ARG, argument + b"\0")
        out.fields(self.environment.fields)
        if self.cwd is not None:
            out.text(Tag.CWD, self.cwd)
        out.put(Tag.STDIO, b"", stdio)
        out.fields(spec.job_fields(self.limits))
        for name, content in self.files.items():
            mode, data = read_content(content)
            out.blob(Tag.PUT, name, data, mode)
        return out

    def collect_message(self) -> bytes:
        """The COLLECT message for init."""
        out = Writer(MessageType.COLLECT)
        out.text(Tag.CWD, self.cwd or self.workdir)
        for pattern in self.collect:
            out.text(Tag.PATTERN, pattern)
        return out.message()


def _is(value: object, constant: int) -> bool:
    return value is constant or (type(value) is int and value == constant)


def _argv(command: Sequence[StrOrBytesPath]) -> tuple[tuple[str, ...], list[bytes]]:
    """The command as text, for people and as `os.fsdecode` reads it, and as the kernel takes it."""
    if isinstance(command, (str, bytes, bytearray, os.PathLike)) or not isinstance(
        command, Sequence
    ):
        raise TypeError(
            'command must be a sequence such as ["/bin/sh", "-c", "..."], '
            f"not {type(command).__name__}"
        )
    args, argv = [], []
    for argument in command:
        if not isinstance(argument, (str, bytes, os.PathLike)):
            raise TypeError(f"command holds {type(argument).__name__}: {argument!r:.80}")
        raw = os.fsencode(argument)
        if b"\0" in raw:
            raise ValueError(f"command holds a NUL byte: {argument!r:.80}")
        _check_length(raw)
        argv.append(raw)
        # `str` drops a subclass that pydantic would not serialise.
        args.append(str(argument) if isinstance(argument, str) else os.fsdecode(argument))
    if not argv or not argv[0]:
        raise ValueError("command is empty: name a program to run")
    return tuple(args), argv


def _check_length(raw: bytes) -> None:
    if len(raw) >= _MAX_STRING:
        raise SandboxSetupError(
            "execve",
            errno.E2BIG,
            f"one argument or variable has {len(raw)} bytes, at most {_MAX_STRING - 1}: use files= "
            "or input=",
        )


def _cwd(path: str) -> str:
    if not isinstance(path, str):
        raise TypeError(f"cwd must be a str, not {type(path).__name__}")
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"cwd {path!r}: must be an absolute path inside the sandbox, without ..")
    return path


def _check_relative(name: object, what: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{what}: names are str, not {type(name).__name__}")
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{what} {name!r}: must be a relative path without '.', '..', NUL or empty parts"
        )
    if is_too_long(name):
        raise ValueError(f"{what} {name!r:.80}: too long")
    return name


def is_too_long(name: str) -> bool:
    """Whether no job can be given a file of this name."""
    raw = os.fsencode(name)
    return len(raw) > 2048 or any(len(part) > 255 for part in raw.split(b"/"))


def check_files(files: Mapping[str, Content], limits: Limits) -> dict[str, Content]:
    """Files for a job, if their names, types and total size make sense.

    Raises:
        TypeError, ValueError: They do not.
    """
    if not isinstance(files, Mapping):
        raise TypeError(f"files must be a mapping, not {type(files).__name__}")
    total = 0
    for name, content in files.items():
        _check_relative(name, "files")
        if isinstance(content, tuple):
            if (
                len(content) != 2
                or not isinstance(content[0], bytes)
                or isinstance(content[1], bool)
                or not isinstance(content[1], int)
            ):
                raise TypeError(f"files[{name!r}]: a tuple is (bytes, mode)")
            if not 0 <= content[1] <= 0o777:
                raise ValueError(f"files[{name!r}]: mode {content[1]:#o} is not within 0o777")
        elif isinstance(content, Path):
            if not stat.S_ISREG(mode := content.stat().st_mode):
                raise ValueError(f"files[{name!r}]: {content} is {_kind(mode)}")
        elif not isinstance(content, bytes):
            kind = type(content).__name__
            raise TypeError(f"files[{name!r}]: give bytes, a Path or (bytes, mode), not {kind}")
        total += content_size(content)
    if limits.disk is not None and total > limits.disk:
        raise ValueError(f"files: {total} bytes do not fit into limits.disk ({limits.disk})")
    names = set(files)
    for name in names:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            if (above := "/".join(parts[:depth])) in names:
                raise ValueError(f"files: {above!r} is both a file and a directory of {name!r}")
    return dict(files)


def content_size(content: Content) -> int:
    if isinstance(content, Path):
        return content.stat().st_size
    return len(content[0] if isinstance(content, tuple) else content)


def read_content(content: Content) -> tuple[int, bytes]:
    """Mode and bytes of a file for the job."""
    if isinstance(content, tuple):
        return content[1], content[0]
    if isinstance(content, bytes):
        return 0o644, content
    with content.open("rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"files: {content} is no regular file any more")
        return stat.S_IMODE(info.st_mode) & 0o777, file.read()


def _patterns(collect: Sequence[str]) -> tuple[str, ...]:
    if isinstance(collect, (str, bytes)):
        raise TypeError(f"collect must be a sequence of names, such as [{collect!r}]")
    patterns = tuple(_check_relative(pattern, "collect") for pattern in collect)
    for pattern in patterns:
        if "**" in pattern:
            raise ValueError(f"collect {pattern!r}: ** is not supported, name the directories")
    if len(patterns) > 256 or sum(len(os.fsencode(item)) + 16 for item in patterns) > 32768:
        raise ValueError("collect: more than 256 patterns, or more than 32 KiB of them")
    return patterns


def _output(value: StdioArg, name: str) -> int:
    for constant in (CAPTURE, DEVNULL):
        if _is(value, constant):
            return constant
    fd = _fileno(value, name)
    mode, flags = _describe(fd, name)
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise ValueError(f"{name}: {_kind(mode)} would let the job reach the host")
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise ValueError(f"{name}: this file was opened read-only")
    return fd


def _fileno(value: object, name: str) -> int:
    if isinstance(value, bool) or value is None:
        raise TypeError(f"{name} is never inherited: give DEVNULL, CAPTURE or an open file")
    if not isinstance(value, int):
        method = getattr(value, "fileno", None)
        if method is None:
            raise TypeError(f"{name}: {type(value).__name__} has no fileno()")
        value = method()
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: {value!r} is no descriptor (PIPE is for open_isolated)")
    return value


def _describe(fd: int, name: str) -> tuple[int, int]:
    import fcntl

    try:
        mode = os.fstat(fd).st_mode
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise ValueError(f"{name}: descriptor {fd}: {error.strerror}") from error
    if flags & os.O_PATH:
        raise ValueError(f"{name}: a descriptor opened with O_PATH is no stream")
    return mode, flags


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISCHR(mode):
        return "a terminal or other character device"
    if stat.S_ISBLK(mode):
        return "a block device"
    return "no regular file, pipe or socket"
