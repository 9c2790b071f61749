"""What v2 and v1 have in common."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from isojob.errors import IsojobError, SandboxSetupError
from isojob.limits import Limits
from isojob.wire_result import UsualResult

if sys.platform != "win32":
    import fcntl

__all__ = [
    "NUMBER",
    "PREFIX",
    "ROOM",
    "CellFiles",
    "Counters",
    "Driver",
    "EvidenceFile",
    "Subtree",
    "exhausted",
    "flat",
    "host_has_swap",
    "known",
    "table",
]

PREFIX = "isojob-"
_NAME = re.compile(r"isojob-\d+-[0-9a-f]{8}")
ROOM = {
    errno.EAGAIN: "raise cgroup.max.descendants or cgroup.max.depth above this process",
    errno.ENOMEM: "memory ran out here: raise memory.max of the cgroup around this process",
}
"""What to raise where no cgroup can be made, by errno."""
LEAF = "isojob-host"
"""v2: where the processes of a delegated cgroup go, so that its children may have controllers."""


@dataclass(frozen=True, slots=True)
class Write:
    """A value for one file of a cell's cgroup."""

    hierarchy: int
    file: str
    value: bytes
    optional: bool = False


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """A file that init reads at the end.

    Attributes:
        hierarchy: Whose it is.
        name: Of the file.
        counters: Its numbers: each in the line that begins with the first string, behind the
            second one. ``("", "")``: the file is the number.
        raw: Whether it is wanted whole besides.
    """

    hierarchy: int
    name: str
    counters: tuple[tuple[str, str], ...] = ()
    raw: bool = False


def flat(*keys: str) -> tuple[tuple[str, str], ...]:
    """Counters of the kernel's flat-keyed format, "KEY VALUE" lines (cgroup-v2.rst)."""
    return tuple((f"{key} ", "") for key in keys)


NUMBER = (("", ""),)
"""The counter of a file that is one number."""


@dataclass(frozen=True, slots=True)
class CellFiles:
    """Which files of a cell's cgroup init and launcher use; (hierarchy, name) each.

    Attributes:
        limits: Written by the launcher when a job differs from what its cell was made with.
        evidence: Read by init at the end; their counters are numbered through.
        cpu: Which counter is the CPU time, and its unit in nanoseconds.
        kill: v2's ``cgroup.kill``.
        oom: v1's memory hierarchy, for an OOM eventfd, and which counter counts OOM kills.
        into: Whether the launcher is born in hierarchy 0 (CLONE_INTO_CGROUP).
    """

    limits: tuple[tuple[int, str], ...] = ()
    evidence: tuple[EvidenceFile, ...] = ()
    cpu: tuple[int, int] | None = None
    kill: tuple[int, str] | None = None
    oom: tuple[int, int] | None = None
    into: bool = False


@dataclass(slots=True)
class Counters:
    """The evidence, understood. None: the host cannot tell."""

    memory_peak: int | None = None
    memory_events: dict[str, int] | None = None
    pids_peak: int | None = None
    pids_events_max: int | None = None
    cpu_stat: dict[str, int] | None = None
    user_ns: int | None = None
    system_ns: int | None = None
    io: dict[str, dict[str, int]] | None = None
    pressure: dict[str, dict[str, float]] | None = None


def known(value: int) -> int | None:
    """A counter, or None if init could not tell."""
    return None if value < 0 else value


def number(text: str) -> int | None:
    """A count of the kernel's, 64 bits at most; None: it is none."""
    return int(text) if text.isdecimal() and len(text) <= 20 else None


def table(keys: Sequence[str], values: Sequence[int]) -> dict[str, int] | None:
    """Counters by name, without those that this kernel lacks; None if it has none of them."""
    return {key: value for key, value in zip(keys, values, strict=True) if value >= 0} or None


def host_has_swap() -> bool:
    """Whether memory can be swapped out here, /proc/swaps; True where nobody can tell."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return True


@dataclass(slots=True)
class Subtree:
    """The pool's own directory, one in each hierarchy, locked while its zygote or we live.

    Both hold the lock: after the death of the zygote alone, jobs may still finish and report, and
    a sweeper must not end them.
    """

    directories: tuple[Path, ...]
    parents: tuple[int, ...]
    bases: tuple[int, ...]
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        """The directory's name in every hierarchy."""
        return self.directories[0].name

    def release(self) -> None:
        """Closes our descriptors; copies of them in the zygote keep the lock."""
        self._stack.close()

    def remove(self) -> None:
        """Takes the directories away, if the zygote could not: idempotent."""
        for directory in self.directories:
            lift_quotas(directory)
        for directory in self.directories:
            remove_tree(directory, kill_processes)


@contextmanager
def unless_whole(subtree: Subtree) -> Iterator[None]:
    """Takes it away again if what makes it whole fails: nobody else knows of it yet."""
    try:
        yield
    except BaseException:
        subtree.release()
        subtree.remove()
        raise


