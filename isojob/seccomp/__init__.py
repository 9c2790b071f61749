"""Which system calls a job may make: seccomp profiles, and the filters compiled from them."""

from __future__ import annotations

from isojob.seccomp._compile import SETUP_SYSCALLS, CompiledProfile
from isojob.seccomp._names import syscall_name
from isojob.seccomp._profile import SeccompProfile
from isojob.seccomp._second_opinion import libseccomp_filter

__all__ = [
    "SETUP_SYSCALLS",
    "CompiledProfile",
    "SeccompProfile",
    "libseccomp_filter",
    "syscall_name",
]
