"""From the flags' texts to isojob's models; nothing here knows how flags are read or shown."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from isojob.limits import Limits
from isojob.mounts import Mount, Root
from isojob.sandbox import MAX_ID, Sandbox
from isojob.seccomp import SeccompProfile

__all__ = [
    "LIMIT_FLAGS",
    "OptionError",
    "environment",
    "files",
    "make_limits",
    "make_sandbox",
    "mount",
    "profile",
    "tmpfs",
    "user",
    "volume",
]

LIMIT_FLAGS = {
    "memory": "--memory",
    "cpus": "--cpus",
    "cpuset": "--cpuset-cpus",
    "processes": "--pids-limit",
    "cpu_time": "--cpu-time",
    "wall_time": "--wall-time",
    "output": "--output-limit",
    "collect": "--collect-limit",
    "disk": "--disk",
    "io_read_bps": "--device-read-bps",
    "io_write_bps": "--device-write-bps",
    "io_read_iops": "--device-read-iops",
    "io_write_iops": "--device-write-iops",
}
"""Fields of `Limits` that have a flag of their own."""

_ULIMITS = {
    "nofile": "open_files",
    "fsize": "file_size",
    "stack": "stack",
    "core": "core",
    "as": "address_space",
}
_ELSEWHERE = {"nproc": "--pids-limit", "cpu": "--cpu-time", "rss": "--memory", "data": "--memory"}
_NUMBER = re.compile(r"(?=\.?[0-9])[0-9]{0,18}(\.[0-9]{1,9})?")
_UNLIMITED = "none"
DEFAULT_TMPFS = "64MiB"
_TRUE, _FALSE = ("1", "true"), ("0", "false")


class OptionError(ValueError):
    """A flag has a value that makes no sense.

    Args:
        flag: The flag, with its dashes.
        message: What is wrong.
    """

    def __init__(self, flag: str, message: str) -> None:
        super().__init__(f"{flag}: {message}")


def _messages(error: ValidationError) -> list[tuple[str, str]]:
    """The field and the message of each mistake that pydantic found."""
    return [
        (str(item["loc"][0]) if item["loc"] else "", item["msg"].removeprefix("Value error, "))
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]


def _value(text: str) -> int | float | str | None:
    """A number is one; "none" is no limit; what a text with a unit means, the model knows."""
    if text == _UNLIMITED:
        return None
    if _NUMBER.fullmatch(text) is None:
        return text
    return float(text) if "." in text else int(text)


def _ulimit(text: str) -> tuple[str, int | None]:
    name, equals, value = text.partition("=")
    if name in _ELSEWHERE:
        raise OptionError("--ulimit", f"{name}: use {_ELSEWHERE[name]}, which counts the whole job")
    if name not in _ULIMITS or not equals:
        raise OptionError("--ulimit", f"{text!r}: give NAME=NUMBER, of {', '.join(_ULIMITS)}")
    soft, _, hard = value.partition(":")
    if hard not in ("", soft):
        raise OptionError("--ulimit", f"{text!r}: soft and hard limit are the same here, give one")
    if soft == "-1":
        return _ULIMITS[name], None
    if not soft.isdecimal():
        raise OptionError("--ulimit", f"{text!r}: {soft!r} is no number (-1 is unlimited)")
    return _ULIMITS[name], int(soft)


def make_limits(flags: Mapping[str, str | None], ulimits: Sequence[str] = ()) -> Limits:
    """Reads the limits.

    Args:
        flags: Fields of `Limits` to the texts given; None: not given.
        ulimits: ``NAME=NUMBER`` of getrlimit(2), in the kernel's units.

    Raises:
        OptionError: Names the flag.
    """
    fields: dict[str, Any] = {}
    for name, text in flags.items():
        if text is None:
            continue
        if name.startswith("io_") and ":" in text:
            rate = text.rpartition(":")[2]
            raise OptionError(
                LIMIT_FLAGS[name],
                f"give the rate alone ({rate}): it holds for the disks behind the directories "
                "that the job sees",
            )
        if text.startswith("-") and _NUMBER.fullmatch(text[1:]):
            raise OptionError(LIMIT_FLAGS[name], f"{text!r}: give none for no limit")
        # One processor is a list of processors, and no number.
        fields[name] = text if name == "cpuset" and text != _UNLIMITED else _value(text)
    fields.update(_ulimit(text) for text in ulimits)
    try:
        return Limits(**fields)
    except ValidationError as error:
        name, message = _messages(error)[0]
        raise OptionError(LIMIT_FLAGS.get(name, f"--ulimit ({name})"), message) from error


def _host_path(flag: str, text: str) -> str:
    # Docker takes a bare word for the name of a volume; nothing here has such names.
    if not text.startswith(("/", "./", "../")) and text not in (".", ".."):
        raise OptionError(flag, f"{text!r}: give a path of the host, such as ./{text}")
    try:
        os.stat(text)  # the sandbox looks, too, but knows no flag
    except OSError as error:
        raise OptionError(flag, f"{text!r}: {error.strerror}") from error
    return os.path.abspath(text)


def volume(text: str) -> Mount:
    """``SRC:DST[:ro|rw]``; read-only unless it says ``rw``.

    Raises:
        OptionError: It does not read like that, or the paths are refused.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise OptionError("--volume", f"{text!r}: give SRC:DST, SRC:DST:ro or SRC:DST:rw")
    if len(parts) == 3 and parts[2] not in ("ro", "rw"):
        raise OptionError("--volume", f"{text!r}: {parts[2]!r} is neither ro nor rw")
    return _bind("--volume", parts[0], parts[1], read_only=parts[-1] != "rw" or len(parts) == 2)


