"""What an attack is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from isojob.limits import Limits
from isojob.result import Result, Status

__all__ = [
    "DIES",
    "KINDS",
    "LIMITS",
    "MIB",
    "SHORT_WALL",
    "WALL",
    "Attack",
    "Check",
    "Door",
    "ends",
    "nothing_collected",
]

LIMITS = Limits(
    cpu_time=4,
    wall_time=15,
    memory="64MiB",
    processes=32,
    output="256KiB",
    disk="32MiB",
    inodes=2000,
    collect="1MiB",
    file_size="64MiB",
    open_files=256,
)
MIB = 2**20

Kind: TypeAlias = Literal[
    "processes",
    "memory",
    "time",
    "files",
    "namespaces",
    "calls",
    "identity",
    "between jobs",
    "composed",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Door: TypeAlias = Literal[
    "alone", "session", "writable", "terminal", "pair", "relayed", "ring", "image"
]
Check: TypeAlias = Callable[[Result], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack.

    Attributes:
        name: What to call it.
        kind: What it is aimed at.
        title: What it tries, in words.
        program: Module and function in ``programs/``, then arguments; ``{...}`` is of the scene.
        ends: The statuses that are right.
        limits: Changes to `LIMITS`.
        collect: What the host is asked to read back.
        input: Given to stdin.
        check: What is wrong with the result, in words.
        soon: Whether it has to end long before its wall time limit.
        answer: ``layer: how`` for what the program itself cannot see.
        before: A program that runs to its end in a job of its own before.
        beside: A program that runs in a job of its own meanwhile.
        door: How it is let in: as a job by itself, in a session, on a root that it may write to, on
            a terminal, with a partner, with one and the host between them, in a ring of three, or
            as an image, which runs nothing and is named by `program`.
        keep: In a session, whether what the job before did is kept.
        harmless: Whether it can be run without a sandbox, by a user without privileges, to see that
            it would tell.
    """

    name: str
    kind: Kind
    title: str
    program: tuple[str, ...]
    ends: frozenset[Status] = frozenset({Status.OK})
    limits: dict[str, Any] = field(default_factory=dict)
    collect: tuple[str, ...] = ()
    input: bytes | None = None
    check: Check | None = None
    soon: bool = False
    answer: str = ""
    before: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    door: Door = "alone"
    keep: bool = True
    harmless: bool = False


def ends(*names: str) -> frozenset[Status]:
    """Statuses by their names."""
    return frozenset(map(Status, names))


WALL = ends("wall_time_limit")
SHORT_WALL: dict[str, Any] = {"wall_time": 2.0}
DIES = "init: kills until no child is left, and with it dies its pid namespace"


def nothing_collected(result: Result) -> Iterator[str]:
    """A check: the host has read nothing back."""
    for name, data in result.files.items():
        yield f"the host collected {name}: {data[:40]!r}"
