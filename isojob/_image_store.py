"""The directory that unpacked images are in: a lock, and what is unfinished or on its way out.

What is cleaned is known by names that only we give: the directory may hold what is somebody else's.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["default_store", "locked", "remove", "workplace"]

_PREFIX = ".isojob-"
_OURS = re.compile(r"\.isojob-[0-9a-f]{64}-[0-9a-z_]{8}")


def default_store() -> Path:
    """Where images are unpacked: ``$XDG_CACHE_HOME/isojob/images``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "isojob" / "images"


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Nobody else imports or prunes meanwhile; what such a one left when it was killed is gone."""
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for name in os.listdir(fd):
            if _OURS.fullmatch(name):
                shutil.rmtree(store / name, ignore_errors=True)
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a fork of ours may have a copy
        os.close(fd)


def workplace(target: Path) -> Path:
    """A directory to make an image in, beside its own."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{target.name}-", dir=target.parent))


def remove(image: Path) -> None:
    """Removes an image's directory: renamed first, since half of one must not look like one."""
    if image.is_symlink():  # what it leads to is in another store, or none
        image.unlink()
        return
    doomed = image.with_name(f"{_PREFIX}{image.name}-{secrets.token_hex(4)}")
    image.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
