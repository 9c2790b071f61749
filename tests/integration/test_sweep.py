"""The sweep at start: dead pools go, living ones stay, whichever cgroups they share."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isojob.cgroups import base, find


@pytest.fixture
def parent() -> Iterator[Path]:
    """A real cgroup to put pools' directories into."""
    driver = find()
    subtree = driver.create()
    yield subtree.directories[-1]
    subtree.release()
    subtree.remove()


def test_living_pool_is_left_alone(parent: Path) -> None:
    """A locked directory and its processes survive a sweep that sees only this hierarchy."""
    directory = parent / f"{base.PREFIX}1-0123abcd"
    (directory / "cell-0").mkdir(parents=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    base.sweep(parent, base.kill_processes)
    assert (directory / "cell-0").is_dir()
    os.close(lock)
    base.sweep(parent, base.kill_processes)
    assert not directory.exists()


def test_every_hierarchy_is_locked() -> None:
    """Each directory of a subtree carries a lock: sweepers look at one hierarchy at a time."""
    subtree = find().create()
    try:
        for directory in subtree.directories:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(fd)
    finally:
        subtree.release()
        subtree.remove()


def test_processes_of_a_dead_pool_end(parent: Path) -> None:
    """What still runs in an unlocked directory is killed and the directory removed."""
    directory = parent / f"{base.PREFIX}1-4567cdef"
    cell = directory / "cell-0"
    cell.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "600"])
    try:
        try:
            (cell / "cgroup.procs").write_text(str(process.pid))
        except OSError:
            # v2: a parent with controllers takes no process, and on v1 an empty cpuset takes none.
            process.kill()
        base.sweep(parent, base.kill_processes)
        assert process.wait(10) == -9
        assert not directory.exists()
    finally:
        process.kill()
        process.wait()


def test_foreign_names_are_left_alone(parent: Path) -> None:
    """A cgroup that merely begins like ours is somebody else's."""
    directory = parent / "isojob-web"
    (directory / "worker").mkdir(parents=True)
    base.sweep(parent, base.kill_processes)
    assert (directory / "worker").is_dir()
    (directory / "worker").rmdir()
    directory.rmdir()
