"""Where the tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SLOW = int(os.environ.get("ISOJOB_TEST_SLOWNESS", "1"))
"""How many times slower than ordinary hardware this machine is (an emulated CPU)."""

PYTHON = "/usr/bin/python3"


def cgroup_version() -> int:
    """2 on a pure v2 host, else 1."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return 2 if len(lines) == 1 and lines[0].startswith("0::") else 1


def run_python(*lines: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own, for what would change the whole process."""
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )


def children_of(pid: int) -> list[int]:
    """Children of a process with one thread: of a zygote, the inits of its cells."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
