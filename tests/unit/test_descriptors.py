"""Descriptors that go to other processes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable

import pytest

from isojob._descriptors import sealed_memfd


def test_a_sealed_file_stays_as_it_is() -> None:
    """Whoever has it, its maker included, can read it, and nothing else."""
    data = os.urandom(3 * mmap.PAGESIZE)
    fd = sealed_memfd("isojob-test", data)
    try:
        attempts: list[Callable[[], object]] = [
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.pwrite(fd, b"x", len(data)),
            lambda: os.ftruncate(fd, 1),
            lambda: os.ftruncate(fd, 1 << 20),
            lambda: os.posix_fallocate(fd, 0, 1 << 20),
            lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ]
        for attempt in attempts:
            with pytest.raises(PermissionError) as refused:
                attempt()
            assert refused.value.errno in (errno.EPERM, errno.EACCES)
        assert os.pread(fd, len(data) + 1, 0) == data
        # Also by who opens it anew.
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            with pytest.raises(PermissionError):
                os.pwrite(again, b"x", 0)
        finally:
            os.close(again)
    finally:
        os.close(fd)
