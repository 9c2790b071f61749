"""What Python jobs are given, checked before anything starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from typing_extensions import override

from isojob._job import Content

__all__ = ["NOT_GIVEN", "argument_of", "modules_of", "source_of"]

MAX_MODULES = 64
MAX_NAMES = 4096  # bytes; a template reads them at once, and tells them


class _NotGiven:
    @override
    def __repr__(self) -> str:
        return "not given"


NOT_GIVEN: Final = _NotGiven()


def modules_of(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"preload must be a sequence of modules, not {names!r}")
    for name in names:
        if not isinstance(name, str) or not all(p.isidentifier() for p in name.split(".")):
            raise ValueError(f"preload: {name!r} is no name of a module")
    if len(names) > MAX_MODULES:
        raise ValueError(f"preload: more than {MAX_MODULES} modules; make one that imports them")
    if sum(len(name.encode()) for name in names) > MAX_NAMES:
        raise ValueError(f"preload: more than {MAX_NAMES} bytes of names")
    return tuple(names)


def source_of(code: str | bytes | Path) -> tuple[str, Content]:
    if isinstance(code, str):
        return "main.py", code.encode("utf-8", "surrogatepass")
    if isinstance(code, bytes):
        return "main.py", code
    if isinstance(code, Path):
        if not code.name:
            raise ValueError(f"code: {str(code)!r} is no name of a file")
        return code.name, code
    raise TypeError(f"code must be source text or a pathlib.Path, not {type(code).__name__}")


def argument_of(argument: Any) -> str:
    if argument is NOT_GIVEN:
        return "[]"
    try:
        return json.dumps([argument])
    except (ValueError, RecursionError) as error:  # a circle, or as good as one
        raise TypeError(f"argument: {error}") from None
