"""The wire between host, zygote, init and launcher: pure bytes in, bytes out.

The C twin is ``native/wire.h``. A message is a header (magic, version, type, length, flags) and
fields (tag, index, length, bytes), little-endian, bounded, without pointers. A body of more than
`INLINE_MAX` bytes travels in a memfd, announced by `FLAG_MEMFD`.

Nothing here does I/O; what comes from a cell is treated as hostile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

__all__ = [
    "INLINE_MAX",
    "MAX_FDS",
    "BindFlag",
    "Failure",
    "Field",
    "FileReply",
    "FilterFlag",
    "JobState",
    "Message",
    "MessageType",
    "RawResult",
    "Stdio",
    "Tag",
    "WireError",
    "Writer",
    "decode",
    "parse_failure",
    "parse_file",
    "parse_result",
]

MAGIC = 0x4A4F5349
VERSION = 1
INLINE_MAX = 65536
MAX_FDS = 16
FLAG_MEMFD = 1
RECEIVE_SIZE = 32768
"""Longest datagram that a cell or zygote sends."""

_HEADER = struct.Struct("<IHHII")
_FIELD = struct.Struct("<HHI")
_U64 = struct.Struct("<Q")


class WireError(Exception):
    """A message is malformed: the other end is broken, or no longer ours."""


class MessageType(IntEnum):
    """What a message is; see ``enum message_type``."""

    CONFIG = 1
    MAKE = 2
    JOB = 3
    COLLECT = 4
    RESULT = 5
    FILE = 6
    ERROR = 7
    READY = 8
    MAP = 9


class Tag(IntEnum):
    """What a field is; see ``enum tag`` for the shapes."""

    MODE = 1
    UID_BASE = 2
    SLOTS = 3
    JOB_UID = 4
    JOB_GID = 5
    HOSTNAME = 6
    FILTER = 7
    HIERARCHIES = 8
    CG_LIMIT = 9
    CG_EVIDENCE = 10
    CG_CPU = 11
    CG_KILL = 12
    CG_OOM = 13
    CG_INTO = 14
    CG_BASE = 15
    ROOT_DIR = 16
    ROOT_LINK = 17
    ROOT_FILE = 18
    ROOT_BIND = 19
    ROOT_NODE = 20
    MASK = 21
    CELL_TMPFS = 22
    HOST_PIDFD = 23
    WORKDIR = 24
    CELL_BIND = 25
    CG_MASK = 32
    CG_WRITE = 33
    DISK = 34
    INODES = 35
    ARG = 48
    ENV = 49
    CWD = 50
    STDIO = 51
    RLIMIT = 52
    WALL = 53
    CPU = 54
    LIMIT = 55
    PUT = 56
    PATH = 57
    PATTERN = 64
    COLLECT_MAX = 65
    STATE = 80
    EXIT = 81
    CAUSE = 82
    SYSCALL = 83
    TIMES = 84
    RUSAGE = 85
    EVIDENCE = 86
    STAGE = 87
    ERRNO = 88
    NAME = 89
    REASON = 90
    CPU_END = 91


class FilterFlag(IntFlag):
    """How the launcher loads the filter."""

    EARLY = 1
    NOTIFY = 2


class BindFlag(IntFlag):
    """How a tree of the host is bound into the root."""

    WRITABLE = 1
    OPTIONAL = 2


class Stdio(IntFlag):
    """Which of a job's standard streams come with its message; and that COLLECT follows."""

    IN = 1
    OUT = 2
    ERR = 4
    MERGE = 8
    COLLECT = 16


class JobState(IntEnum):
    """How far the launcher got; see ``enum job_state``."""

    SETUP = 0
    PARKED = 1
    STARTED = 2
    EXEC = 3
    FAILED = 4


CAUSES = ("none", "wall", "cpu", "oom", "seccomp", "stop")
CPU_USEC = 0x100
"""Index bit of CG_CPU: the file is a ``cpu.stat`` with ``usage_usec``."""
OPTIONAL_WRITE = 0x100
"""Index bit of CG_WRITE: a file that this kernel may lack."""


class Writer:
    """Builds the body of one message.

    Args:
        kind: The type of the message.
    """

    def __init__(self, kind: MessageType) -> None:
        self.kind = kind
        self._parts: list[bytes] = []
        self.length = 0

    def put(self, tag: Tag, data: bytes = b"", index: int = 0) -> None:
        """Appends a field of raw bytes."""
        self._parts.append(_FIELD.pack(tag, index, len(data)))
        self._parts.append(data)
        self.length += _FIELD.size + len(data)

    def fields(self, data: bytes) -> None:
        """Appends the whole body of another message."""
        self._parts.append(data)
        self.length += len(data)

    def text(self, tag: Tag, value: str | bytes, index: int = 0) -> None:
        """Appends a string; its NUL is added here."""
        self.put(tag, _raw(value) + b"\0", index)

    def pair(self, tag: Tag, first: str | bytes, second: str | bytes, index: int = 0) -> None:
        """Appends two strings."""
        self.put(tag, _raw(first) + b"\0" + _raw(second) + b"\0", index)

    def blob(self, tag: Tag, name: str | bytes, content: bytes, index: int = 0) -> None:
        """Appends a string with bytes behind it."""
        self.put(tag, _raw(name) + b"\0" + content, index)

    def number(self, tag: Tag, value: int, index: int = 0) -> None:
        """Appends an unsigned 64-bit number."""
        self.put(tag, _U64.pack(value), index)

    def body(self) -> bytes:
        """The fields alone, for a memfd."""
        return b"".join(self._parts)

    def header(self, *, memfd: bool) -> bytes:
        """The header alone, of a message whose body is elsewhere or follows."""
        return _HEADER.pack(MAGIC, VERSION, self.kind, self.length, FLAG_MEMFD if memfd else 0)

    def message(self) -> bytes:
        """Header and fields, for a datagram. The caller has compared `length` to `INLINE_MAX`."""
        return b"".join((self.header(memfd=False), *self._parts))


