"""Profiles compiled by libseccomp alone: a second opinion on the filters that isojob writes."""

from __future__ import annotations

import os
from itertools import combinations
from typing import TYPE_CHECKING

from isojob.errors import ProfileError
from isojob.seccomp._answers import ENOSYS, USER_NOTIF
from isojob.seccomp._architectures import architecture
from isojob.seccomp._compile import running_kernel
from isojob.seccomp._names import library
from isojob.seccomp._policy import build_policy

if TYPE_CHECKING:
    from isojob.seccomp._answers import Answer
    from isojob.seccomp._profile import SeccompProfile

__all__ = ["libseccomp_filter"]

_SCMP_OPS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
_SCMP_KILL_PROCESS = 0x80000000
_SCMP_ATTR_BADARCH = 2


def libseccomp_filter(
    profile: SeccompProfile, arch: str | None = None, kernel: tuple[int, int] | None = None
) -> bytes:
    """The same profile, compiled by libseccomp alone: to compare with, not to load.

    It differs from `SeccompProfile.compile` where libseccomp can do no other: arguments are
    compared at 64 bits, what ends the job is SECCOMP_RET_KILL_PROCESS, isojob's guards are absent,
    and numbers above those that the profile names get the default action.

    Args:
        profile: The profile.
        arch: As in `SeccompProfile.compile`.
        kernel: As in `SeccompProfile.compile`.

    Raises:
        ProfileError: libseccomp cannot express it: one rule compares an argument twice, or rules
            with different answers may match one call.
        HostNotSupportedError: libseccomp is missing.
    """
    machine = architecture(arch)
    policy = build_policy(
        profile, machine, running_kernel() if kernel is None else kernel, guards="none"
    )
    ffi, lib, _ = library()
    where = f"seccomp profile {profile.name!r}: libseccomp"

    def check(result: int, what: str) -> None:
        if result < 0:
            raise ProfileError(f"{where}: {what}: {os.strerror(-result)}")

    context = lib.seccomp_init(_scmp(policy.default))
    try:
        if lib.seccomp_arch_native() != machine.audit:
            check(lib.seccomp_arch_add(context, machine.audit), "add architecture")
            check(lib.seccomp_arch_remove(context, lib.seccomp_arch_native()), "architecture")
        check(lib.seccomp_attr_set(context, _SCMP_ATTR_BADARCH, ENOSYS), "attribute")
        for nr in policy.numbers():
            answers = policy.answers(nr)
            unnamed = policy.background(nr)
            if not _disjoint([a for a in answers if a.conditions or a.value != unnamed]):
                raise ProfileError(f"{where}: call {nr}: rules with different answers overlap")
            for answer in answers:
                # libseccomp refuses a rule that says the same as the default.
                if answer.value == policy.default:
                    continue
                args = [
                    (c.index, _SCMP_OPS.index(c.op) + 1, c.value, c.second)
                    for c in answer.conditions
                ]
                array = ffi.new("struct scmp_arg_cmp[]", args)
                value = _scmp(answer.value)
                check(
                    lib.seccomp_rule_add_array(context, value, nr, len(args), array), f"call {nr}"
                )
        file = os.memfd_create("seccomp")
        try:
            check(lib.seccomp_export_bpf(context, file), "export")
            return os.pread(file, os.fstat(file).st_size, 0)
        finally:
            os.close(file)
    finally:
        lib.seccomp_release(context)


def _disjoint(answers: list[Answer]) -> bool:
    return all(
        one.value == other.value or _contradict(one, other)
        for one, other in combinations(answers, 2)
    )


def _contradict(one: Answer, other: Answer) -> bool:
    return any(
        a.index == b.index and (a.value == b.value) == ({a.op, b.op} == {"EQ", "NE"})
        for a in one.conditions
        for b in other.conditions
        if {a.op, b.op} <= {"EQ", "NE"} and (a.op, b.op) != ("NE", "NE")
    )


def _scmp(value: int) -> int:
    # Of the values used here, libseccomp's actions differ from the kernel's in none; but it takes
    # no notification as default.
    return _SCMP_KILL_PROCESS if value == USER_NOTIF else value
