"""What is said to hold for jobs, where something is missing and that is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from isojob import HostNotSupportedError, Sandbox
from isojob.cgroups.v2 import V2
from isojob.host import posture as module
from isojob.host.posture import find_driver, posture

ALL = "memory pids cpu cpuset io"
REPLACED = {"memory_limit", "process_limit"}


def missing(allowed: Sequence[str], devices: tuple[str, ...] = ("8:0",)) -> tuple[str, set[str]]:
    """Which cgroups are used, and what is told to be missing."""
    sandbox = Sandbox(allow_missing=frozenset(allowed))
    driver = find_driver(sandbox.allow_missing)
    told = posture(sandbox, driver, "root", devices)
    return told.cgroup, set(told.missing)


@pytest.fixture
def controllers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a cgroup v2 that is delegated to us."""
    monkeypatch.setattr(module, "find", lambda: V2(tmp_path))
    monkeypatch.setattr(module, "_usable", lambda _: True)
    return tmp_path / "cgroup.controllers"


def test_nothing_is_missing(controllers: Path) -> None:
    """What may be missing is not told where it is there."""
    controllers.write_text(ALL)
    assert missing(["cgroup", "cpus"]) == ("v2", set())


@pytest.mark.parametrize("there", ["pids cpu", "memory cpu"])
def test_cgroups_in_part(controllers: Path, there: str) -> None:
    """Where cgroups may be missing, and what matters of them is, the rest is not trusted.

    Without any, resource limits are in their place; with some, nothing would be.
    """
    controllers.write_text(there)
    with pytest.raises(HostNotSupportedError):
        find_driver(frozenset())
    used, told = missing(["cgroup"])
    assert used == "none"
    assert told >= {"cgroup", *REPLACED}
    # By name it is accepted that nothing is there instead.
    assert missing(sorted(REPLACED)) == ("v2", REPLACED - {_of(there)})


def _of(there: str) -> str:
    return {"pids": "process_limit", "memory": "memory_limit"}[there.split(maxsplit=1)[0]]


def test_swap(controllers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who accepts that cgroups are missing accepts this, and is told."""
    controllers.write_text(ALL)
    (controllers.parent / "memory.max").touch()
    monkeypatch.setattr("isojob.cgroups.v2.host_has_swap", lambda: True)
    with pytest.raises(HostNotSupportedError, match="swap_limit"):
        find_driver(frozenset())
    assert missing(["cgroup"]) == missing(["swap_limit"]) == ("v2", {"swap_limit"})


def test_no_disk(controllers: Path) -> None:
    """Limits of disk I/O that are for no disk are missing like those of no controller."""
    controllers.write_text(ALL)
    assert missing(["io_limit"]) == ("v2", set())
    assert missing(["io_limit"], ()) == ("v2", {"io_limit"})
    controllers.write_text("memory pids cpu cpuset")
    assert missing(["io_limit"]) == missing(["io_limit"], ()) == ("v2", {"io_limit"})
