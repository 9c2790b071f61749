"""What a job can see: its root, mounts, environment and identity."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, WrapSerializer, model_validator
from typing_extensions import override

from isojob._models import Bytes, Model, Name
from isojob.seccomp import SeccompProfile

if TYPE_CHECKING:
    from pydantic_core.core_schema import SerializerFunctionWrapHandler

__all__ = ["PROTECTIONS", "Mount", "Root", "Sandbox"]

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

MIN_TMPFS = 64 * 2**10
# 65534 is the overflow id that every unmapped owner shows as, 65535 the old 16-bit "no id".
MAX_ID = 65533
MAX_LAYERS = 60
MAX_HOSTNAME = 64

_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")

# Where the job's own tmpfs is mounted, or isojob's own proc and device nodes are.
_TAKEN = ("/box", "/tmp")  # noqa: S108 - paths inside the sandbox
_RESERVED = ("/proc", "/dev")
# A bind of these hands the job the host's processes, or files that change its own limits.
_DANGEROUS_SOURCES = ("/", "/proc", "/sys", "/sys/fs", "/sys/fs/cgroup")
_DANGEROUS_TREES = ("/proc", "/sys/fs/cgroup")


def _below(path: str, tree: str) -> bool:
    return path.startswith(f"{tree}/")


def _check_path(path: str) -> str:
    """Refuses what a careful reader and the kernel could understand differently."""
    root, *parts = path.split("/")
    if root or not parts or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{path!r}: must be an absolute path below /, without '.', '..' or doubled or"
            " trailing slashes"
        )
    return path


def _check_target(path: str) -> str:
    _check_path(path)
    if path in _TAKEN:
        raise ValueError(f"{path!r}: the job's own tmpfs is mounted there")
    if path in _RESERVED or any(_below(path, tree) for tree in _RESERVED):
        raise ValueError(f"{path!r}: isojob's own /proc and /dev allow no mount in them")
    return path


def check_source(path: str) -> str:
    """Refuses what a job must never see of the host; a path without links says the most.

    Raises:
        ValueError: The host's processes or cgroups are there, or it is no absolute path.
    """
    if path in _DANGEROUS_SOURCES or any(_below(path, tree) for tree in _DANGEROUS_TREES):
        raise ValueError(f"{path!r}: would show the job the host's processes or cgroups")
    return _check_path(path)


def _check_workdir(path: str) -> str:
    _check_path(path)
    if path in _RESERVED or any(_below(path, tree) for tree in _RESERVED):
        raise ValueError(f"{path!r}: not in /proc or /dev")
    if path == "/tmp" or _below(path, "/tmp"):  # noqa: S108
        raise ValueError(f"{path!r}: the job's own /tmp is mounted there")
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


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_frozenset(value: object) -> object:
    return frozenset(value) if isinstance(value, (set, list, tuple)) else value


def _path_of(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    return os.fsdecode(path)


class _Environment(Mapping[str, str]):
    """A mapping that hashes, so that sandboxes can be keys and set members."""

    __slots__ = ("_variables",)

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name: variables[name] for name in sorted(variables)}

    @override
    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    @override
    def __len__(self) -> int:
        return len(self._variables)

    @override
    def __hash__(self) -> int:
        return hash(tuple(self._variables.items()))

    @override
    def __repr__(self) -> str:
        return repr(self._variables)


def _check_variable(name: object, value: object) -> None:
    """Refuses what environ(7) cannot carry; the kernel would take it and programs misread it."""
    if not isinstance(name, str) or not isinstance(value, str):
        raise ValueError(f"{name!r}: names and values must be str")  # noqa: TRY004 - the one that pydantic collects
    if not name or "=" in name or "\0" in name:
        raise ValueError(f"{name!r}: a variable's name is not empty and has no '=' and no NUL")
    if "\0" in value:
        raise ValueError(f"{name}: a variable's value has no NUL")


def _freeze_environment(variables: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in variables.items():
        _check_variable(name, value)
    return _Environment(variables)


def _thaw(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _serialize_environment(
    value: Mapping[str, str], handler: SerializerFunctionWrapHandler
) -> dict[str, str]:
    plain: dict[str, str] = handler(dict(value))
    return plain


_Id: TypeAlias = Annotated[int, Field(ge=1, le=MAX_ID)]


class Mount(Model, frozen=True):
    """Something mounted into the sandbox besides its root. Made by `bind` and `tmpfs`.

    Attributes:
        type: ``bind``: a file or directory of the host; ``tmpfs``: an empty one for each job.
        target: Where the job sees it: absolute, not ``/box`` or ``/tmp``, not in ``/proc`` or
            ``/dev``.
        source: The path on the host, for a bind.
        read_only: Whether the job can only read it.
        size: Size of a tmpfs, bytes; its pages also count as the job's memory.
        inodes: Files and directories in a tmpfs.

    Raises:
        pydantic.ValidationError: A path or size is refused, or does not belong to the type.
    """

    type: Literal["bind", "tmpfs"]
    target: Annotated[Name, AfterValidator(_check_target)]
    source: Annotated[Name, AfterValidator(check_source)] | None = None
    read_only: bool = True
    size: Bytes | None = None
    inodes: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None

    @classmethod
    def bind(
        cls,
        source: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        target: str,
        *,
        read_only: bool = True,
    ) -> Self:
        """Shows the job a file or directory of the host, with what is mounted below it.

        A socket in it (such as a daemon's) can be connected to even if the mount is read-only.

        Args:
            source: Absolute path on the host; relative ones are refused, since the working
                directory may change between asking and mounting.
            target: Absolute path inside the sandbox.
            read_only: False lets the job write to the host's files.
        """
        return cls(type="bind", source=_path_of(source), target=target, read_only=read_only)

    @classmethod
    def tmpfs(cls, target: str, *, size: int | str, inodes: int = 16384) -> Self:
        """Gives each job an empty writable file system in memory (tmpfs(5)).

        Args:
            target: Absolute path inside the sandbox.
            size: Bytes, or a string such as ``"64MiB"``; at least 64 KiB.
            inodes: Most files and directories in it.
        """
        # The field's type is what is read; parse_bytes turns the string into it.
        fields: dict[str, Any] = {"size": size}
        return cls(type="tmpfs", target=target, read_only=False, inodes=inodes, **fields)

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if self.type == "bind":
            if self.source is None or self.size is not None or self.inodes is not None:
                raise ValueError("a bind mount has a source, and neither size nor inodes")
        elif self.source is not None or self.size is None or self.inodes is None:
            raise ValueError("a tmpfs has a size and inodes, and no source")
        elif self.size < MIN_TMPFS:
            raise ValueError(f"size must be at least {MIN_TMPFS}: tmpfs takes 0 for unlimited")
        return self


class Root(Model, frozen=True):
    """What the job's ``/`` is made from. Made by `host`, `directory` and `layers`; read-only.

    Attributes:
        kind: ``host``: the host's toolchain; ``directory``: a whole root file system; ``layers``:
            several directories, one over the other.
        path: The directory, for the second.
        lower: The directories, the lowest first, for the third.
    """

    kind: Literal["host", "directory", "layers"] = "host"
    path: Annotated[Name, AfterValidator(check_source)] | None = None
    lower: Annotated[
        tuple[Annotated[Name, AfterValidator(check_source)], ...], BeforeValidator(_list_to_tuple)
    ] = Field(default=(), max_length=MAX_LAYERS)

    @classmethod
    def host(cls) -> Self:
        """The host's own programs and libraries (``/usr``, ``/bin``, ``/lib``…), read-only."""
        return cls(kind="host")

    @classmethod
    def directory(cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Self:
        """An unpacked root file system, such as an exported container image, read-only.

        Args:
            path: Absolute path on the host; not ``/``, which would show the job everything.
        """
        return cls(kind="directory", path=_path_of(path))

    @classmethod
    def layers(cls, paths: Sequence[str | bytes | os.PathLike[str] | os.PathLike[bytes]]) -> Self:
        """Directories one over the other, as container images have them, read-only (overlayfs).

        Mounted once for all jobs. A layer hides what is below it by overlayfs's own marks: a
        character device 0, 0 in the place of a file, ``trusted.overlay.opaque`` on a directory
        (``user.overlay.opaque`` where isojob does not run as root).

        Args:
            paths: Absolute paths on the host, the lowest layer first; at most 60.
        """
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError("layers takes a sequence of paths, the lowest first")
        return cls(kind="layers", lower=tuple(_path_of(path) for path in paths))

    @classmethod
    def oci(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """The root file system of a container image, unpacked once: `Image.load(path).root`."""
        from isojob._image import Image

        return cls.directory(Image.load(path, **options).path)

    @property
    def sources(self) -> tuple[str, ...]:
        """The directories of the host that it is made from; for `host` none."""
        return self.lower if self.path is None else (self.path,)

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if (self.kind == "directory") != (self.path is not None):
            raise ValueError("a path belongs to the kind 'directory', and to no other")
        if (self.kind == "layers") != bool(self.lower):
            raise ValueError("one layer or more belong to the kind 'layers', and to no other")
        return self


class Sandbox(Model, frozen=True):
    """What a job can see; the template that a pool's cells are made from. Hashable.

    Attributes:
        root: What ``/`` is made from.
        mounts: What is mounted besides, in this order.
        network: ``none``: an empty network namespace of its own, not even with a loopback up.
        seccomp: Which system calls are answered (seccomp(2)).
        env: Variables over isojob's own; the host's environment is never inherited.
        hostname: What uname(2) tells the job.
        workdir: Where the program starts and ``HOME`` points.
        uid: User id that the job sees itself as, 1 to 65533.
        gid: Group id that the job sees itself as, 1 to 65533.
        allow_missing: Names out of `PROTECTIONS` that the sandbox may go without where the host
            cannot provide them; every result tells which were missing.

    Raises:
        pydantic.ValidationError: A field is unknown or its value is refused.
    """

    root: Root = Root(kind="host")
    mounts: Annotated[tuple[Mount, ...], BeforeValidator(_list_to_tuple)] = ()
    network: Literal["none"] = "none"
    seccomp: SeccompProfile = Field(default_factory=SeccompProfile.default)
    env: Annotated[
        Mapping[Name, Name],
        BeforeValidator(_thaw),
        AfterValidator(_freeze_environment),
        WrapSerializer(_serialize_environment),
    ] = Field(default_factory=lambda: _Environment({}))
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
                if target == later or _below(target, later):
                    raise ValueError(f"mounts: {later!r} hides {target!r}, mounted before it")
        return self

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of a job: isojob's own, then `env`, then `extra`.

        Args:
            extra: The variables of one call.

        Returns:
            A new dictionary with at least PATH, HOME, TMPDIR and LANG.

        Raises:
            ValueError: A name in `extra` is empty or holds ``=`` or NUL, or a value holds NUL.
        """
        for name, value in (extra or {}).items():
            _check_variable(name, value)
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": self.workdir,
            "TMPDIR": "/tmp",  # noqa: S108 - a path inside the sandbox
            "LANG": "C.UTF-8",
            **self.env,
            **(extra or {}),
        }
