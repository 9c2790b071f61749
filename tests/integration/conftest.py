"""Integration tests run real jobs: as root or as an ordinary user in a delegated cgroup."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import PYTHON, SLOW, cgroup_version, settle
from leftovers import cgroups, children, descriptors, loops, mounts, temporary

from isojob import Mount, Sandbox, _run
from isojob.host.rootfs import block_devices


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test leaves no process, cgroup, mount, descriptor or file behind."""
    gc.collect()
    before = (children(), temporary(), loops())
    before_fds = descriptors()
    yield
    _run._close_pools()
    gc.collect()
    assert not settle(lambda: children() - before[0]), "processes are left"
    assert not settle(cgroups), "cgroups are left"
    assert not mounts(), "mounts are left"
    assert not settle(lambda: loops() - before[2]), "loop devices are left"
    # Others on this machine may use isojob, too: what they make goes.
    assert not settle(lambda: temporary() - before[1]), "files are left"

    def fds() -> dict[str, str]:
        return {fd: name for fd, name in descriptors().items() if before_fds.get(fd) != name}

    left = settle(fds, 1.0)
    assert not left, f"descriptors are left: {left}"


@pytest.fixture
def python() -> str:
    """An interpreter below /usr, which every cell sees."""
    if not os.path.exists(PYTHON):
        pytest.fail("these tests need /usr/bin/python3")
    return PYTHON


@pytest.fixture
def disk() -> Iterator[Sandbox]:
    """A sandbox with a writable directory of a block device at /disk."""
    directory = tempfile.mkdtemp(prefix="disk-", dir=os.environ.get("SCRATCH_DIR", "/var/tmp"))
    Path(directory).chmod(0o777)
    sandbox = Sandbox(mounts=(Mount.bind(directory, "/disk", read_only=False),))
    assert block_devices(sandbox), "these tests need a directory on a block device"
    yield sandbox
    shutil.rmtree(directory)


@pytest.fixture
def is_root() -> bool:
    """Whether cells get host ids of their own."""
    return os.geteuid() == 0


def pytest_report_header() -> str:
    """Says which of the environments this is."""
    return (
        f"isojob: kernel {os.uname().release}, cgroup v{cgroup_version()}, uid {os.geteuid()}, "
        f"python {sys.version.split()[0]}, slowness {SLOW}"
    )
