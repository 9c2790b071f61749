"""Where the tests run."""

from __future__ import annotations

import os
from pathlib import Path

SLOW = int(os.environ.get("ISOJOB_TEST_SLOWNESS", "1"))
"""How many times slower than ordinary hardware this machine is (an emulated CPU)."""

PYTHON = "/usr/bin/python3"


def cgroup_version() -> int:
    """2 on a pure v2 host, else 1."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return 2 if len(lines) == 1 and lines[0].startswith("0::") else 1
