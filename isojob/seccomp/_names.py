"""System call names and numbers: libseccomp's tables, and ours for what is newer than they are."""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any

from isojob.errors import HostNotSupportedError
from isojob.seccomp._architectures import X32_BIT

if TYPE_CHECKING:
    from isojob.seccomp._architectures import Architecture

__all__ = ["Unnumbered", "library", "number", "syscall_name"]

_SONAME = "libseccomp.so.2"

# scripts/syscall.tbl and arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.19. From 424 on a call
# has one number on every architecture, so a libseccomp older than the call does not matter.
_SINCE_424 = """
424 pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen
431 fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2
440 process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset
445 landlock_add_rule landlock_restrict_self memfd_secret process_mrelease futex_waitv
450 set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
456 futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal
463 setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr listns
"""
_X86_64_ONLY = {"uretprobe": 335, "uprobe": 336}
# Calls of other architectures that libseccomp came to know late: no misspellings.
_ELSEWHERE = frozenset({"riscv_flush_icache", "riscv_hwprobe", "uretprobe", "uprobe"})

_X86_64 = 0xC000003E
_X32 = 0x4000003E


class Unnumbered(Enum):
    """Why a name has no number: it belongs to other architectures, or nobody knows it."""

    ELSEWHERE = "elsewhere"
    UNKNOWN = "unknown"


@cache
def _newer() -> dict[str, int]:
    table: dict[str, int] = {}
    for line in _SINCE_424.strip().splitlines():
        first, *names = line.split()
        table.update((name, int(first) + offset) for offset, name in enumerate(names))
    return table


@cache
def library() -> tuple[Any, Any, Any]:
    """Loads libseccomp: cffi's ffi, the library, and the C library to free what it returns.

    Raises:
        HostNotSupportedError: It is not installed.
    """
    # Only here, so that profiles can be written and checked where no libseccomp can exist.
    from isojob.seccomp._libseccomp import ffi

    try:
        return ffi, ffi.dlopen(_SONAME), ffi.dlopen(None)
    except OSError as error:
        raise HostNotSupportedError(
            f"libseccomp ({_SONAME} could not be loaded)",
            "install it on a Linux host: libseccomp2 (Debian, Ubuntu), "
            "libseccomp (Fedora, Alpine, Arch)",
        ) from error


@cache
def number(name: str, arch: Architecture) -> int | Unnumbered:
    """The number of a system call.

    Args:
        name: The call, as the kernel's tables and profiles name it.
        arch: Where.

    Raises:
        HostNotSupportedError: libseccomp is not installed.
    """
    _, lib, _ = library()
    # libseccomp(3): negative numbers stand for calls of other architectures, -1 for no call.
    found = int(lib.seccomp_syscall_resolve_name_arch(arch.audit, name.encode()))
    if found >= 0:
        return found
    own = _newer().get(name)
    if own is None and arch.audit == _X86_64:
        own = _X86_64_ONLY.get(name)
    if own is not None:
        return own
    return Unnumbered.ELSEWHERE if found < -1 or name in _ELSEWHERE else Unnumbered.UNKNOWN


def syscall_name(arch_audit: int, nr: int) -> str:
    """The name of a system call, to tell people about it.

    Args:
        arch_audit: ``seccomp_data.arch``, an AUDIT_ARCH constant of linux/audit.h.
        nr: ``seccomp_data.nr``.

    Returns:
        The name; ``syscall_NUMBER`` where none is known or libseccomp is missing. Never raises.
    """
    if arch_audit == _X86_64 and nr & X32_BIT:
        arch_audit = _X32
    try:
        ffi, lib, libc = library()
    except HostNotSupportedError:
        text = None
    else:
        found = lib.seccomp_syscall_resolve_num_arch(arch_audit & 0xFFFFFFFF, _signed(nr))
        text = ffi.string(found).decode() if found != ffi.NULL else None
        libc.free(found)
    if text is None:
        tables = [_newer(), _X86_64_ONLY if arch_audit == _X86_64 else {}]
        text = next((name for t in tables for name, own in t.items() if own == nr), None)
    return text if text is not None else f"syscall_{nr}"


def _signed(nr: int) -> int:
    return (nr & 0xFFFFFFFF) - (2**32 if nr & 0x80000000 else 0)
