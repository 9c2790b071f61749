"""Arguments that calls have in common; `isojob.run_isolated` and its like explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from isojob._job import Content, StdioArg
from isojob.limits import Limits

__all__ = ["OpenOptions", "PairOptions", "RunOptions", "check_options", "terminal_size"]


class _JobOptions(TypedDict, total=False):
    stdin: StdioArg
    stdout: StdioArg
    stderr: StdioArg
    env: Mapping[str, str] | None
    cwd: str | None
    files: Mapping[str, Content] | None
    collect: Sequence[str]


class RunOptions(_JobOptions, total=False):
    """Of a job that is run to its end."""

    input: bytes | None


class OpenOptions(_JobOptions, total=False):
    """Of a job to talk to."""

    pty: bool | tuple[int, int]


class PairOptions(TypedDict, total=False):
    """Of two jobs that talk to each other."""

    limits: Limits | None
    interactor_limits: Limits | None
    files: Mapping[str, Content] | None
    interactor_files: Mapping[str, Content] | None
    env: Mapping[str, str] | None
    interactor_env: Mapping[str, str] | None
    collect: Sequence[str]
    interactor_collect: Sequence[str]
    idle_time: float | None
    transcript: int


def check_options(call: str, options: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuses what a caller without a type checker has misspelt.

    Raises:
        TypeError: An option that the call does not have.
    """
    if unknown := options.keys() - known:
        raise TypeError(f"{call}() takes no {', '.join(sorted(map(str, unknown)))}")


def terminal_size(pty: object) -> tuple[int, int] | None:
    """Rows and columns of the terminal that was asked for, if any.

    Raises:
        TypeError: It is neither a bool nor two numbers.
    """
    if isinstance(pty, bool):
        return (24, 80) if pty else None
    if not isinstance(pty, tuple) or len(pty) != 2:
        raise TypeError(f"pty must be True, False or (rows, columns), not {pty!r}")
    return pty