def _bind(flag: str, source: str, target: str, *, read_only: bool) -> Mount:
    try:
        return Mount.bind(_host_path(flag, source), target, read_only=read_only)
    except ValidationError as error:
        raise OptionError(flag, _messages(error)[0][1]) from error


def tmpfs(text: str) -> Mount:
    """``PATH[:size=64MiB]``.

    Raises:
        OptionError: It does not read like that.
    """
    target, colon, options = text.partition(":")
    size = DEFAULT_TMPFS
    for option in options.split(",") if colon else ():
        name, _, value = option.partition("=")
        if name != "size":
            raise OptionError("--tmpfs", f"{text!r}: the only option is size=, such as size=64MiB")
        size = value
    return _tmpfs("--tmpfs", target, size)


def _tmpfs(flag: str, target: str, size: str) -> Mount:
    try:
        return Mount.tmpfs(target, size=int(size) if size.isdecimal() else size)
    except ValidationError as error:
        raise OptionError(flag, _messages(error)[0][1]) from error


_MOUNT_KEYS = {
    "src": "source",
    "dst": "target",
    "destination": "target",
    "ro": "readonly",
    "size": "tmpfs-size",
}


def mount(text: str) -> Mount:
    """``type=bind,source=,target=[,readonly=false]`` or ``type=tmpfs,target=[,tmpfs-size=]``.

    A bind is read-only unless it says ``readonly=false``. Fields are read as CSV, as Docker does.

    Raises:
        OptionError: It does not read like that.
    """
    fields: dict[str, str] = {}
    try:
        read = next(csv.reader([text]), [])
    except csv.Error as error:
        raise OptionError("--mount", f"{text!r}: {error}") from error
    for field in read:
        name, equals, value = field.partition("=")
        name = _MOUNT_KEYS.get(name, name)
        if name in fields:
            raise OptionError("--mount", f"{text!r}: {name} is given twice")
        fields[name] = value if equals else "true"
    kind = fields.pop("type", "")
    known = {"bind": {"source", "target", "readonly"}, "tmpfs": {"target", "tmpfs-size"}}
    if kind not in known:
        raise OptionError("--mount", f"{text!r}: give type=bind or type=tmpfs")
    if unknown := fields.keys() - known[kind]:
        raise OptionError("--mount", f"{text!r}: {kind} has no {', '.join(sorted(unknown))}")
    if missing := known[kind] - fields.keys() - {"readonly", "tmpfs-size"}:
        raise OptionError("--mount", f"{text!r}: {', '.join(sorted(missing))} is missing")
    if kind == "tmpfs":
        return _tmpfs("--mount", fields["target"], fields.get("tmpfs-size", DEFAULT_TMPFS))
    read_only = fields.get("readonly", "true")
    if read_only not in (*_TRUE, *_FALSE):
        raise OptionError("--mount", f"{text!r}: readonly is true or false")
    return _bind("--mount", fields["source"], fields["target"], read_only=read_only in _TRUE)


def user(text: str) -> tuple[int, int]:
    """``UID[:GID]``; the gid is the uid's number unless given.

    Raises:
        OptionError: Not numbers: the sandbox has no accounts of the host.
    """
    uid, colon, gid = text.partition(":")
    if not uid.isdecimal() or (colon and not gid.isdecimal()):
        raise OptionError("--user", f"{text!r}: give numbers, UID or UID:GID")
    ids = int(uid), int(gid or uid)
    if 0 in ids:
        raise OptionError("--user", f"{text!r}: no job is root: give 1 to {MAX_ID}")
    return ids


