"""The counters of a cell that still runs, read here as init reads them at its end (cgroup.c)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isojob.cgroups.base import Counters, Driver

__all__ = ["read"]


def read(driver: Driver, directories: Sequence[Path]) -> tuple[Counters, int | None]:
    """The counters now, and the CPU time so far in nanoseconds.

    Args:
        driver: Knows the files.
        directories: The cell's, one in each hierarchy.

    Raises:
        FileNotFoundError: The cell has ended.
    """
    values: list[int] = []
    files: dict[int, bytes] = {}
    seen = False
    for index, evidence in enumerate(driver.files.evidence):
        try:
            data = (directories[evidence.hierarchy] / evidence.name).read_bytes()
            seen = True
        except OSError:  # a file that this kernel lacks
            data = b""
        lines = data.decode("ascii", "replace").splitlines()
        values += [_number(lines, line, mark) for line, mark in evidence.counters]
        if evidence.raw and data:
            files[index] = data
    if not seen:
        raise FileNotFoundError(directories[0])
    cpu = None
    if driver.files.cpu is not None:
        counter, unit = driver.files.cpu
        cpu = None if values[counter] < 0 else values[counter] * unit
    return driver.counters(values, files), cpu


def _number(lines: list[str], line: str, mark: str) -> int:
    for text in lines:
        if text.startswith(line):
            digits = text[len(line) :].partition(mark)[2] if mark else text[len(line) :]
            digits = digits.split()[0] if digits.split() else ""
            return int(digits) if digits.isascii() and digits.isdigit() else -1
    return -1
