"""Runs filters and reads profiles without the compiler, to check what the compiler made.

Two ways to the same answer. `run` interprets a filter, whoever compiled it, as the kernel does.
`Reference` reads the JSON of a profile call by call, in the plainest way that the formats' texts
allow: no numbers sorted, no ranges merged, nothing shared with the compiler but the names of the
numbers and, unless another is given, the table of argument widths. Tests compare the two, with a
table of their own; so can anybody who wants to know what a profile does.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from isojob.seccomp._arguments import argument_bits
from isojob.seccomp._names import syscall_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Call", "Reference", "check", "describe", "run"]

KILL_PROCESS = 0x80000000
KILL_THREAD = 0
TRAP = 0x00030000
ERRNO = 0x00050000
USER_NOTIF = 0x7FC00000
TRACE = 0x7FF00000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000

X86_64 = 0xC000003E
AARCH64 = 0xC00000B7
I386 = 0x40000003
ARM = 0x40000028

_INSTRUCTION = struct.Struct("=HBBI")
_WORD = 0xFFFFFFFF
_SCANNED = 1024


class Call(NamedTuple):
    """One system call, as a filter sees it.

    Attributes:
        nr: Its number, 0 to 2**32 - 1.
        args: Its six arguments, each 0 to 2**64 - 1.
        arch: AUDIT_ARCH constant of the ABI it was made under.
    """

    nr: int
    args: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    arch: int = X86_64

    def pack(self) -> bytes:
        """``struct seccomp_data`` of a little-endian machine (linux/seccomp.h)."""
        return struct.pack("<IIQ6Q", self.nr, self.arch, 0, *self.args)


def _decode(bpf: bytes) -> list[tuple[int, int, int, int]]:
    if not bpf or len(bpf) % _INSTRUCTION.size:
        raise ValueError("a filter is a positive number of instructions of 8 bytes each")
    return list(_INSTRUCTION.iter_unpack(bpf))


def check(bpf: bytes) -> int:
    """Checks a filter as the kernel does before it loads one (bpf_check_classic, seccomp).

    Args:
        bpf: ``struct sock_filter[]`` in native byte order.

    Returns:
        The number of its instructions.

    Raises:
        ValueError: The kernel would refuse it, or it uses what `run` does not know.
    """
    code = _decode(bpf)
    if len(code) > 4096:
        raise ValueError(f"{len(code)} instructions; the kernel takes 4096")
    for at, (opcode, yes, no, k) in enumerate(code):
        left = len(code) - at - 1
        if opcode == 0x20:
            if k % 4 or k >= 64:
                raise ValueError(f"instruction {at}: load from {k}")
        elif opcode == 0x05:
            if k >= left:
                raise ValueError(f"instruction {at}: jump out of the program")
        elif opcode in (0x15, 0x25, 0x35, 0x45):
            if max(yes, no) >= left:
                raise ValueError(f"instruction {at}: jump out of the program")
        elif opcode not in (0x06, 0x54):
            raise ValueError(f"instruction {at}: opcode {opcode:#x} is not known")
    if code[-1][0] != 0x06:
        raise ValueError("the last instruction is no return")
    return len(code)


def run(bpf: bytes, call: Call) -> int:
    """Interprets a filter.

    Args:
        bpf: ``struct sock_filter[]`` in native byte order; see `check`.
        call: The system call.

    Returns:
        The SECCOMP_RET value; `describe` makes text of it.

    Raises:
        ValueError: An instruction is not known.
    """
    code, data, accumulator, at = _decode(bpf), call.pack(), 0, 0
    while True:
        opcode, yes, no, k = code[at]
        at += 1
        match opcode:
            case 0x20:
                accumulator = int.from_bytes(data[k : k + 4], "little")
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x15:
                at += yes if accumulator == k else no
            case 0x25:
                at += yes if accumulator > k else no
            case 0x35:
                at += yes if accumulator >= k else no
            case 0x45:
                at += yes if accumulator & k else no
            case 0x06:
                return k
            case _:
                raise ValueError(f"instruction {at - 1}: opcode {opcode:#x} is not known")


def describe(value: int) -> str:
    """What a SECCOMP_RET value does, in a word or two, such as ``errno EPERM``."""
    if value & 0xFFFF0000 == ERRNO:
        number = value & 0xFFFF
        return f"errno {errno.errorcode.get(number, number)}"
    names = {
        ALLOW: "allow",
        LOG: "allow and log",
        USER_NOTIF: "kill",
        KILL_PROCESS: "kill",
        KILL_THREAD: "kill thread",
    }
    return names.get(value, f"{value:#x}")


def _socket(words: list[int]) -> int | None:
    family, kind, protocol = words[0], words[1] & 15, words[2]
    if family == 1:
        return None
    if family not in (2, 10):
        return errno.EAFNOSUPPORT
    if kind == 3:
        return errno.EPERM
    if protocol not in (0, 6, 17) or (kind, protocol) in ((1, 17), (2, 6)):
        return errno.EPROTONOSUPPORT
    return None if kind in (1, 2) else errno.ESOCKTNOSUPPORT


def _option(words: list[int]) -> int | None:
    refused = [(1, 15), (1, 26), (1, 51), (1, 73), (6, 14), (6, 32), (6, 38), (6, 40)]
    refused += [(0, 35), (0, 39), (0, 42), (0, 46)]
    refused += [(41, 6), (41, 20), (41, 27), (41, 32), (41, 42), (41, 46), (41, 57)]
    return errno.ENOPROTOOPT if (words[1], words[2]) in refused else None


_REQUESTS = (
    *(0x5412, 0x541C, 0x5423, 0x8940, 0x8941, 0x8982, 0x8983),
    *(0x89A0, 0x89A1, 0x89A2, 0x89A3),
    *(0x9408, 0x80089418, 0xC0506617, 0xC0406618, 0xC0406619),
)
_GUARDED: dict[str, Callable[[list[int]], int | None]] = {
    "prlimit64": lambda words: errno.EPERM if words[0] == 1 else None,
    "socket": _socket,
    "socketpair": lambda words: None if words[0] == 1 else errno.EAFNOSUPPORT,
    "ioctl": lambda words: errno.EPERM if words[1] in _REQUESTS else None,
    "setsockopt": _option,
    "quotactl": lambda words: errno.EPERM if words[0] >> 8 == 0x800001 else None,
    "quotactl_fd": lambda words: errno.EPERM if words[1] >> 8 == 0x800001 else None,
    "fcntl": lambda words: errno.EINVAL if words[1] in (1024, 1026, 1040) else None,
    "pipe2": lambda words: errno.ENOPKG if words[1] & 0o200 else None,
    "prctl": lambda words: errno.EINVAL if words[0] in (62, 67, 0x53564D41) else None,
    "madvise": lambda words: errno.EINVAL if words[2] == 12 else None,
    "process_madvise": lambda words: errno.EINVAL if words[3] == 12 else None,
    "mmap": lambda words: errno.ENOMEM if words[3] & 0x40000 else None,
    "memfd_create": lambda words: errno.ENOMEM if words[1] & 4 else None,
    "shmget": lambda words: errno.ENOMEM if words[2] & 0o4000 else None,
}
_CLOSED = {
    **dict.fromkeys(("setxattr", "lsetxattr", "fsetxattr", "setxattrat"), errno.EOPNOTSUPP),
    **dict.fromkeys(("mbind", "io_uring_setup", "fanotify_init"), errno.ENOSYS),
    **dict.fromkeys(("inotify_init", "inotify_init1"), errno.ENOSYS),
    **dict.fromkeys(("sync", "syncfs"), 0),
}
GUARDS = (*_GUARDED, *_CLOSED)


class Reference:
    """The plain reading of a profile's JSON on x86_64 or aarch64.

    Args:
        document: The JSON object, of a valid profile.
        arch: AUDIT_ARCH constant of the machine.
        kernel: Its kernel's version, for ``minKernel``; the running one's by default.
        guards: Names of the calls for which isojob's own guards hold.
        bits: How many low bits the kernel reads of an argument, by the call's name and its
            position; by default what the compiler believes, too.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        *,
        arch: int = X86_64,
        kernel: tuple[int, int] | None = None,
        guards: tuple[str, ...] = GUARDS,
        bits: Callable[[str, int], int] = argument_bits,
    ) -> None:
        self.arch = arch
        self.bits = bits
        self.guards = guards
        self.kernel = kernel or _version(os.uname().release)
        self.default = _action(
            document["defaultAction"],
            document.get("defaultErrnoRet"),
            document.get("defaultErrno"),
        )
        self.names = {nr: syscall_name(arch, nr) for nr in range(_SCANNED)}
        self.rules = [rule for rule in document.get("syscalls") or () if self._in_force(rule)]
        named = {name for rule in self.rules for name in _names(rule)}
        self.highest = max((nr for nr, name in self.names.items() if name in named), default=-1)

    def answer(self, call: Call) -> int:
        """What a filter made from the profile is to return for a call."""
        if call.arch != self.arch or (self.arch == X86_64 and call.nr & 0x40000000):
            return ERRNO | errno.ENOSYS
        if self.arch == X86_64 and call.nr >= 0x40000000:
            return ERRNO | errno.ENOSYS
        name = self.names.get(call.nr, "")
        hits = [
            _action(rule["action"], rule.get("errnoRet"), rule.get("errno"))
            for rule in self.rules
            if name in _names(rule) and all(self._holds(name, arg, call) for arg in _args(rule))
        ]
        if USER_NOTIF in hits:
            return USER_NOTIF
        said = self._said(name, call, hits)
        guard = self._guard(name, call)
        if guard is not None and said != USER_NOTIF and (guard or said in (ALLOW, LOG)):
            return ERRNO | guard
        return said

    def _said(self, name: str, call: Call, hits: list[int]) -> int:
        """The same without isojob's guards."""
        if name == "clone3" and not (self._free("clone3") and self._free("clone")):
            return ERRNO | errno.ENOSYS
        for kind in (ERRNO, LOG, ALLOW):
            for hit in hits:
                if hit & 0xFFFF0000 == kind:
                    return hit
        if self.default not in (ALLOW, LOG) and call.nr > self.highest:
            return ERRNO | errno.ENOSYS
        return self.default

    def constants(self, name: str) -> Iterator[tuple[int, int]]:
        """The numbers with which a profile compares a call's arguments, with their positions."""
        for rule in self.rules:
            if name in _names(rule):
                for arg in _args(rule):
                    yield arg["index"], arg["value"]
                    yield arg["index"], arg.get("valueTwo") or 0

    def _in_force(self, rule: Mapping[str, Any]) -> bool:
        go_name = {X86_64: ("amd64", "x86_64"), AARCH64: ("arm64", "aarch64")}[self.arch]
        only, never = rule.get("includes") or {}, rule.get("excludes") or {}
        if only.get("caps"):
            return False
        if only.get("arches") and not any(arch in go_name for arch in only["arches"]):
            return False
        if only.get("minKernel") and self.kernel < _version(only["minKernel"]):
            return False
        if any(arch in go_name for arch in never.get("arches") or ()):
            return False
        return not (never.get("minKernel") and self.kernel >= _version(never["minKernel"]))

    def _holds(self, name: str, arg: Mapping[str, Any], call: Call) -> bool:
        width: int = 1 << self.bits(name, arg["index"])
        index, value, second = int(arg["index"]), int(arg["value"]), int(arg.get("valueTwo") or 0)
        given, value = call.args[index] % width, value % width
        match arg["op"]:
            case "SCMP_CMP_EQ":
                return given == value
            case "SCMP_CMP_NE":
                return given != value
            case "SCMP_CMP_LT":
                return given < value
            case "SCMP_CMP_LE":
                return given <= value
            case "SCMP_CMP_GT":
                return given > value
            case "SCMP_CMP_GE":
                return given >= value
            case "SCMP_CMP_MASKED_EQ":
                return (given & value) == (second & value) % width
        raise ValueError(f"{arg['op']} is no comparison")

    def _guard(self, name: str, call: Call) -> int | None:
        """The errno of isojob's own refusal; None: it has none."""
        if name not in self.guards:
            return None
        if name in _CLOSED:
            return _CLOSED[name]
        return _GUARDED[name]([argument & _WORD for argument in call.args])

    def _free(self, name: str) -> bool:
        """Whether nothing but allowing is said about a call, and that without conditions."""
        about = [rule for rule in self.rules if name in _names(rule)]
        allowing = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG")
        if any(rule["action"] not in allowing for rule in about):
            return False
        return self.default in (ALLOW, LOG) or any(not _args(rule) for rule in about)


def _names(rule: Mapping[str, Any]) -> list[str]:
    return rule.get("names") or [rule["name"]]


def _args(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return rule.get("args") or []


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdecimal()))


def _action(name: str, number: int | None, error: str | None) -> int:
    if name == "SCMP_ACT_ERRNO":
        if error:
            number = getattr(errno, error)
        return ERRNO | (errno.EPERM if number is None else number)
    return {"SCMP_ACT_ALLOW": ALLOW, "SCMP_ACT_LOG": LOG}.get(name, USER_NOTIF)
