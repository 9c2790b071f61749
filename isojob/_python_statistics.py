"""What a Python pool tells of its templates."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from isojob._admission import PoolStatistics
from isojob._models import Model

__all__ = ["Memory", "PythonStatistics", "TemplateStatistics", "memory_of"]


class TemplateStatistics(Model, frozen=True):
    """One warm interpreter.

    Attributes:
        preload: Modules that it has imported.
        pid: Of its process, on the host.
        rss: Its resident memory, bytes; None: it cannot be read.
        pss: Of that its share: what n processes have in common counts an nth for each.
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

    resident: int
    share: int
    private: int


def memory_of(pid: int) -> Memory | None:
    """What the kernel says (proc_pid_smaps_rollup(5)); None: it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:] if ":" in line}
    private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return Memory(sizes.get("Rss", 0), sizes.get("Pss", 0), private)
