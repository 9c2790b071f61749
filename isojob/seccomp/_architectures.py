"""The architectures that filters can be compiled for."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from isojob.errors import HostNotSupportedError

__all__ = ["X32_BIT", "Architecture", "architecture"]

# __X32_SYSCALL_BIT of arch/x86/include/uapi/asm/unistd.h.
X32_BIT = 0x40000000


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture, little-endian and with 64-bit registers.

    Attributes:
        name: As platform.machine() has it.
        audit: What seccomp_data.arch says: an AUDIT_ARCH constant of linux/audit.h, which is also
            libseccomp's token.
        profile_name: As ``includes.arches`` of Docker's and Podman's profiles has it.
        x32: Whether calls numbered from `X32_BIT` on are another ABI under the same `audit`.
    """

    name: str
    audit: int
    profile_name: str
    x32: bool = False


_KNOWN = {
    known.name: known
    for known in (
        Architecture("x86_64", 0xC000003E, "amd64", x32=True),
        Architecture("aarch64", 0xC00000B7, "arm64"),
    )
}
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}


def architecture(name: str | None = None) -> Architecture:
    """Looks an architecture up.

    Args:
        name: As ``uname -m`` has it; the machine's own by default.

    Raises:
        HostNotSupportedError: isojob cannot write filters for it.
    """
    wanted = platform.machine() if name is None else name
    wanted = _ALIASES.get(wanted.lower(), wanted)
    known = _KNOWN.get(wanted)
    if known is None or (name is None and sys.maxsize < 2**32):
        bits = "32-bit Python on " if sys.maxsize < 2**32 else ""
        raise HostNotSupportedError(
            f"seccomp filters for {bits}{wanted}",
            f"use a 64-bit Python on one of {', '.join(_KNOWN)}",
        )
    return known
