"""Host uids for jobs: as root each pool claims a block that no account and no other pool has."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isojob.errors import HostNotSupportedError

if sys.platform != "win32":
    import fcntl
    import grp
    import pwd

__all__ = [
    "DEFAULT_RANGE",
    "IdBlock",
    "SubordinateIds",
    "check_not_root",
    "claim",
    "mapped",
    "subordinate",
]

# systemd's "UIDS-GIDS" assigns 0x70000000 and up to nobody (its own ranges end just below), and it
# is far above what login.defs gives to accounts and to subordinate ids.
DEFAULT_RANGE = range(0x70000000, 0x70000000 + (1 << 24))
LOCKS = Path("/run/isojob")


@dataclass(slots=True)
class IdBlock:
    """Uids and gids `first` to `first + count - 1`, ours while `lock` is open."""

    first: int
    count: int
    lock: int

    def release(self) -> None:
        """Gives the block back; the lock file stays, since unlinking a lock file is a race."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def claim(count: int, within: range = DEFAULT_RANGE) -> IdBlock:
    """Claims a block by flock(2) on a file named after it.

    Raises:
        HostNotSupportedError: No free block, or no place for the locks.
        OSError: No descriptor is free.
    """
    try:
        LOCKS.mkdir(mode=0o700, exist_ok=True)
        taken = sorted(_taken(within))
        # Multiples of `count`: ranges that begin elsewhere and overlap have the same locks.
        start = -(-within.start // count) * count
        for first in range(start, within.stop - count + 1, count):
            if any(start < first + count and first < stop for start, stop in taken):
                continue
            fd = os.open(
                LOCKS / f"uids-{first}-{count}",
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o600,
            )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    continue
                raise
            return IdBlock(first, count, fd)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        full = error.errno == errno.ENOSPC
        raise HostNotSupportedError(
            f"no lock for a block of uids can be taken in {LOCKS} ({error.strerror})",
            f"remove files from the file system of {LOCKS}"
            if full
            else f"make {LOCKS} writable for root (a tmpfs on /run in a container)",
        ) from error
    raise HostNotSupportedError(
        f"no free block of {count} uids in {within.start}-{within.stop - 1}",
        "give the pools another range (Pool(uid_range=...)), or close some pools",
    )


def mapped(within: range) -> bool:
    """Whether our user namespace has all these ids (user_namespaces(7))."""
    return all(_covers(Path("/proc/self") / file, within) for file in ("uid_map", "gid_map"))


def check_not_root() -> None:
    """With a single id the job runs as ours: that must not be uid 0 of the namespace around us.

    Raises:
        HostNotSupportedError: It is, as in ``unshare -r`` by root, or in a container whose root is
            the host's.
    """
    me = os.geteuid()
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, outside, count = (int(word) for word in line.split())
        if inside <= me < inside + count and outside + me - inside == 0:
            raise HostNotSupportedError(
                "the only uid to run jobs as would be root's",
                "start as an ordinary user, or as root with all uids mapped",
            )


def _covers(file: Path, within: range) -> bool:
    extents = [[int(word) for word in line.split()] for line in file.read_text().splitlines()]
    return any(
        inside <= within.start and within.stop <= inside + count for inside, _, count in extents
    )


def _taken(within: range) -> Iterator[tuple[int, int]]:
    """Ids in use by accounts, groups and subordinate ranges, as half-open intervals.

    A directory service may list thousands of accounts far below our range: only those in it count.
    """
    for user in pwd.getpwall():
        if user.pw_uid in within:
            yield user.pw_uid, user.pw_uid + 1
    for group in grp.getgrall():
        if group.gr_gid in within:
            yield group.gr_gid, group.gr_gid + 1
    for file in ("/etc/subuid", "/etc/subgid"):
        for _, start, length in _subordinate_lines(Path(file)):
            if start < within.stop and within.start < start + length:
                yield start, start + length


def _subordinate_lines(file: Path) -> Iterator[tuple[str, int, int]]:
    with suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.split(":")
            if len(words) == 3:
                with suppress(ValueError):
                    yield words[0], int(words[1]), int(words[2])


@dataclass(frozen=True, slots=True)
class SubordinateIds:
    """An ordinary user's subordinate range (subuid(5)), the same length for uids and gids."""

    uid: int
    gid: int
    count: int

    def some(self, count: int) -> int:
        """The first of so many, from 1, by chance: other pools of the user have the range, too."""
        return 1 + 2 * secrets.randbelow((self.count - count) // 2 + 1)


def subordinate() -> SubordinateIds | None:
    """The caller's subordinate ids, if it has some and newuidmap(1) can map them."""
    if not all(_set_uid_program(name) for name in ("newuidmap", "newgidmap")):
        return None
    me = os.getuid()
    names = {str(me)}
    with suppress(KeyError):
        names.add(pwd.getpwuid(me).pw_name)
    found = []
    for file in ("/etc/subuid", "/etc/subgid"):
        ranges = [
            (start, length)
            for name, start, length in _subordinate_lines(Path(file))
            if name in names
        ]
        if not ranges:
            return None
        found.append(max(ranges, key=lambda item: item[1]))
    (uid, uids), (gid, gids) = found
    count = min(uids, gids)
    return SubordinateIds(uid, gid, count) if count >= 2 else None


def _set_uid_program(name: str) -> bool:
    import shutil

    path = shutil.which(name)
    if path is None:
        return False
    mode = os.stat(path).st_mode
    if mode & 0o4000:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False
