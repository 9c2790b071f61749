"""The account of one job, for a person: what happened, what it used, what held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from isojob.host.doctor_job import describe_posture
from isojob.limits import Limits
from isojob.result import Result, Status
from isojob.verdict import explain, signal_name

__all__ = ["exit_status", "print_account"]

_KILLED = 128 + 9
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_UNKNOWN = "not known on this host"


def exit_status(result: Result) -> int:
    """What ``isojob run`` ends with: the job's own status where that says how the job ended.

    A limit is 137 (128 + SIGKILL) whatever the job returned: a job over its output limit may well
    have exited with 0.
    """
    if result.status in (Status.OK, Status.NONZERO_EXIT):
        return result.returncode
    if result.status is Status.SIGNALED:
        return 128 - result.returncode
    return _KILLED


def print_account(
    console: Console,
    result: Result,
    limits: Limits,
    written: Mapping[str, str],
    *,
    to: Path | None,
    status: int,
) -> None:
    """Prints the account, one screen.

    Args:
        console: Where.
        result: What came back.
        limits: What was allowed.
        written: Collected files that could not be written, with the reason.
        to: Where the others went.
        status: What this command ends with.
    """
    style = {Status.OK: "bold green", Status.NONZERO_EXIT: "bold yellow"}.get(
        result.status, "bold red"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    # Text is never markup: names of files and commands are other people's.
    table.add_row(
        "isojob",
        Text.assemble((str(result.status), style), f": {explain(result.evidence, result.status)}"),
    )
    for name, text in _rows(result, limits, status):
        table.add_row(name, Text(text))
    for name, text in _file_rows(result, written, to):
        table.add_row(name, Text(text))
    table.add_row("held by", Text(describe_posture(result.posture)))
    for note in result.posture.notes:
        table.add_row("", Text(note))
    console.print(table)


def _rows(result: Result, limits: Limits, status: int) -> Iterator[tuple[str, str]]:
    usage = result.usage
    end = (
        f"status {result.returncode}" if result.returncode >= 0 else signal_name(-result.returncode)
    )
    yield "exit", end if status == result.returncode else f"{end}; this command ends with {status}"
    yield "wall time", _of(_seconds(usage.wall_time), limits.wall_time, _seconds)
    split = (
        ""
        if usage.user_time is None or usage.system_time is None
        else f" (user {_seconds(usage.user_time)}, system {_seconds(usage.system_time)})"
    )
    yield "CPU time", _of(_seconds(usage.cpu_time), limits.cpu_time, _seconds) + split
    yield "memory peak", _of(_size(usage.memory_peak), limits.memory, _size)
    yield "processes peak", _of(_count(usage.processes_peak), limits.processes, _count)
    if usage.io_read_bytes is not None and usage.io_write_bytes is not None:
        yield (
            "disk I/O",
            f"{_size(usage.io_read_bytes)} read, {_size(usage.io_write_bytes)} written",
        )
    else:
        yield "disk I/O", _UNKNOWN
    yield "overhead", f"{_seconds(usage.setup_time)} before, {_seconds(usage.teardown_time)} after"


def _file_rows(
    result: Result, failed: Mapping[str, str], to: Path | None
) -> Iterator[tuple[str, str]]:
    for name, content in result.files.items():
        if name in failed:
            yield "not written", f"{name!r}: {failed[name]}"
        else:
            yield "collected", f"{name!r} ({_size(len(content))}) in {str(to)!r}"
    for name, reason in result.uncollected.items():
        yield "not collected", f"{name!r}: {reason}"


def _of(used: str, limit: float | None, show: object) -> str:
    if used == _UNKNOWN:
        return used
    assert callable(show)
    return f"{used} of {'unlimited' if limit is None else show(limit)}"


def _count(number: float | None) -> str:
    return _UNKNOWN if number is None else f"{number:g}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _size(size: float | None) -> str:
    if size is None:
        return _UNKNOWN
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} {_UNITS[unit]}" if size == int(size) else f"{size:.1f} {_UNITS[unit]}"
