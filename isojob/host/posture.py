"""Which protections hold here: what is missing is refused unless the caller allowed it by name."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet

from isojob.cgroups import Driver, find
from isojob.cgroups.discovery import NoCgroups
from isojob.errors import HostNotSupportedError
from isojob.limits import Limits, processors
from isojob.result import Posture
from isojob.sandbox import Sandbox
from isojob.seccomp import CompiledProfile

__all__ = ["check_always", "check_limits", "find_driver", "find_filter", "posture"]

NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts", "cgroup")
# Without these every job is less than it says; the others matter to jobs that ask for them.
_ALWAYS = ("cgroup", "memory_limit", "swap_limit", "process_limit", "cpu_accounting")
# By resource limits of each process, where there are no cgroups (`CellSpec`).
_REPLACED = ("memory_limit", "process_limit", "cpu_accounting")
_LIMITS = {
    "cpus": ("cpus",),
    "cpuset": ("cpuset",),
    "io_limit": ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops"),
}


def find_driver(allowed: AbstractSet[str]) -> Driver:
    """The host's cgroups.

    Raises:
        HostNotSupportedError: A protection is missing that `allowed` does not name.
    """
    try:
        driver = find()
    except HostNotSupportedError as error:
        driver = NoCgroups(error.missing, error.cure)
    if driver.version and "cgroup" in allowed:
        lost = [name for name in _REPLACED if name in driver.missing and name not in allowed]
        if lost:  # then with what there is without cgroups, which is more than nothing
            driver = NoCgroups(f"its cgroups lack {lost[0]}", driver.missing[lost[0]])
        elif not _usable(driver):
            driver = NoCgroups("its own cgroup is not delegated to it", "delegate a cgroup")
    check_always(driver, allowed)
    return driver


def check_always(driver: Driver, allowed: AbstractSet[str]) -> None:
    """Refuses cgroups without which every job is less than it says.

    Raises:
        HostNotSupportedError: A protection is missing that `allowed` does not name.
    """
    for name in _ALWAYS:
        if name in driver.missing and name not in allowed and "cgroup" not in allowed:
            reason = driver.reason if isinstance(driver, NoCgroups) else "its cgroups lack it"
            raise HostNotSupportedError(
                f"this host cannot give {name}: {reason}",
                f"{driver.missing[name]}; or accept it: Sandbox(allow_missing={{{name!r}}})",
            )


def find_filter(sandbox: Sandbox) -> CompiledProfile | None:
    """The filter of the sandbox's jobs; None: this host cannot make one, and that is accepted.

    Raises:
        HostNotSupportedError: It cannot, and that is not accepted.
        ProfileError: The profile asks for what cannot be done.
    """
    try:
        return sandbox.seccomp.compile()
    except HostNotSupportedError as error:
        if "seccomp" in sandbox.allow_missing:
            return None
        raise HostNotSupportedError(
            f"this host cannot give seccomp: {error.missing}",
            f"{error.cure}; or accept it: Sandbox(allow_missing={{'seccomp'}})",
        ) from error


def _usable(driver: Driver) -> bool:
    try:
        subtree = driver.create()
    except HostNotSupportedError:
        return False
    subtree.release()
    subtree.remove()
    return True


MAX_WRITES = 256
"""Into the cgroups of one cell: MAX_CG_WRITES of native/zygote.h."""


def check_limits(
    driver: Driver,
    limits: Limits,
    devices: tuple[str, ...] | None,
    allowed: AbstractSet[str],
    called: str = "limits",
) -> None:
    """Refuses limits that these cgroups cannot enforce.

    Args:
        driver: The cgroups.
        limits: What is asked of them.
        devices: Block devices behind what is bound in; None: disk I/O does not count.
        allowed: What may be missing.
        called: What the caller knows the limits as.

    Raises:
        HostNotSupportedError: Names the protection and its cure.
        ValueError: A processor of `Limits.cpuset` is not there.
    """
    if limits.cpuset is not None and "cpuset" not in driver.missing:
        # v1 refuses it with ERANGE, EINVAL or EACCES; v2 takes it, and may run the job elsewhere.
        there = driver.processors()
        if not processors(limits.cpuset) <= processors(there):
            raise ValueError(f"{called}.cpuset: {limits.cpuset!r}: of processors there are {there}")
    for name, attributes in _LIMITS.items():
        if all(getattr(limits, attribute) is None for attribute in attributes) or name in allowed:
            continue
        if name == "io_limit" and devices is None:
            continue
        if name in driver.missing:
            raise HostNotSupportedError(
                f"{called}.{attributes[0]}: this host cannot give {name}",
                f"{driver.missing[name]}; or accept it: Sandbox(allow_missing={{{name!r}}})",
            )
        if name == "io_limit" and not devices:
            raise HostNotSupportedError(
                "disk I/O limits: no block device is behind the bound directories",
                "bind a directory of a local disk, or accept it: "
                "Sandbox(allow_missing={'io_limit'})",
            )
    if devices is not None and len(driver.cell(limits, devices)[1]) > MAX_WRITES:
        raise HostNotSupportedError(
            f"disk I/O limits: {len(devices)} disks are behind the bound directories",
            "bind fewer of them",
        )


def posture(sandbox: Sandbox, driver: Driver, who: str, devices: tuple[str, ...]) -> Posture:
    """What holds for every job of a pool.

    Args:
        sandbox: Its.
        driver: Its cgroups.
        who: As whom its cells get their ids: `privilege`.
        devices: Block devices behind what is bound in.
    """
    notes = []
    if who == "user":
        notes.append("one host uid: every cell runs as the caller's own")
        if len(os.getgroups()) > 1:
            notes.append("the caller's supplementary groups cannot be dropped with a single id")
    allowed = sandbox.allow_missing
    missing = [
        name
        for name in driver.missing
        if name in allowed or ("cgroup" in allowed and name in _ALWAYS)
    ]
    if "cgroup" in driver.missing:
        missing = list(driver.missing)
    elif "io_limit" in allowed and "io_limit" not in missing and not devices:
        missing.append("io_limit")
    filtered = find_filter(sandbox) is not None
    if not filtered:
        missing.append("seccomp")
    return Posture(
        cgroup="none" if driver.version == 0 else "v2" if driver.version == 2 else "v1",
        privilege="root" if who == "root" else "user" if who == "user" else "user+ranges",
        kernel=os.uname().release,
        namespaces=NAMESPACES,
        seccomp=sandbox.seccomp.name if filtered else "none",
        missing=tuple(missing),
        notes=tuple(notes),
    )
