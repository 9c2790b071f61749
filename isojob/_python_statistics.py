"""What a Python pool tells of its templates."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

from isojob._admission import PoolStatistics
from isojob._models import Model

__all__ = ["Memory", "PythonStatistics", "TemplateStatistics", "memory_of", "own_memory"]


class TemplateStatistics(Model, frozen=True):
    """One warm interpreter.

    Attributes:
        preload: Modules that it has imported.
        pid: Of its process, on the host.
        rss: Its resident memory, bytes; None: it cannot be read.
        pss: Of that its share: what n processes have in common counts an nth for each. None: the
            kernel does not tell us (as root it takes CAP_SYS_PTRACE).
        jobs: That run on it now.
    """

    preload: tuple[str, ...]
    pid: int
    rss: int | None
    pss: int | None
    jobs: int


class PythonStatistics(PoolStatistics, frozen=True):
    """A snapshot of a Python pool.

    Attributes:
        templates: The first, and its branches, the longest unused first.
    """

    templates: tuple[TemplateStatistics, ...] = ()


class Memory(NamedTuple):
    """Of a process, bytes: all that is resident, its share of that, and what nobody shares."""

    resident: int | None = None
    share: int | None = None
    private: int | None = None


def _rollup(pid: int) -> str:
    return Path(f"/proc/{pid}/smaps_rollup").read_text()


def memory_of(pid: int) -> Memory:
    """What the kernel says (proc_pid_smaps_rollup(5)); None: it cannot be read."""
    try:
        lines = _rollup(pid).splitlines()
    except OSError:
        return Memory(resident=_pages(pid, 1))
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:] if ":" in line}
    if not sizes:
        return Memory()
    private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return Memory(sizes.get("Rss", 0), sizes.get("Pss", 0), private)


def own_memory(pid: int, parent: int) -> int | None:
    """What a fork that has no forks yet has beyond its parent, bytes; None: nobody tells."""
    if (private := memory_of(pid).private) is not None:
        return private
    mine, before = _anonymous(pid), _anonymous(parent)
    return None if mine is None or before is None else max(0, mine - before)


def _anonymous(pid: int) -> int | None:
    resident, shared = _pages(pid, 1), _pages(pid, 2)
    return None if resident is None or shared is None else resident - shared


def _pages(pid: int, field: int) -> int | None:
    """Of proc_pid_statm(5), which anybody may read: 1 resident, 2 of that shared; bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[field]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return None
