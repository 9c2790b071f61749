"""What a Python job says of itself: any bytes give a result, with nothing in it that was not said.

The bytes are hostile. Whatever they are, reading them raises nothing; the value is what another reader
of JSON finds there, or None with the reason; what comes of them survives JSON; it takes no more memory
than a multiple of what was sent.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from typing import Any

import campaign
from pydantic_core import from_json, to_json

from isojob import PythonResult, Result
from isojob._python_result import answer_size, read_answer, understand

MOST = 1 << 16
MEMORY = 100
"""Bytes of objects for a byte of JSON: an empty list takes 64, and a place in another one."""
PIECES: tuple[bytes, ...] = (
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"9" * 4300, b"9" * 4301, b"1e-999"),
    *(
        rb'"\ud800"',
        rb'"\udfff\ud800"',
        rb'"\u0000"',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b"\xef\xbb\xbf",
    ),
    *(b"[" * 300, b"[" * 100_000, b'{"a":' * 300, b"[]," * 500, b"[" * 200 + b"]" * 200),
    *(b'{"value": 1, "value": 2}', b'"value": 3,', b'"exception": {}', b'"too_large": true,'),
    *(b'"too_large": -5,', b'"unserializable": "\\ud800",', b"null", b"true", b"\0", b"{}", b""),
)
KEYS = (
    "value",
    "exception",
    "unserializable",
    "too_large",
    "type",
    "message",
    "traceback",
    "x",
    "\0",
)
LEAVES = (
    *(None, True, 0, -1, 2**63, 2**64, 10**400, 1.5, float("nan")),
    "",
    "x",
    "\ud800",
    "é\U0001f600",
)


def word(chance: random.Random, depth: int = 0) -> Any:
    """Something that JSON, or Python's reading of it, can carry."""
    match chance.randrange(2 if depth > 5 else 5):
        case 3:
            return [word(chance, depth + 1) for _ in range(chance.randrange(4))]
        case 4:
            keys = chance.choices(KEYS, k=chance.randrange(4))
            return {key: word(chance, depth + 1) for key in keys}
        case _:
            return chance.choice(LEAVES)


def answer(chance: random.Random) -> bytes:
    """What the runner could have written, and then something wrong with it."""
    said: dict[str, Any] = {"value": word(chance), "exception": None}
    for key in ("exception", "unserializable", "too_large"):
        if chance.random() < 0.2:
            said[key] = word(chance)
    if chance.random() < 0.3:
        texts = chance.choices([leaf for leaf in LEAVES if isinstance(leaf, str)], k=3)
        said["exception"] = dict(zip(("type", "message", "traceback"), texts, strict=True))
    data = json.dumps(said, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        end = at + chance.choice((0, 0, 1, 4))
        piece = chance.choice(PIECES) if chance.random() < 0.8 else chance.randbytes(2)
        data = data[:at] + piece + data[end:]
    if chance.random() < 0.02:
        data = data.decode("utf-8", "replace").encode(chance.choice(("utf-16", "utf-32-be")))
    return data[:MOST]


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, NaN and signs of zero as well; 1 is not True, nor 1.0."""
    return bool(repr(one) == repr(other))


def by_another_reader(data: bytes) -> tuple[bool, Any]:
    """Whether pydantic's reader, which is stricter, takes this; and the value."""
    try:
        said = from_json(data, allow_inf_nan=True)
    except (ValueError, RecursionError):
        return False, None
    return True, said.get("value") if isinstance(said, dict) else None


def make_check() -> Any:
    """The check, with the result that it adds to and the memfd that a job would write to."""
    plain = Result.trusted()
    fd = os.memfd_create("answer")
    os.ftruncate(fd, answer_size(MOST))

    def check(data: bytes) -> bool:
        # The job writes the length, too.
        length = len(data) if len(data) % 3 else (2**64 - 1) >> len(data) % 64
        os.pwrite(fd, struct.pack("<Q", length) + data, 0)
        read = read_answer(fd, MOST)
        assert len(read) == min(length, answer_size(MOST) - 8)
        assert read[: len(data)] == data[: len(read)]
        if len(data) % 16 == 0:
            tracemalloc.start()
        result = understand(plain, data, MOST)
        if tracemalloc.is_tracing():
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MEMORY * len(data) + (1 << 20), f"{peak} bytes"
        return judge(result, data)

    return check


def judge(result: PythonResult, data: bytes) -> bool:
    """Whether there was a value; it is the one that was said."""
    read, value = by_another_reader(data)
    if result.value is not None:
        assert to_json(result.value) is not None
        assert not read or same(result.value, value)
    elif value is not None:
        assert result.value_problem is not None
    assert result.value_problem is None or len(result.value_problem) <= 200
    words = [result.value_problem]
    if result.exception is not None:
        words += result.exception.model_dump().values()
    assert all(text is None or text.encode() is not None for text in words)
    return result.value is not None


def main() -> None:
    """Runs for $ISOJOB_FUZZ_SECONDS."""
    tried, good = campaign.run("python_result", answer, make_check())
    print(f"{tried} answers, {good} with a value")


if __name__ == "__main__":
    main()