def _raw(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise WireError("a string holds a NUL byte")
    return data


@dataclass(slots=True)
class Field:
    """One field of a received message."""

    tag: int
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One received message."""

    kind: MessageType
    fields: tuple[Field, ...]

    def first(self, tag: Tag) -> Field | None:
        """The first field of that tag."""
        for item in self.fields:
            if item.tag == tag:
                return item
        return None


def _fields(body: bytes) -> Iterator[Field]:
    at, end = 0, len(body)
    while at < end:
        if end - at < _FIELD.size:
            raise WireError("a field is cut off")
        tag, index, length = _FIELD.unpack_from(body, at)
        at += _FIELD.size
        if length > end - at:
            raise WireError("a field is longer than its message")
        yield Field(tag, index, body[at : at + length])
        at += length


def decode(datagram: bytes) -> Message:
    """Reads one datagram.

    Raises:
        WireError: It is not a whole, well-formed message of this version.
    """
    if len(datagram) < _HEADER.size:
        raise WireError("shorter than a header")
    magic, version, kind, length, flags = _HEADER.unpack_from(datagram)
    if magic != MAGIC or version != VERSION or flags != 0:
        raise WireError("not a message of this version")
    if length != len(datagram) - _HEADER.size:
        raise WireError("length does not fit")
    try:
        known = MessageType(kind)
    except ValueError:
        raise WireError(f"unknown message {kind}") from None
    return Message(known, tuple(_fields(datagram[_HEADER.size :])))


def _string(item: Field) -> str:
    if not item.data.endswith(b"\0"):
        raise WireError("a string without its end")
    return item.data[:-1].decode("utf-8", "surrogateescape")


def _unpack(item: Field, form: str) -> tuple[int, ...]:
    try:
        return struct.unpack(f"<{form}", item.data)
    except struct.error:
        raise WireError(f"field {item.tag} has {len(item.data)} bytes") from None


@dataclass(frozen=True, slots=True)
class Failure:
    """A stage of the set-up that failed, with the errno of the system call."""

    stage: str
    errno: int


def parse_failure(message: Message) -> Failure:
    """Reads an ERROR message."""
    stage, number = message.first(Tag.STAGE), message.first(Tag.ERRNO)
    if stage is None or number is None:
        raise WireError("an error without stage or errno")
    return Failure(_string(stage), _unpack(number, "i")[0])


@dataclass(frozen=True, slots=True)
class FileReply:
    """One collected file, or why it was not: the descriptor comes beside the message."""

    name: str
    reason: str | None


def parse_file(message: Message) -> FileReply:
    """Reads a FILE message."""
    name, reason = message.first(Tag.NAME), message.first(Tag.REASON)
    if name is None:
        raise WireError("a file without a name")
    return FileReply(_string(name), None if reason is None else _string(reason))


@dataclass(slots=True)
class RawResult:
    """A RESULT message: the kernel's words, not yet understood."""

    state: JobState = JobState.SETUP
    si_code: int = 0
    si_status: int = 0
    cause: str = "none"
    syscall: tuple[int, int] | None = None
    start_ns: int = 0
    end_ns: int = 0
    done_ns: int = 0
    cpu_base_ns: int = 0
    cpu_end_ns: int | None = None
    user_us: int = 0
    system_us: int = 0
    max_rss_kib: int = 0
    voluntary: int = 0
    involuntary: int = 0
    failure: Failure | None = None
    evidence: dict[int, bytes] = field(default_factory=dict)


# A plain int: comparing with an IntEnum member goes through its attribute lookup each time.
_EVIDENCE = int(Tag.EVIDENCE)


def parse_result(message: Message) -> RawResult:
    """Reads a RESULT message.

    Raises:
        WireError: A field has the wrong size or a value out of range.
    """
    raw = RawResult()
    for item in message.fields:
        tag = item.tag
        if tag == _EVIDENCE:  # most of them
            raw.evidence[item.index] = item.data
        elif tag == Tag.STATE:
            (state,) = _unpack(item, "Q")
            if state > JobState.FAILED:
                raise WireError(f"unknown state {state}")
            raw.state = JobState(state)
        elif tag == Tag.EXIT:
            raw.si_code, raw.si_status = _unpack(item, "ii")
        elif tag == Tag.CAUSE:
            (cause,) = _unpack(item, "Q")
            if cause >= len(CAUSES):
                raise WireError(f"unknown cause {cause}")
            raw.cause = CAUSES[cause]
        elif tag == Tag.RUSAGE:
            (
                raw.user_us,
                raw.system_us,
                raw.max_rss_kib,
                raw.voluntary,
                raw.involuntary,
            ) = _unpack(item, "qqqqq")
        elif tag == Tag.TIMES:
            raw.start_ns, raw.end_ns, raw.done_ns, raw.cpu_base_ns = _unpack(item, "qqqq")
        elif tag == Tag.CPU_END:
            (raw.cpu_end_ns,) = _unpack(item, "Q")
        elif tag == Tag.SYSCALL:
            arch, number = _unpack(item, "Ii")
            raw.syscall = (arch, number)
        elif tag in (Tag.STAGE, Tag.ERRNO):
            raw.failure = parse_failure(message)
        else:
            raise WireError(f"unexpected field {tag}")
    return raw