def profile(options: Sequence[str]) -> SeccompProfile:
    """The seccomp profile out of ``--security-opt``; the last one counts.

    Raises:
        OptionError: Another option, or a file that cannot be read.
        ProfileError: The file is no profile.
    """
    chosen = SeccompProfile.default()
    for option in options:
        name, _, value = option.replace(":", "=", 1).partition("=")
        if name == "no-new-privileges" and value in ("", "true"):
            continue  # every job has it
        if name != "seccomp" or not value:
            raise OptionError(
                "--security-opt", f"{option!r}: give seccomp=FILE|default|compute|unconfined"
            )
        chosen = load_profile("--security-opt", option[len("seccomp=") :])
    return chosen


def load_profile(flag: str, name: str) -> SeccompProfile:
    """A profile by its name, or from a file (``./default`` is a file).

    Raises:
        OptionError: The file cannot be read.
        ProfileError: It is no profile.
    """
    shipped = {
        "default": SeccompProfile.default,
        "compute": SeccompProfile.compute,
        "unconfined": SeccompProfile.unconfined,
    }
    if name in shipped:
        return shipped[name]()
    try:
        return SeccompProfile.load(name)
    except OSError as error:
        raise OptionError(flag, f"{name!r}: {error.strerror}") from error


def environment(variables: Sequence[str], env_files: Sequence[Path]) -> dict[str, str]:
    """Variables of ``--env-file`` and over them those of ``--env``.

    A name alone passes our own variable on, if we have it; nothing else of our environment.

    Raises:
        OptionError: A line without a name, or a file that cannot be read.
    """
    result: dict[str, str] = {}
    for path in env_files:
        try:
            # Not splitlines(): a form feed ends no line, and what follows it names no variable.
            lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        except OSError as error:
            raise OptionError("--env-file", f"{str(path)!r}: {error.strerror}") from error
        stripped = (line.lstrip().removesuffix("\r") for line in lines)
        _set(result, "--env-file", (line for line in stripped if line and line[0] != "#"))
    _set(result, "--env", variables)
    return result


def _set(result: dict[str, str], flag: str, texts: Iterable[str]) -> None:
    for text in texts:
        name, equals, value = text.partition("=")
        if not name:
            raise OptionError(flag, f"{text!r}: give NAME=VALUE, or NAME to pass our own on")
        if equals:
            result[name] = value
        elif name in os.environ:
            result[name] = os.environ[name]


def files(texts: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH``: files of the host, copied into the working directory.

    Raises:
        OptionError: It does not read like that, or there is no such file.
    """
    result: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise OptionError("--file", f"{text!r}: give NAME=PATH")
        if name in result:
            raise OptionError("--file", f"{name!r} is given twice")
        if not Path(path).is_file():
            raise OptionError("--file", f"{path!r} is not a file that can be read")
        result[name] = Path(path)
    return result


_SANDBOX_FLAGS = {
    "workdir": "--workdir",
    "hostname": "--hostname",
    "uid": "--user",
    "gid": "--user",
    "env": "--env",
    "mounts": "--volume, --mount, --tmpfs",
    "root": "--rootfs",
    "allow_missing": "--allow-missing",
}


def make_sandbox(
    *,
    rootfs: str | None = None,
    root: Root | None = None,
    mounts: Sequence[Mount] = (),
    seccomp: SeccompProfile | None = None,
    identity: str | None = None,
    allow_missing: Sequence[str] = (),
    **texts: str | None,
) -> Sandbox:
    """Reads what the job sees.

    Args:
        rootfs: A directory of the host to use as root, with ``:O`` behind it if the job may write
            to a view of its own; None: `root`, or else the host's toolchain.
        root: The root of an image.
        mounts: In this order.
        seccomp: The profile.
        identity: The text of ``--user``.
        allow_missing: Names of protections.
        **texts: Other fields of `Sandbox` as given; None: not given.

    Raises:
        OptionError: Names the flag.
    """
    fields: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
    if root is not None:
        fields["root"] = root
    if identity is not None:
        fields["uid"], fields["gid"] = user(identity)
    if seccomp is not None:
        fields["seccomp"] = seccomp
    try:
        if rootfs is not None:
            path = rootfs.removesuffix(":O")
            fields["root"] = Root.directory(_host_path("--rootfs", path), writable=path != rootfs)
        return Sandbox(mounts=tuple(mounts), allow_missing=frozenset(allow_missing), **fields)
    except ValidationError as error:
        name, message = _messages(error)[0]
        # An error of Root itself is about its path.
        flag = _SANDBOX_FLAGS.get(name, "--rootfs" if name == "path" else "--volume")
        raise OptionError(flag, message) from error