def exhausted(error: OSError) -> IsojobError | None:
    """What to raise where there is no room for a pool's cgroup; None: that is not it.

    Raises:
        OSError: As it is, where it is descriptors that have run out.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    if error.errno not in ROOM:
        return None
    return SandboxSetupError("cgroup mkdir", error.errno, f"{error.filename}: {ROOM[error.errno]}")


def make_subtree(parents: Mapping[int, Path]) -> Subtree:
    """Makes and locks a fresh directory below each parent.

    Each is locked: on v1 a sweeper may share our cgroup in one hierarchy and not in another. It may
    win the moment between mkdir and flock and remove the still empty directory: then flock succeeds
    on a dead inode, the check sees it, and another name is tried.

    Raises:
        OSError: mkdir, open or flock failed.
    """
    for _ in range(16):
        name = f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
        stack = ExitStack()
        try:
            made, parent_fds, base_fds = [], [], []
            for parent in parents.values():
                parent_fd = _open_directory(parent, stack)
                directory = parent / name
                directory.mkdir(0o755)
                stack.callback(_remove_unless_kept, directory, kept := _Kept())
                base_fd = _open_directory(directory, stack)
                fcntl.flock(base_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                made.append((directory, kept))
                parent_fds.append(parent_fd)
                base_fds.append(base_fd)
            if not all(directory.exists() for directory, _ in made):
                raise FileExistsError(errno.EEXIST, "swept away")
        except (FileExistsError, FileNotFoundError, BlockingIOError) as error:
            stack.close()
            if isinstance(error, BlockingIOError) and error.filename is not None:
                raise  # mkdir, not flock: cgroup.max.descendants or cgroup.max.depth
            continue
        except BaseException:
            stack.close()
            raise
        for _, kept in made:
            kept.value = True
        directories = tuple(directory for directory, _ in made)
        return Subtree(directories, tuple(parent_fds), tuple(base_fds), stack)
    raise OSError(errno.EEXIST, "no cgroup directory of one's own could be made")


@dataclass(slots=True)
class _Kept:
    value: bool = False


def _remove_unless_kept(directory: Path, kept: _Kept) -> None:
    if not kept.value:
        with suppress(OSError):
            directory.rmdir()


def _open_directory(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def sweep(parent: Path, kill: Callable[[Path], None]) -> None:
    """Removes what pools left whose zygotes are dead: those whose lock nobody holds.

    Args:
        parent: Where the pools' directories are.
        kill: Ends every process in one cgroup (not below it).
    """
    with suppress(OSError):
        for entry in os.scandir(parent):
            if not _NAME.fullmatch(entry.name):
                continue  # somebody else's, though it may begin like ours
            # No lock, no sweep: what cannot be opened or locked may be somebody's living pool.
            with suppress(OSError):
                fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lift_quotas(Path(entry.path))
                    remove_tree(Path(entry.path), kill)
                finally:
                    fcntl.flock(fd, fcntl.LOCK_UN)  # a fork of ours may have a copy
                    os.close(fd)


def lift_quotas(directory: Path) -> None:
    """Gives a pool's cells all of the CPU: throttled processes die in the next period only."""
    with suppress(OSError):
        for entry in os.scandir(directory):
            for name, value in (("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")):
                with suppress(OSError), open(f"{entry.path}/{name}", "r+b", 0) as file:
                    file.write(value.encode())


def remove_tree(directory: Path, kill: Callable[[Path], None] | None = None) -> None:
    """Removes a pool's directory and the cells in it; bounded, and silent where it cannot."""
    deadline = time.monotonic() + 2
    while True:
        with suppress(OSError):
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    if kill is not None:
                        kill(Path(entry.path))
                    with suppress(OSError):
                        os.rmdir(entry.path)
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        else:
            return


def kill_processes(directory: Path) -> None:
    """Ends the processes of one cgroup: ``cgroup.kill`` (5.14), or one by one on v1."""
    import signal  # only a sweep that finds something needs it

    try:
        (directory / "cgroup.kill").write_text("1")
    except OSError:
        with suppress(OSError):
            for line in (directory / "cgroup.procs").read_text().split():
                if (pid := int(line)) > 0:  # 0: in another pid namespace; to kill(2), our group
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)


class Driver(ABC):
    """One kind of cgroups, as found on this host.

    Attributes:
        version: 2, 1, or 0 where the caller accepted to have none.
        missing: Protections that these cgroups cannot give (names of `Sandbox.allow_missing`),
            each with its cure.
        kills: Which counters count OOM kills.
    """

    version: int = 0
    missing: dict[str, str]
    files: CellFiles
    kills: tuple[int, ...] = ()

    @cached_property
    def usual(self) -> UsualResult:
        """How the report of most jobs in these cgroups looks."""
        return UsualResult(sum(len(file.counters) for file in self.files.evidence))

    @abstractmethod
    def create(self) -> Subtree:
        """Sweeps what dead pools left, then makes a new subtree.

        Raises:
            HostNotSupportedError: The caller's cgroup cannot be divided.
        """

    def processors(self) -> str:
        """Those that a cell's cpuset can have, as a list; with the controller only."""
        raise NotImplementedError

    @abstractmethod
    def cell(self, limits: Limits, devices: tuple[str, ...]) -> tuple[int, tuple[Write, ...]]:
        """What a cell of these limits is made with: hierarchies (bit mask) and values."""

    def lift(self, limits: Limits) -> Write | None:
        """What ends the CPU quota of such a cell when its job is killed; None: it has none.

        A process over its quota runs again in the next period, and only then can die.
        """
        return None

    @abstractmethod
    def job(self, limits: Limits, parked: Limits) -> tuple[tuple[int, bytes], ...]:
        """What the launcher writes, in order, for a job in a cell parked with other limits.

        Returns:
            Pairs of an index into `files.limits` and a value.
        """

    @abstractmethod
    def counters(self, values: Sequence[int], files: Mapping[int, bytes]) -> Counters:
        """What the evidence says.

        Args:
            values: The counters of `files.evidence`, in order; negative: unknown.
            files: The raw ones by their index, unless empty.
        """
