"""The wire: what is written is read back, and anything else is refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isojob import wire, wire_result
from isojob.wire import JobState, MessageType, Tag, WireError, Writer

REPORT = struct.Struct("<IIiiIi12q")
"""``struct report``; `test_the_report_is_that_of_the_c_twin` compares."""
HEADER = Path(__file__).parents[2] / "isojob" / "native" / "wire.h"


def test_numbers_are_those_of_the_c_twin() -> None:
    """Message types and tags have the numbers of native/wire.h."""
    text = HEADER.read_text()
    pairs = dict(re.findall(r"\b((?:MSG|TAG|JOB|STDIO|BIND|FILTER)_\w+) = (\d+)", text))
    for name, value in pairs.items():
        kind, _, rest = name.partition("_")
        enum = {
            "MSG": wire.MessageType,
            "TAG": wire.Tag,
            "STDIO": wire.Stdio,
            "BIND": wire.BindFlag,
            "FILTER": wire.FilterFlag,
        }[kind]
        assert int(getattr(enum, rest)) == int(value), name
    assert len([name for name in pairs if name.startswith("TAG_")]) == len(Tag)
    assert f"WIRE_INLINE_MAX {wire.INLINE_MAX}" in text
    assert f"WIRE_MAX_FDS {wire.MAX_FDS}" in text


def test_the_report_is_that_of_the_c_twin() -> None:
    """The words of struct report have the order, the names and the sizes of RawResult."""
    body = re.search(r"struct report \{(.*?)\n\};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    letters = {"uint32_t": "I", "int32_t": "i", "int64_t": "q"}
    names, form = [], "<"
    for kind, listed in re.findall(r"(u?int\d\d_t) ([^;]+);", body[1]):
        for name in listed.split(","):
            names.append(name.strip())
            form += letters[kind]
    assert tuple(names) == wire_result.RawResult._fields[:-3]
    assert struct.Struct(form).size == REPORT.size
    packed = struct.pack(form, *range(18))
    assert packed == REPORT.pack(*range(18))


def test_round_trip() -> None:
    """Fields come back in order with their indices."""
    out = Writer(MessageType.JOB)
    out.text(Tag.ARG, "ünï\udcff")
    out.pair(Tag.ROOT_LINK, "a", "b", 7)
    out.blob(Tag.PUT, "name", b"\0content", 0o644)
    out.number(Tag.WALL, 2**63)
    message = wire.decode(out.message())
    assert message.kind is MessageType.JOB
    assert message.fields == [
        (Tag.ARG, 0, "ünï".encode() + b"\xff\0"),
        (Tag.ROOT_LINK, 7, b"a\0b\0"),
        (Tag.PUT, 0o644, b"name\0\0content"),
        (Tag.WALL, 0, struct.pack("<Q", 2**63)),
    ]


def test_nul_is_refused() -> None:
    """A string with a NUL would be another string on the other side."""
    with pytest.raises(WireError):
        Writer(MessageType.JOB).text(Tag.ARG, "a\0b")


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    """Whatever arrives is a message or a WireError, nothing else."""
    try:
        message = wire.decode(data)
    except WireError:
        return
    assert isinstance(message, wire.Message)


@given(st.binary(max_size=300), st.sampled_from(list(MessageType)))
def test_random_fields(body: bytes, kind: MessageType) -> None:
    """With a right header: every parser reads or refuses."""
    header = struct.pack("<IHHII", wire.MAGIC, wire.VERSION, kind, len(body), 0)
    for parse in (wire_result.parse_result, wire.parse_file, wire.parse_failure):
        try:
            parse(wire.decode(header + body))
        except WireError:
            continue


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Tag)), st.integers(0, 65535), st.binary(max_size=60)),
        max_size=wire.MAX_FIELDS,
    )
)
def test_well_formed_fields(fields: list[tuple[Tag, int, bytes]]) -> None:
    """Any list of fields survives; a result of wrong sizes or values is refused."""
    out = Writer(MessageType.RESULT)
    for tag, index, data in fields:
        out.put(tag, data, index)
    message = wire.decode(out.message())
    assert message.fields == fields
    try:
        raw = wire_result.parse_result(message)
    except WireError:
        return
    assert wire_result.CAUSES[raw.cause]
    assert JobState(raw.state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\0" + data[1:],
        lambda data: data[:4] + b"\xff" + data[5:],
        lambda data: data[:6] + b"\xff\xff" + data[8:],
        lambda data: data[:12] + b"\x01\0\0\0" + data[16:],
        lambda data: data[:20] + b"\xff\xff\xff\xff" + data[24:],
    ],
)
def test_damaged(damage: object) -> None:
    """Cut, lengthened, of another version or kind, with a lying length: refused."""
    out = Writer(MessageType.RESULT)
    out.put(Tag.REPORT, REPORT.pack(*range(18)))
    with pytest.raises(WireError):
        wire.decode(damage(out.message()))  # type: ignore[operator]


@pytest.mark.parametrize(
    "fields",
    [
        [(Tag.NAME, b"x\0")] * (wire.MAX_FIELDS + 1),
        [(Tag.NAME, b"a/" * 4000 + b"x\0")],
        [(Tag.NAME, b"x\0"), (Tag.REASON, b"y" * 300 + b"\0")],
        [(Tag.NAME, b"x\0y\0")],
        [(Tag.NAME, b"x")],
        [],
    ],
)
def test_impossible_files(fields: list[tuple[Tag, bytes]]) -> None:
    """More than init says of a file, or less, or in another way."""
    out = Writer(MessageType.FILE)
    for tag, data in fields:
        out.put(tag, data)
    with pytest.raises(WireError):
        wire.parse_file(wire.decode(out.message()))


def test_reasons_are_text() -> None:
    """A name may be any bytes; a reason has to survive JSON."""
    out = Writer(MessageType.FILE)
    out.put(Tag.NAME, b"a\xff\0", 3)
    out.put(Tag.REASON, b"b\xff\0")
    reply = wire.parse_file(wire.decode(out.message()))
    assert reply == wire.FileReply("a\udcff", "b\ufffd", 3)


def result(*fields: tuple[Tag, bytes]) -> wire_result.RawResult:
    """What is read of a RESULT message with these fields."""
    out = Writer(MessageType.RESULT)
    for tag, data in fields:
        out.put(tag, data, 3)
    return wire_result.parse_result(wire.decode(out.message()))


def test_result() -> None:
    """A report comes back word by word, with the files of evidence by their index."""
    words = (JobState.EXEC, 5, -1, 9, 0xC000003E, 59, *range(100, 112))
    raw = result(
        (Tag.EVIDENCE, b"8:0 rbytes=1\n"),
        (Tag.COUNTERS, struct.pack("<2q", -1, 2**40)),
        (Tag.REPORT, REPORT.pack(*words)),
    )
    assert raw == (*words, (-1, 2**40), {3: b"8:0 rbytes=1\n"}, None)
    assert (raw.state, raw.code, raw.status) == (JobState.EXEC, -1, 9)
    assert (raw.received_ns, raw.cpu_end_ns, raw.ooms) == (100, 105, 111)


def test_impossible_results() -> None:
    """Values out of range are refused, and a report that is not there or not whole."""
    good = (JobState.EXEC, *range(17))
    assert result((Tag.REPORT, REPORT.pack(*good))).state == JobState.EXEC
    for words in ((99, *good[1:]), (good[0], 99, *good[2:])):
        with pytest.raises(WireError):
            result((Tag.REPORT, REPORT.pack(*words)))
    for fields in (
        (),
        ((Tag.REPORT, REPORT.pack(*good)[:-1]),),
        ((Tag.REPORT, REPORT.pack(*good)), (Tag.COUNTERS, b"123")),
        ((Tag.STAGE, b"x\0"),),
    ):
        with pytest.raises(WireError):
            result(*fields)


def test_the_usual_result_in_one_go() -> None:
    """A report with its counters reads the same in one go and field by field; all else by field."""
    usual = wire_result.UsualResult(2)
    counted = (Tag.COUNTERS, struct.pack("<2q", -1, 2**40))

    def message(*fields: tuple[Tag, bytes], kind: MessageType = MessageType.RESULT) -> bytes:
        out = Writer(kind)
        for tag, data in fields:
            out.put(tag, data)
        return out.message()

    words = (JobState.EXEC, 1, 1, 137, 0, -1, *range(2**40, 2**40 + 12))
    report = (Tag.REPORT, REPORT.pack(*words))
    whole = message(report, counted)
    assert usual.read(whole) == wire_result.parse_result(wire.decode(whole))
    for other in (
        b"",
        whole[:-1],
        whole + b"\0",
        message(counted, report),
        message(report, counted, kind=MessageType.FILE),
        message(report, (Tag.EVIDENCE, counted[1])),
        message(report, counted, (Tag.EVIDENCE, b"8:0 rbytes=1")),
        message((Tag.REPORT, REPORT.pack(99, *words[1:])), counted),
        message((Tag.REPORT, REPORT.pack(words[0], 99, *words[2:])), counted),
    ):
        assert usual.read(other) is None
