"""The one message that is read on the caller's time: init's report of a job, ``struct report``.

As in `wire`: nothing here does I/O, and what comes from a cell is treated as hostile.
"""

from __future__ import annotations

import struct
from typing import Literal, NamedTuple, TypeAlias

from isojob.wire import (
    FIELD,
    HEADER,
    MAGIC,
    VERSION,
    Failure,
    JobState,
    Message,
    MessageType,
    Tag,
    WireError,
    parse_failure,
)

__all__ = ["CAUSES", "RawResult", "UsualResult", "parse_result"]

Cause: TypeAlias = Literal["none", "wall", "cpu", "oom", "seccomp", "stop"]
CAUSES: tuple[Cause, ...] = ("none", "wall", "cpu", "oom", "seccomp", "stop")


class RawResult(NamedTuple):
    """A RESULT message: the kernel's words, not yet understood; see ``struct report``."""

    state: int
    cause: int
    code: int
    status: int
    arch: int
    nr: int
    received_ns: int
    start_ns: int
    end_ns: int
    done_ns: int
    cpu_base_ns: int
    cpu_end_ns: int
    user_us: int
    system_us: int
    max_rss_kib: int
    voluntary: int
    involuntary: int
    ooms: int
    counters: tuple[int, ...]
    files: dict[int, bytes]
    failure: Failure | None


_REPORT = struct.Struct("<IIiiIi12q")
# Plain ints: comparing with an IntEnum member goes through its attribute lookup each time.
_RESULT_TAGS = tuple(map(int, (Tag.REPORT, Tag.COUNTERS, Tag.EVIDENCE, Tag.STAGE, Tag.ERRNO)))


class UsualResult:
    """A RESULT without files, raw evidence or a failure, which has one form: read in one go.

    Most jobs end like that, and this is read on the caller's time.

    Args:
        counters: How many the cells of a pool report.
    """

    __slots__ = ("_check", "_counters", "_middle", "_prefix", "_size", "_unpack")

    def __init__(self, counters: int) -> None:
        self._counters = counters
        report, counted = _REPORT.size, 8 * counters
        body = 2 * FIELD.size + report + counted
        self._prefix = HEADER.pack(MAGIC, VERSION, MessageType.RESULT, body, 0) + FIELD.pack(
            Tag.REPORT, 0, report
        )
        self._middle = FIELD.pack(Tag.COUNTERS, 0, counted)
        at = len(self._prefix) + report
        self._check = slice(at, at + FIELD.size)
        self._size = HEADER.size + body
        self._unpack = struct.Struct(
            f"<{len(self._prefix)}x{_REPORT.format[1:]}{FIELD.size}x{counters}q"
        ).unpack

    def read(self, datagram: bytes) -> RawResult | None:
        """The result, or None if it is another message, or one to be read field by field."""
        if (
            len(datagram) != self._size
            or not datagram.startswith(self._prefix)
            or datagram[self._check] != self._middle
        ):
            return None
        words = self._unpack(datagram)
        if words[0] > _LAST_STATE or words[1] >= len(CAUSES):
            return None  # `parse_result` says what is wrong
        return RawResult._make((*words[:_WORDS], words[_WORDS:], {}, None))

    def parse(self, message: Message) -> RawResult:
        """Any result of such a cell, read field by field.

        Raises:
            WireError: As `parse_result`, and if it has another number of counters.
        """
        raw = parse_result(message)
        if len(raw.counters) != self._counters:
            raise WireError(f"{len(raw.counters)} counters, not {self._counters}")
        return raw


_LAST_STATE = int(JobState.FAILED)
_WORDS = 18


def parse_result(message: Message) -> RawResult:
    """Reads a RESULT message.

    Raises:
        WireError: A field has the wrong size or a value out of range.
    """
    report, counted, evidence, stage, number = _RESULT_TAGS
    words: bytes | None = None
    counters: tuple[int, ...] = ()
    files: dict[int, bytes] = {}
    failure: Failure | None = None
    for tag, index, data in message.fields:
        if tag == report:
            words = data
        elif tag == counted:
            if len(data) % 8:
                raise WireError("half a counter")
            counters = struct.unpack(f"<{len(data) // 8}q", data)
        elif tag == evidence:
            files[index] = data
        elif tag in (stage, number):
            failure = parse_failure(message)
        else:
            raise WireError(f"unexpected field {tag}")
    if words is None or len(words) != _REPORT.size:
        raise WireError("a result without a report of the right size")
    raw = RawResult._make((*_REPORT.unpack(words), counters, files, failure))
    if raw.state > JobState.FAILED or raw.cause >= len(CAUSES):
        raise WireError(f"unknown state {raw.state} or cause {raw.cause}")
    return raw
