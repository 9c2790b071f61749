"""A seccomp profile: loading it from where it is written."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from isojob._models import Model
from isojob.errors import ProfileError
from isojob.seccomp._compile import CompiledProfile, compile_profile
from isojob.seccomp._format import (
    Action,
    Architectures,
    ArchMap,
    Errno,
    Flags,
    Rule,
    check_action,
    merge_errno,
    sequence,
    shown,
)

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["SeccompProfile"]

# Docker's is 13 kB. What is far longer is no profile, and is not worth parsing.
MAX_SIZE = 2**20
UNCONFINED = "unconfined"


class SeccompProfile(Model, frozen=True, populate_by_name=True):
    """Which system calls a job may make. Hashable, and equal by content.

    A profile says what one seccomp filter does; `compile` makes the filter. Whatever the profile,
    calls under another ABI than the machine's own are answered ENOSYS, and some calls that reach
    out of a sandbox are refused; docs/seccomp.md tells which.

    Attributes:
        name: What results and messages call it: ``default``, ``compute``, ``unconfined`` or the
            name of the file.
        default_action: The answer to a call that no rule matches.
        default_errno: Error number of a default ``SCMP_ACT_ERRNO``; EPERM by default.
        rules: What is answered otherwise.
        architectures: Accepted and not used: only the machine's own ABI is ever served.
        arch_map: The same, as Docker writes it.
        flags: Accepted and not used: TSYNC has one thread to synchronise, the others loosen.
    """

    name: Annotated[str, Field(min_length=1, max_length=255)]
    default_action: Action = Field(alias="defaultAction")
    default_errno: Errno | None = Field(default=None, alias="defaultErrnoRet")
    rules: Annotated[tuple[Rule, ...], BeforeValidator(sequence)] = Field(
        default=(), alias="syscalls"
    )
    architectures: Architectures = ()
    arch_map: ArchMap = Field(default=(), alias="archMap")
    flags: Flags = ()

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: object) -> object:
        data = merge_errno(data, "defaultErrnoRet", "defaultErrno")
        if not isinstance(data, dict):
            return data
        rest: dict[str, Any] = dict(data)
        for key in ("listenerPath", "listenerMetadata"):
            if rest.pop(key, None):
                raise ValueError(f"{key} is not supported: the listener is isojob's own")
        return rest

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        check_action(self.default_action)
        if self.default_errno is not None and self.default_action != "SCMP_ACT_ERRNO":
            raise ValueError(f"defaultErrnoRet has no meaning with {self.default_action}")
        if self.architectures and self.arch_map:
            raise ValueError("use either architectures or archMap")
        return self

    @classmethod
    def default(cls) -> SeccompProfile:
        """For any program that is no system software: what a `Sandbox` has if not told otherwise.

        CPython, gcc, Node, Java, Go and Rust programs run under it. docs/seccomp.md compares it
        with Docker's.
        """
        return shipped("default")

    @classmethod
    def compute(cls) -> SeccompProfile:
        """For programs that only compute: no sockets, no System V IPC.

        Calls that only an attack makes end the job, with the status ``seccomp_violation``.
        """
        return shipped("compute")

    @classmethod
    def unconfined(cls) -> SeccompProfile:
        """Everything the kernel gives a process without privileges.

        What stays is the protection of isojob's own init, process 1 of the sandbox. Namespaces,
        the cgroup and the dropped privileges are not touched by this.
        """
        return cls.model_validate({"name": UNCONFINED, "defaultAction": "SCMP_ACT_ALLOW"})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SeccompProfile:
        """Reads a profile from a JSON file in the OCI's, Docker's or Podman's format.

        An OCI ``config.json`` may be given whole; ``linux.seccomp`` is taken out of it.

        Args:
            path: The file; its name becomes the profile's.

        Raises:
            ProfileError: The file is no profile, or asks for what cannot be done. The message
                names the profile, the rule by its place (from 0) and its system calls.
            OSError: The file cannot be read.
        """
        file = Path(path)
        with file.open("rb") as stream:
            data = stream.read(MAX_SIZE + 1)
        return _parse(file.name, data)

    def compile(
        self, arch: str | None = None, kernel: tuple[int, int] | None = None
    ) -> CompiledProfile:
        """Makes the filter. Compiled once per process, then answered from memory.

        Args:
            arch: The machine, as ``uname -m`` names it; this one by default.
            kernel: Its kernel's major and minor version, for rules that depend on it; the running
                one by default.

        Raises:
            ProfileError: A rule cannot be enforced: it denies a call nobody knows, compares a
                32-bit argument with a larger number, or the filter grows over the kernel's 4096
                instructions; or no rule allows execve(2), so that nothing could ever start.
            HostNotSupportedError: libseccomp is missing, or `arch` is not supported.
        """
        return compile_profile(self, arch, kernel)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        # JSON readers take the last one; whoever wrote the first thinks it holds.
        raise ValueError(f"{twice!r} is given twice")
    return result


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _parse(name: str, data: bytes) -> SeccompProfile:
    where = f"seccomp profile {name!r}"
    if len(data) > MAX_SIZE:
        raise ProfileError(f"{where}: longer than {MAX_SIZE} bytes")
    try:
        document = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where}: cannot be read as JSON: {error}") from error
    if isinstance(document, dict) and isinstance(document.get("linux"), dict):
        document = document["linux"].get("seccomp")
    if not isinstance(document, dict):
        raise ProfileError(f"{where}: neither a seccomp profile nor an OCI configuration with one")
    if "name" in document:
        raise ProfileError(f"{where}: name: not known; the file's own name is used")
    try:
        return SeccompProfile.model_validate({**document, "name": name})
    except ValidationError as error:
        raise ProfileError(f"{where}: {_explain(error, document)}") from error


def _explain(error: ValidationError, document: dict[str, Any]) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if len(place) >= 2 and place[0] == "syscalls" and place[1].isdecimal():
        rule = cast("list[Any]", document["syscalls"])[int(place[1])]
        names = (rule.get("names") or rule.get("name")) if isinstance(rule, dict) else None
        place[:2] = [f"rule {place[1]} ({shown(names)})"]
    return ": ".join(filter(None, [place[0] if place else "", ".".join(place[1:]), message]))


def shipped_text(name: str) -> bytes:
    """The JSON of a profile that comes with isojob.

    Args:
        name: ``default`` or ``compute``.
    """
    package = files("isojob")
    for folder in (package, Path(str(package)).parent):
        file = folder / "seccomp_profiles" / f"{name}.json"
        if file.is_file():
            return file.read_bytes()
    raise FileNotFoundError(f"isojob is installed without its seccomp profile {name}.json")


@cache
def shipped(name: str) -> SeccompProfile:
    """A profile of isojob's own, by its name."""
    return _parse(name, shipped_text(name))
