"""What a warm pool shows of an interpreter, and what it does not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from environment import run_python

from isojob import CommandNotExecutableError, CommandNotFoundError, Root
from isojob._interpreter import Interpreter, _follow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="paths of Linux")


def tree(path: Path) -> Path:
    """Something that looks like an installed interpreter."""
    (path / "bin").mkdir(parents=True)
    (path / "lib/python3.12").mkdir(parents=True)
    (path / "lib/python3.12/os.py").touch()
    (path / "bin/python3.12").touch()
    (path / "bin/python3").symlink_to("python3.12")
    return path


def test_links_from_elsewhere_are_followed(tmp_path: Path) -> None:
    """A link in ~/.local/bin shows jobs the interpreter, and nothing of ~/.local."""
    real = tree(tmp_path / "home/.local/share/uv/python/cpython-3.12")
    local = tmp_path / "home/.local/bin"
    local.mkdir()
    (local / "python3.12").symlink_to(real / "bin/python3.12")
    chosen, homes = _follow(str(local / "python3.12"))
    assert chosen == str(real / "bin/python3.12")
    assert set(homes) == {str(real)}


def test_virtual_environments_keep_their_path(tmp_path: Path) -> None:
    """Else the interpreter would not find its packages; its base is shown besides."""
    real = tree(tmp_path / "opt/python")
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    (venv / "bin/python").symlink_to(real / "bin/python3")
    chosen, homes = _follow(str(venv / "bin/python"))
    assert chosen == str(venv / "bin/python")
    assert set(homes) == {str(venv), str(real)}


def test_mounts_below_the_toolchain_are_none() -> None:
    """What the default root shows is not bound again; nested prefixes are bound once."""
    system = Interpreter("/usr/bin/python3", ("/usr", "/usr/local"), (3, 11))
    assert system.mounts(Root.host()) == ()
    assert [m.target for m in system.mounts(Root.directory("/srv/root"))] == ["/usr"]
    nested = Interpreter("/x/v/bin/python", ("/x/v", "/x", "/y"), (3, 11))
    assert [m.target for m in nested.mounts(Root.host())] == ["/x", "/y"]


def test_a_home_is_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that lives right in a home would show all of it."""
    home = tree(tmp_path / "home")
    (home / "bin/python3.12").unlink()
    (home / "bin/python3.12").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(CommandNotExecutableError):
        Interpreter.find(home / "bin/python3.12")


def test_the_running_one(tmp_path: Path) -> None:
    """By default; and what is no Python is said to be none."""
    found = Interpreter.find()
    assert found.version == sys.version_info[:2]
    assert sys.base_prefix in found.prefixes or sys.prefix in found.prefixes
    with pytest.raises(CommandNotFoundError):
        Interpreter.find(tmp_path / "python")


def test_reserved_memory_is_not_looked_at() -> None:
    """What a preload reserves and never touches, 16 TiB of it, has no part in the rehearsal."""
    done = run_python(
        "import mmap, os, resource, runpy, sys",
        "from importlib.resources import files",
        "runner = runpy.run_path(str(files('isojob').joinpath('warm', 'runner.py')))",
        "private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE",
        "reserved = mmap.mmap(-1, 1 << 44, private)",
        "resource.setrlimit(resource.RLIMIT_AS, ((1 << 44) + (1 << 32), resource.RLIM_INFINITY))",
        "ranges = runner['_pages'](os.getpid())",
        "assert ranges and sum(ranges[1::3]) < 1 << 32, ranges",
    )
    assert done.returncode == 0, done.stderr


def test_the_rehearsal_is_exact() -> None:
    """It tells the pages that a job has written to, and none that the template has meanwhile."""
    done = run_python(
        "import ctypes, mmap, runpy, sys",
        "from importlib.resources import files",
        "runner = runpy.run_path(str(files('isojob').joinpath('warm', 'runner.py')))",
        "inside = runner['_rehearse'].__globals__",
        "size, told = mmap.PAGESIZE, set()",
        "area = sys.area = mmap.mmap(-1, 8 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
        "area[:] = b'x' * len(area)",
        "start = ctypes.addressof(ctypes.c_char.from_buffer(area))",
        "find = inside['_pages']",
        "def find_late(pid):",
        "    area[5 * size] = 1",
        "    return find(pid)",
        "class Native:",
        "    def isojob_warm_hot(self, at, n):",
        "        words = (ctypes.c_uint64 * (3 * n)).from_address(at.value)",
        "        for low, length, _ in zip(words[::3], words[1::3], words[2::3], strict=True):",
        "            told.update(range(low, low + length, size))",
        "    def isojob_warm_forget(self): pass",
        "    def fflush(self, stream): pass",
        "inside['_pages'] = find_late",
        "inside['_SAMPLE'] = b'import sys; sys.area[3 * %d] = 1' % size",
        "job = inside['_Job']()",
        "job.native = Native()",
        "inside['_rehearse'](job.native, job)",
        "assert [page for page in range(8) if start + page * size in told] == [3], told",
    )
    assert done.returncode == 0, done.stderr


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_shims_choose_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the caller's shell, but for what would change the interpreter itself."""
    check = '[ "$CHOICE" = mine ] && [ -z "$PYTHONHOME$LD_LIBRARY_PATH" ] || exit 9'
    shim = script(tmp_path / "python", f'{check}\nexec "{sys.executable}" "$@"')
    monkeypatch.setenv("CHOICE", "mine")
    monkeypatch.setenv("PYTHONHOME", "/nonsense")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonsense")
    assert Interpreter.find(shim).version == sys.version_info[:2]


def test_shims_that_hang_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they have started ends with them."""
    note, alive = tmp_path / "pid", tmp_path / "alive"
    os.mkfifo(alive)
    shim = script(tmp_path / "python", f"sleep 600 3>'{alive}' & echo $! >'{note}'; wait")
    monkeypatch.setattr("isojob._interpreter._SECONDS", 1.0)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(CommandNotExecutableError, match="did not say within 1 s"):
            Interpreter.find(shim)
        os.set_blocking(reader, True)
        assert int(note.read_text()) and os.read(reader, 1) == b""  # nobody holds the other end
    finally:
        os.close(reader)


def test_users_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry in passwd, and no HOME."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    assert Interpreter.find(sys.executable).version == sys.version_info[:2]
