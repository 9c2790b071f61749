"""What the host reads from a cell: any bytes are a message or a `WireError`, never anything else.

Well-formed messages are spoilt at random places, besides bytes of no form at all. The seed is printed.
"""

from __future__ import annotations

import os
import random
import struct
import time

from isojob import wire
from isojob.wire import MessageType, Tag, WireError, Writer
from isojob.wire_result import UsualResult, parse_result

REPORT = struct.Struct("<IIiiIi11q")


def messages(chance: random.Random) -> bytes:
    """A message that init could send."""
    kind = chance.choice(
        (MessageType.RESULT, MessageType.FILE, MessageType.ERROR, MessageType.READY)
    )
    out = Writer(kind)
    if kind is MessageType.RESULT:
        numbers = [chance.choice((0, 1, 2, 3, 4, 5, 6)) for _ in range(6)]
        out.put(Tag.REPORT, REPORT.pack(*numbers, *(chance.getrandbits(62) for _ in range(11))))
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
    except WireError:
        if short is not None:
            raise AssertionError(f"one reader takes what the other refuses: {data!r}") from None
        return False
    return True


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    seed = int(os.environ.get("ISOJOB_FUZZ_SEED", random.randrange(2**32)))
    chance, usual = random.Random(seed), UsualResult(4)
    end = time.monotonic() + float(os.environ.get("ISOJOB_FUZZ_SECONDS", "60"))
    tried = good = 0
    print(f"seed {seed}")
    while time.monotonic() < end:
        data = messages(chance)
        if chance.random() < 0.02:
            data = chance.randbytes(chance.randrange(200))
        good += read(spoil(data, chance), usual)
        tried += 1
    print(f"{tried} messages, {good} of them well-formed")


if __name__ == "__main__":
    main()
