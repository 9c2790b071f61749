"""What a job can see: its files, environment and identity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from isojob._models import Model, Name
from isojob._variables import NO_VARIABLES, Variables, check_variable
from isojob.mounts import RESERVED, Mount, Root, below, check_path, list_to_tuple
from isojob.seccomp import SeccompProfile

__all__ = ["PROTECTIONS", "Sandbox"]

PROTECTIONS = (
    "cgroup",
    "memory_limit",
    "swap_limit",
    "process_limit",
    "cpu_accounting",
    "cpus",
    "cpuset",
    "io_limit",
    "seccomp",
)
"""The protections a caller may give up by name, in `Sandbox.allow_missing`."""

# 65534 is the overflow id that every unmapped owner shows as, 65535 the old 16-bit "no id".
MAX_ID = 65533
MAX_HOSTNAME = 64
MAX_CELL_MOUNTS = 64

_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _check_workdir(path: str) -> str:
    check_path(path)
    if path in RESERVED or any(below(path, tree) for tree in RESERVED):
        raise ValueError(f"{path!r}: not in /proc or /dev")
    if path == "/tmp" or below(path, "/tmp"):  # noqa: S108
        raise ValueError(f"{path!r}: the job's own /tmp is mounted there")
    if ":" in path or "\n" in path:
        raise ValueError(f"{path!r}: ends a field of /etc/passwd, where it is the job's home")
    return path


def _check_hostname(name: str) -> str:
    if len(name) > MAX_HOSTNAME or not all(map(_LABEL.fullmatch, name.split("."))):
        raise ValueError(
            f"{name!r}: at most {MAX_HOSTNAME} letters, digits, hyphens and dots (hostname(7))"
        )
    return name


def _check_protections(names: frozenset[str]) -> frozenset[str]:
    if unknown := sorted(names.difference(PROTECTIONS)):
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(PROTECTIONS)}")
    return names


def _to_frozenset(value: object) -> object:
    return frozenset(value) if isinstance(value, (set, list, tuple)) else value


_Id: TypeAlias = Annotated[int, Field(ge=1, le=MAX_ID)]


def mounted_inside(sandbox: Sandbox) -> list[bool]:
    """Of each mount, whether its target lies in what each cell has anew, which would hide it."""
    places = [sandbox.workdir, "/tmp"]  # noqa: S108 - a path inside the sandbox
    inside: list[bool] = []
    for mount in sandbox.mounts:
        hidden = any(below(mount.target, place) for place in places)
        inside.append(sandbox.root.writable or hidden)
        if mount.type == "tmpfs":
            places.append(mount.target)
    return inside


class Sandbox(Model, frozen=True):
    """What a job can see; the template that a pool's cells are made from. Hashable.

    Attributes:
        root: What ``/`` is made from.
        mounts: What is mounted besides, in this order. At most 64 that each job has anew: every
            tmpfs, and what lies in one, in ``workdir`` or in ``/tmp``; on a writable root all.
        network: ``none``: an empty network namespace of its own, not even with a loopback up.
        seccomp: Which system calls are answered (seccomp(2)).
        env: Variables over those of the root's image and isojob's own; the host's environment is
            never inherited.
        hostname: What uname(2) tells the job.
        workdir: Where the program starts and ``HOME`` points: a directory of each job's own, empty,
            whatever the root has there (``cwd=`` starts a job in what is there); not in a mount. A
            root that is not writable needs to have that directory, or nothing at its top.
        uid: User id that the job sees itself as, 1 to 65533.
        gid: Group id that the job sees itself as, 1 to 65533.
        allow_missing: Names out of `PROTECTIONS` that the sandbox may go without where the host
            cannot provide them; every result tells which were missing.

    Raises:
        pydantic.ValidationError: A field is unknown or its value is refused.
    """

    root: Root = Root(kind="host")
    mounts: Annotated[tuple[Mount, ...], BeforeValidator(list_to_tuple)] = ()
    network: Literal["none"] = "none"
    seccomp: SeccompProfile = Field(default_factory=SeccompProfile.default)
    env: Variables = NO_VARIABLES
    hostname: Annotated[str, AfterValidator(_check_hostname)] = "isojob"
    workdir: Annotated[Name, AfterValidator(_check_workdir)] = "/box"
    uid: _Id = 1000
    gid: _Id = 1000
    allow_missing: Annotated[
        frozenset[str], BeforeValidator(_to_frozenset), AfterValidator(_check_protections)
    ] = frozenset()

    if TYPE_CHECKING:
        # The fields' types are what is read; a caller may also write lists and sets.
        def __init__(
            self,
            *,
            root: Root = ...,
            mounts: tuple[Mount, ...] | list[Mount] = ...,
            network: Literal["none"] = ...,
            seccomp: SeccompProfile = ...,
            env: Mapping[str, str] = ...,
            hostname: str = ...,
            workdir: str = ...,
            uid: int = ...,
            gid: int = ...,
            allow_missing: frozenset[str] | set[str] | tuple[str, ...] | list[str] = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _mounts_visible(self) -> Self:
        targets = [mount.target for mount in self.mounts]
        for index, target in enumerate(targets):
            for later in targets[index + 1 :]:
                if target == later or below(target, later):
                    raise ValueError(f"mounts: {later!r} hides {target!r}, mounted before it")
        if self.workdir in targets:
            raise ValueError(
                f"mounts: {self.workdir!r} is the working directory: the job's own tmpfs hides it;"
                " use cwd= for where a job starts"
            )
        for mount in self.mounts:
            if below(self.workdir, mount.target):
                raise ValueError(
                    f"mounts: {mount.target!r} holds the working directory {self.workdir!r}, whose"
                    " tmpfs would hide what is there: use cwd= for where a job starts"
                )
        if self.root.writable:
            for path in (*targets, self.workdir):
                if path.split("/")[1] in (".lower", ".root"):
                    raise ValueError(f"{path!r}: isojob's own names on the way to a writable root")
        kinds = zip(self.mounts, mounted_inside(self), strict=True)
        if sum(inside or mount.type == "tmpfs" for mount, inside in kinds) > MAX_CELL_MOUNTS:
            raise ValueError(
                f"mounts: at most {MAX_CELL_MOUNTS} that each job has anew: every tmpfs, and what"
                " lies in one, in the working directory, in /tmp, or on a writable root"
            )
        return self

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of a job: isojob's own, then the root's, `env`, and `extra`.

        Args:
            extra: The variables of one call.

        Returns:
            A new dictionary with at least PATH, HOME, TMPDIR and LANG.

        Raises:
            ValueError: A name in `extra` is empty or holds ``=`` or NUL, or a value holds NUL.
        """
        for name, value in (extra or {}).items():
            check_variable(name, value)
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": self.workdir,
            "TMPDIR": "/tmp",  # noqa: S108 - a path inside the sandbox
            "LANG": "C.UTF-8",
            **self.root.env,
            **self.env,
            **(extra or {}),
        }
