"""What the host reads from a cell: any bytes are a message or a `WireError`, never anything else.

Well-formed messages are spoilt at random places, besides bytes of no form at all. What a template says
of its imports is text, or a `PreloadError`.
"""

from __future__ import annotations

import random
import struct
from contextlib import suppress

import campaign

from isojob import Limits, PreloadError, wire
from isojob._interpreter import Interpreter
from isojob._template import Imports, Template
from isojob.wire import MessageType, Tag, WireError, Writer
from isojob.wire_result import UsualResult, parse_result

REPORT = struct.Struct("<IIiiIi12q")
TEMPLATE = Template(Interpreter("/usr/bin/python3", (), (3, 11)), ("numpy",), Limits(), 30.0)


def messages(chance: random.Random) -> bytes:
    """A message that init could send."""
    kind = chance.choice(
        (
            *(MessageType.RESULT, MessageType.FILE, MessageType.ERROR, MessageType.READY),
            MessageType.PRELOAD,
        )
    )
    out = Writer(kind)
    if kind is MessageType.RESULT:
        numbers = [chance.choice((0, 1, 2, 3, 4, 5, 6)) for _ in range(6)]
        out.put(Tag.REPORT, REPORT.pack(*numbers, *(chance.getrandbits(62) for _ in range(12))))
        out.put(Tag.COUNTERS, struct.pack("<4q", *(chance.getrandbits(62) for _ in range(4))))
        if chance.random() < 0.3:
            out.put(Tag.EVIDENCE, chance.randbytes(20), chance.randrange(4))
    if kind is MessageType.FILE or chance.random() < 0.1:
        out.text(Tag.NAME, chance.choice(("out.txt", "a/b", "..", "", "x\n")))
        if chance.random() < 0.5:
            out.text(Tag.REASON, "too large")
    if kind is MessageType.ERROR or chance.random() < 0.1:
        out.text(Tag.STAGE, "mount /proc")
        out.put(Tag.ERRNO, struct.pack("<i", chance.randrange(-5, 200)))
    if kind is MessageType.READY:
        out.number(Tag.PID, chance.choice((0, 1, 4711, 2**64 - 1)))
    if kind is MessageType.PRELOAD:
        out.put(Tag.TEXT, chance.choice((b"Inumpy", b"Enumpy\0why\0trace", b"E", b"\xff\0", b"")))
    return out.message()


def spoil(data: bytes, chance: random.Random) -> bytes:
    """The same with something wrong."""
    spoilt = bytearray(data)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(spoilt) + 1)
        match chance.randrange(4):
            case 0 if spoilt:
                spoilt[at % len(spoilt)] = chance.randrange(256)
            case 1:
                del spoilt[at : at + chance.randrange(1, 9)]
            case 2:
                spoilt[at:at] = chance.randbytes(chance.randrange(1, 9))
            case _:
                number = chance.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
                spoilt[at : at + 4] = struct.pack("<I", number)
    return bytes(spoilt)


def read(data: bytes, usual: UsualResult) -> bool:
    """Reads as the host does; whether it was a message."""
    short = usual.read(data)
    try:
        message = wire.decode(data)
        if message.kind is MessageType.RESULT:
            whole = parse_result(message)
            if short is not None and whole != short:
                raise AssertionError(f"two readers, two answers: {data!r}")
        elif message.kind is MessageType.FILE:
            wire.parse_file(message)
        elif message.kind is MessageType.ERROR:
            wire.parse_failure(message)
        elif message.kind is MessageType.READY:
            wire.parse_ready(message)
        elif message.kind is MessageType.PRELOAD:
            with suppress(PreloadError):
                Imports(TEMPLATE).hear(message)
    except WireError:
        if short is not None:
            raise AssertionError(f"one reader takes what the other refuses: {data!r}") from None
        return False
    return True


def make(chance: random.Random) -> bytes:
    """A message with something wrong, or noise."""
    if chance.random() < 0.02:
        return chance.randbytes(chance.randrange(200))
    return spoil(messages(chance), chance)


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    usual = UsualResult(4)
    tried, good = campaign.run("wire", make, lambda data: read(data, usual))
    print(f"{tried} messages, {good} of them well-formed")


if __name__ == "__main__":
    main()
