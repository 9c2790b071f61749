"""Is this a host at all: Linux, new enough."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from isojob.errors import HostNotSupportedError

__all__ = ["MINIMUM", "check", "release", "sysctl"]

MINIMUM = (5, 14)
"""cgroup.kill, RLIMIT_NPROC per user namespace; mount_setattr came with 5.12, openat2 with 5.6."""


def release() -> tuple[int, int]:
    """Major and minor version of the running kernel (uname(2))."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def sysctl(name: str) -> str:
    """A setting below /proc/sys; empty where this kernel has none."""
    try:
        return (Path("/proc/sys") / name).read_text().strip()
    except OSError:
        return ""


def check() -> None:
    """Refuses hosts on which nothing of isojob can run.

    Raises:
        HostNotSupportedError: Not Linux, or a kernel older than `MINIMUM`.
    """
    if not sys.platform.startswith("linux"):
        raise HostNotSupportedError(
            f"isojob runs jobs on Linux only, this is {sys.platform}",
            "run it in WSL2, a Linux virtual machine or a Linux container",
        )
    if release() < MINIMUM:
        raise HostNotSupportedError(
            f"kernel {os.uname().release} is older than {MINIMUM[0]}.{MINIMUM[1]}",
            "upgrade the kernel",
        )
