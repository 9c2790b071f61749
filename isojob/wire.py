"""The wire between host, zygote, init and launcher: pure bytes in, bytes out.

The C twin is ``native/wire.h``. A message is a header (magic, version, type, length, flags) and
fields (tag, index, length, bytes), little-endian, bounded, without pointers. A body of more than
`INLINE_MAX` bytes travels in a memfd, announced by `FLAG_MEMFD`.

Nothing here does I/O; what comes from a cell is treated as hostile.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeAlias

__all__ = [
    "FIELD",
    "HEADER",
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
    "Stdio",
    "Tag",
    "WireError",
    "Writer",
    "decode",
    "parse_failure",
    "parse_file",
    "parse_ready",
]

MAGIC = 0x4A4F5349
VERSION = 1
INLINE_MAX = 65536
MAX_FDS = 80
FLAG_MEMFD = 1
RECEIVE_SIZE = 32768
"""Longest datagram that a cell or zygote sends."""
MAX_LENGTH = (1 << 32) - 1
"""Of a field, and of all that a message has."""
MAX_FIELDS = 64
"""What they send has fewer; to read 4096 empty ones takes the caller's event loop milliseconds."""
MAX_NAME, MAX_REASON = 6402, 256
"""Bytes that init tells of a file (native/collect.c)."""

HEADER = struct.Struct("<IHHII")
FIELD = struct.Struct("<HHI")
_U64 = struct.Struct("<Q")
_I32 = struct.Struct("<i")


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
    SESSION = 10
    PRELOAD = 11
    FORK = 12
    HELLO = 13
    CELL = 14
    BRANCH = 15


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
    CG_COUNTER = 26
    ROOT_COPY = 27
    ROOT_LAYER = 28
    ROOT_OVERLAY = 29
    ROOT_LOWER = 30
    LOWER = 31
    IDS_LOCK = 58
    IMAGES = 47
    CG_MASK = 32
    CG_WRITE = 33
    DISK = 34
    INODES = 35
    CG_LIFT = 36
    CELL = 37
    PRIVATE = 38
    CELL_FDS = 39
    TEMPLATE_ARG = 40
    TEMPLATE_ENV = 41
    TEMPLATE_FILTER = 42
    TEMPLATE_MASK = 43
    TEMPLATE_WRITE = 44
    TEMPLATE = 45
    TEMPLATE_FROM = 46
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
    REPORT = 80
    COUNTERS = 81
    EVIDENCE = 82
    STAGE = 83
    ERRNO = 84
    NAME = 85
    REASON = 86
    PID = 87
    TEXT = 88


class FilterFlag(IntFlag):
    """How the launcher loads the filter."""

    EARLY = 1
    NOTIFY = 2


class BindFlag(IntFlag):
    """How a tree of the host is bound into the root."""

    WRITABLE = 1
    OPTIONAL = 2
    OWN = 4


class Stdio:
    """Bits of STDIO: which standard streams come with the message, or came with MAKE.

    And that COLLECT follows. A stream that is not named is /dev/null. Plain ints: an `IntFlag` is
    slow to combine.
    """

    IN = 1
    OUT = 2
    ERR = 4
    MERGE = 8
    COLLECT = 16
    OUT_KEPT = 32
    ERR_KEPT = 64
    STARTED = 128
    TERMINAL = 256
    NO_EXEC = 512
    RESULT = 1024


class JobState(IntEnum):
    """How far the launcher got; see ``enum job_state``."""

    SETUP = 0
    PARKED = 1
    STARTED = 2
    EXEC = 3
    FAILED = 4


RAW_EVIDENCE = 0x100
"""Index bit of CG_EVIDENCE: the file is sent, too, unless empty; as nothing if it is too long."""
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
        """Appends a field of raw bytes.

        Raises:
            ValueError: It does not fit.
        """
        if self.length + FIELD.size + len(data) > MAX_LENGTH:
            raise ValueError("4 GiB or more at once: files, arguments and all")
        self._parts.append(FIELD.pack(tag, index, len(data)))
        self._parts.append(data)
        self.length += FIELD.size + len(data)

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
        return HEADER.pack(MAGIC, VERSION, self.kind, self.length, FLAG_MEMFD if memfd else 0)

    def message(self) -> bytes:
        """Header and fields, for a datagram. The caller has compared `length` to `INLINE_MAX`."""
        return b"".join((self.header(memfd=False), *self._parts))


def _raw(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise WireError("a string holds a NUL byte")
    return data


Field: TypeAlias = tuple[int, int, bytes]
"""One field of a received message: tag, index, data."""


class Message(NamedTuple):
    """One received message."""

    kind: MessageType
    fields: list[Field]

    def first(self, tag: Tag) -> bytes | None:
        """The data of the first field of that tag."""
        for found, _, data in self.fields:
            if found == tag:
                return data
        return None


_KINDS = {int(kind): kind for kind in MessageType}
# Read on the caller's time, as everything from here to `parse_result`.
_HEADER_SIZE, _FIELD_SIZE = HEADER.size, FIELD.size


def decode(datagram: bytes) -> Message:
    """Reads one datagram.

    Raises:
        WireError: It is not a whole, well-formed message of this version.
    """
    end = len(datagram)
    if end < _HEADER_SIZE:
        raise WireError("shorter than a header")
    magic, version, kind, length, flags = HEADER.unpack_from(datagram)
    if magic != MAGIC or version != VERSION or flags != 0:
        raise WireError("not a message of this version")
    if length != end - _HEADER_SIZE:
        raise WireError("length does not fit")
    known = _KINDS.get(kind)
    if known is None:
        raise WireError(f"unknown message {kind}")
    fields: list[Field] = []
    at, field_header = _HEADER_SIZE, FIELD.unpack_from
    while at < end:
        start = at + _FIELD_SIZE
        if start > end:
            raise WireError("a field is cut off")
        tag, index, length = field_header(datagram, at)
        at = start + length
        if at > end:
            raise WireError("a field is longer than its message")
        if len(fields) == MAX_FIELDS:
            raise WireError("more fields than any message has")
        fields.append((tag, index, datagram[start:at]))
    return Message(known, fields)


def _string(data: bytes, errors: str = "surrogateescape") -> str:
    if not data.endswith(b"\0"):
        raise WireError("a string without its end")
    if b"\0" in data[:-1]:
        raise WireError("a string with two ends")
    return data[:-1].decode("utf-8", errors)


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
    if len(number) != _I32.size:
        raise WireError("an errno of the wrong size")
    return Failure(_string(stage), _I32.unpack(number)[0])


def parse_ready(message: Message) -> int:
    """Reads a READY message: the pid of who sent it."""
    pid = message.first(Tag.PID)
    if pid is None or len(pid) != _U64.size:
        raise WireError("ready, but without a pid")
    return int(_U64.unpack(pid)[0])


@dataclass(frozen=True, slots=True)
class FileReply:
    """One collected file, or why it was not: the descriptor comes beside the message."""

    name: str
    reason: str | None
    pattern: int
    """Position of the pattern that it answers."""


def parse_file(message: Message) -> FileReply:
    """Reads a FILE message."""
    name = next((field for field in message.fields if field[0] == Tag.NAME), None)
    if name is None:
        raise WireError("a file without a name")
    _, pattern, text = name
    reason = message.first(Tag.REASON)
    if len(text) > MAX_NAME or len(reason or b"") > MAX_REASON:
        raise WireError("a name or a reason that is too long")
    why = None if reason is None else _string(reason, "replace")
    return FileReply(_string(text), why, pattern)
