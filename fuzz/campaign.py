"""What the fuzzers have in common: a printed seed, a time, a corpus to begin with, and what they leave.

    ISOJOB_FUZZ_SECONDS  how long (60)
    ISOJOB_FUZZ_SEED     repeats a run

Each begins with the inputs in fuzz/corpus/NAME, and leaves the one that broke it in build/fuzz/NAME.
With the argument ``merge`` it adds to the corpus instead: what executes lines that nothing there does.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import isojob

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
BUILD = HERE.parent / "build" / "fuzz"
PACKAGE = str(Path(isojob.__file__).parent)
MOST_KEPT = 4096
"""Bytes of an input that is worth a place in the repository."""
SECONDS = float(os.environ.get("ISOJOB_FUZZ_SECONDS", "60"))


def seed() -> int:
    """The seed of this run, which is printed; never 0, for which libFuzzer takes another."""
    number = int(os.environ.get("ISOJOB_FUZZ_SEED") or random.randrange(1, 2**32))
    print(f"seed {number}", flush=True)
    return number


def run(
    name: str, make: Callable[[random.Random], bytes], check: Callable[[bytes], bool]
) -> tuple[int, int]:
    """Makes inputs and checks them until the time is over.

    Args:
        name: Of the fuzzer's corpus.
        make: An input by chance.
        check: Raises if a property does not hold; else whether the input was a good one.

    Returns:
        How many there were, and how many of them were good.
    """
    chance = random.Random(seed())
    end = time.monotonic() + SECONDS
    folder = CORPUS / name
    kept = [path.read_bytes() for path in sorted(folder.glob("*"))]
    if sys.argv[1:] == ["merge"]:
        return _merge(folder, kept, lambda: make(chance), check, end)
    tried = good = 0
    while kept or time.monotonic() < end:
        data = kept.pop() if kept else make(chance)
        try:
            good += check(data)
        except BaseException:
            path = _save(BUILD / name, data)
            print(f"broken by {path}", file=sys.stderr)
            raise
        tried += 1
    assert 0 < good < tried, "inputs of one kind alone try nothing"
    return tried, good


def _save(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha1(data).hexdigest()
    path.write_bytes(data)
    return path


def _merge(
    folder: Path,
    kept: list[bytes],
    make: Callable[[], bytes],
    check: Callable[[bytes], bool],
    end: float,
) -> tuple[int, int]:
    seen: set[tuple[str, int]] = set()
    tried = added = 0

    def trace(frame: FrameType, *_: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    while kept or time.monotonic() < end:
        before, new = len(seen), not kept
        data = make() if new else kept.pop()
        if len(data) > MOST_KEPT:
            continue
        sys.settrace(trace)
        try:
            check(data)
        finally:
            sys.settrace(None)
        tried += 1
        if new and len(seen) > before:
            _save(folder, data)
            added += 1
    return tried, added
