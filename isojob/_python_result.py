"""What a Python job says of itself, on its way to the caller."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

from pydantic_core import from_json, to_json

from isojob._models import Model
from isojob.result import Result, extended, pending_kind

__all__ = [
    "MAX_VALUE",
    "PythonException",
    "PythonResult",
    "answer_size",
    "read_answer",
    "understand",
]

MAX_VALUE = 1 << 40
"""Bytes: each job maps so many."""
_LENGTH = struct.Struct("<Q")
_ROOM = 65536
"""Bytes beside the value, for what else is said; isojob/warm/ending.py has its twin."""


class PythonException(Model, frozen=True):
    """How a Python job's main program ended, if not well. Its own words: they may be anything.

    Attributes:
        type: Name of the exception's class, with its module unless that is ``builtins``.
        message: ``str()`` of it.
        traceback: As the interpreter prints it.
    """

    type: str
    message: str
    traceback: str


class PythonResult(Result, frozen=True):
    """The result of a Python job: all of `Result`, and what the interpreter says of itself.

    The status and the accounts come from the kernel, by isojob's init. `value` and `exception` are
    the job's own words, and a hostile job may say what it likes.

    Attributes:
        value: The global ``result``, or what the function returned, through JSON. NaN and infinite
            numbers, which JSON does not have, are themselves here, and null in the result's JSON.
        exception: What ended the program.
        value_problem: Why `value` is None though there was one: no JSON, or too large.
    """

    value: Any = None
    exception: PythonException | None = None
    value_problem: str | None = None


def answer_size(most: int) -> int:
    """Bytes of the memfd that the job writes its words to, and we read when it is dead."""
    return _LENGTH.size + most + _ROOM


def read_answer(fd: int, most: int) -> bytes:
    """What it has written, at most so many bytes; nothing, if it has not come to that."""
    (length,) = _LENGTH.unpack(os.pread(fd, _LENGTH.size, 0))
    return os.pread(fd, min(length, most + _ROOM), _LENGTH.size)


def understand(result: Result, data: bytes, most: int) -> PythonResult:
    """Reads what the job has said, it may be anything; a value of at most so many bytes."""
    value, exception, problem = None, None, None
    said: Any = None
    try:
        said = json.loads(data) if data else None
        value = said.get("value") if isinstance(said, dict) else None
        text = to_json(value)
        # The result has to survive JSON: no lone surrogates, no endless depth.
        from_json(b'{"value": %b}' % text)
        if len(text) > most < len(json.dumps(value)) and value is not None:  # the job's way
            value, problem = None, f"{len(text)} bytes of JSON, more than max_value"
    except (ValueError, RecursionError) as error:
        value, problem = None, f"the job's answer is no JSON: {error}"[:200]
    if isinstance(said, dict):
        if isinstance(found := said.get("unserializable"), str):
            problem = _clean(found)[:200]
        size = said.get("too_large")
        # Of what the memfd could not take: bool is an int, and one can have thousands of digits.
        if type(size) is int and 0 <= size < MAX_VALUE:
            problem = f"{size} bytes of JSON, more than max_value"
        words = said.get("exception")
        if isinstance(words, dict):
            parts = {key: words.get(key) for key in ("type", "message", "traceback")}
            if all(isinstance(part, str) for part in parts.values()):
                exception = PythonException.trusted(**{k: _clean(p) for k, p in parts.items()})
    elif data and problem is None:
        problem = "the job's answer is no object"
    return extended(
        result, PythonResult, _Pending, value=value, exception=exception, value_problem=problem
    )


def _clean(text: Any) -> str:
    """Without lone surrogates, which JSON cannot carry."""
    return str(text).encode("utf-8", "backslashreplace").decode()


_Pending = pending_kind(PythonResult, frozenset({"value", "exception", "value_problem"}))
