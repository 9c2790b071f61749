"""Where a job's files come from: the root, and what is mounted besides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from isojob._models import Bytes, Model, Name
from isojob._variables import NO_VARIABLES, Variables

__all__ = ["MIN_TMPFS", "Mount", "Root", "check_source"]

MIN_TMPFS = 64 * 2**10
MAX_LAYERS = 60

# Where the job's own tmpfs is mounted, or isojob's own proc and device nodes are.
_TAKEN = ("/box", "/tmp")  # noqa: S108 - paths inside the sandbox
RESERVED = ("/proc", "/dev")
# A bind of these hands the job the host's processes, or files that change its own limits.
_DANGEROUS_SOURCES = ("/", "/proc", "/sys", "/sys/fs", "/sys/fs/cgroup")
_DANGEROUS_TREES = ("/proc", "/sys/fs/cgroup")


def below(path: str, tree: str) -> bool:
    return path.startswith(f"{tree}/")


def check_path(path: str) -> str:
    """Refuses what a careful reader and the kernel could understand differently."""
    root, *parts = path.split("/")
    if root or not parts or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"{path!r}: must be an absolute path below /, without '.', '..' or doubled or"
            " trailing slashes"
        )
    return path


def _check_target(path: str) -> str:
    check_path(path)
    if path in _TAKEN:
        raise ValueError(f"{path!r}: is kept for the job's own tmpfs")
    if path in RESERVED or any(below(path, tree) for tree in RESERVED):
        raise ValueError(f"{path!r}: isojob's own /proc and /dev allow no mount in them")
    return path


def check_source(path: str) -> str:
    """Refuses what a job must never see of the host; a path without links says the most.

    Raises:
        ValueError: The host's processes or cgroups are there, or it is no absolute path.
    """
    if path in _DANGEROUS_SOURCES or any(below(path, tree) for tree in _DANGEROUS_TREES):
        raise ValueError(f"{path!r}: would show the job the host's processes or cgroups")
    return check_path(path)


def list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _path_of(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    return os.fsdecode(path)


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
            read_only: False lets the job write to the host's files. The targets of other mounts
                below this one are made there, and stay. A job that may rename a directory between
                takes such a mount along, for later jobs of the pool, too: put it directly below.
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
    """What the job's ``/`` is made from. Made by `host`, `directory`, `layers` and `oci`.

    Attributes:
        kind: ``host``: the host's toolchain; ``directory``: a whole root file system; ``layers``:
            several directories, one over the other.
        path: The directory, for the second.
        lower: The directories, the lowest first, for the third.
        writable: Whether the job may change what it sees: it works on a copy-on-write view of its
            own, which goes with it.
        env: Variables of the container image that it comes from; a sandbox's own are over them.
    """

    kind: Literal["host", "directory", "layers"] = "host"
    path: Annotated[Name, AfterValidator(check_source)] | None = None
    lower: Annotated[
        tuple[Annotated[Name, AfterValidator(check_source)], ...], BeforeValidator(list_to_tuple)
    ] = Field(default=(), max_length=MAX_LAYERS)
    writable: bool = False
    env: Variables = NO_VARIABLES

    @classmethod
    def host(cls) -> Self:
        """The host's own programs and libraries (``/usr``, ``/bin``, ``/lib``…), read-only."""
        return cls(kind="host")

    @classmethod
    def directory(
        cls,
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
        *,
        writable: bool = False,
    ) -> Self:
        """An unpacked root file system, such as an exported container image.

        Args:
            path: Absolute path on the host; not ``/``, which would show the job everything.
            writable: The job owns what uid and gid 0 own in there (rootless: what the caller owns),
                and works on a copy-on-write view of its own, which goes with it. What it writes
                counts as its `Limits.disk` and `Limits.inodes`. The directory itself never changes.

        Raises:
            pydantic.ValidationError: The path is not absolute, or is ``/``.
        """
        return cls(kind="directory", path=_path_of(path), writable=writable)

    @classmethod
    def layers(
        cls,
        paths: Sequence[str | bytes | os.PathLike[str] | os.PathLike[bytes]],
        *,
        writable: bool = False,
    ) -> Self:
        """Directories or images one over the other, as containers have them (overlayfs).

        Mounted once for all jobs, if they are not writable. A layer hides what is below it by
        overlayfs's own marks: a character device 0, 0 in the place of a file,
        ``trusted.overlay.opaque`` on a directory (``user.overlay.opaque`` if the root is writable,
        or isojob does not run as root).

        Args:
            paths: Absolute paths on the host, the lowest layer first; at most 60. A file is taken
                for a squashfs or EROFS image and mounted, which only root can (at most 32). The
                kernel reads it: an image of a stranger's making can attack the kernel.
            writable: As for `directory`.

        Raises:
            TypeError: One path instead of a sequence.
            pydantic.ValidationError: A path is not absolute or is listed twice; none, or too many.
        """
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError("layers takes a sequence of paths, the lowest first")
        lower = tuple(_path_of(path) for path in paths)
        return cls(kind="layers", lower=lower, writable=writable)

    @classmethod
    def oci(cls, path: str | os.PathLike[str], *, writable: bool = False, **options: Any) -> Self:
        """The root file system of a container image, unpacked once by `Image.load` (blocking).

        With the image's variables. Its program and working directory are for each job to ask for:
        ``image = Image.load(path)`` has them as `Image.command` and `Image.workdir`.

        Args:
            path: As for `Image.load`.
            writable: As for `directory`.
            **options: The other arguments of `Image.load`.

        Raises:
            ImageError, OSError, ValueError: As `Image.load`.
        """
        from isojob._image import Image

        image = Image.load(path, **options)
        return cls(kind="directory", path=image.path, writable=writable, env=image.env)

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
        if len(set(self.lower)) < len(self.lower):
            raise ValueError("a layer is listed twice")
        if self.writable and self.kind == "host":
            raise ValueError(
                "the host's own root is never writable: use Root.directory or Root.layers"
            )
        return self
