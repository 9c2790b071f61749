"""cgroups, one interface for v2 and v1.

`find()` tells what the host has, `Driver.create()` makes the pool's own subtree below the caller's
cgroup, and the rest are names for init and launcher to write and read: the knowledge of versions
stays here.
"""

from __future__ import annotations

from isojob.cgroups.base import CellFiles, Counters, Driver, Subtree
from isojob.cgroups.discovery import find, memory_ceiling

__all__ = ["CellFiles", "Counters", "Driver", "Subtree", "find", "memory_ceiling"]
