"""What one check found, and the cures that depend on where isojob runs."""

from __future__ import annotations

import os
from pathlib import Path

from isojob._models import Model

__all__ = ["Check", "cgroup_cure", "container_cure", "surroundings"]


class Check(Model, frozen=True):
    """One thing that was tried on this host.

    Attributes:
        section: The part of the sandbox it belongs to.
        name: What was tried.
        found: What came of it, for people.
        needed_for: What isojob does with it.
        ok: True: it works. False: it does not, and jobs with the default settings cannot run with
            every protection in force. None: it does not, and only what `needed_for` says is lost.
        cure: What would provide it: a command, a flag or a setting; empty where it works.
    """

    section: str
    name: str
    found: str
    needed_for: str
    ok: bool | None
    cure: str = ""


_NAMES = {
    "kubernetes": "a Kubernetes container",
    "docker": "a Docker container",
    "podman": "a Podman container",
    "lxc": "a system container",
    "systemd": "a host with systemd",
    "host": "a host without systemd",
}


def surroundings() -> tuple[str, str]:
    """Where we run: a key (``docker``, ``kubernetes``, ...), and words for people.

    A guess from what container engines leave in sight; it only picks the words of the cures.
    """
    key = "host"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        key = "kubernetes"
    elif Path("/.dockerenv").exists():
        key = "docker"
    elif Path("/run/.containerenv").exists():
        key = "podman"
    elif Path("/run/systemd/container").exists():
        key = "lxc"
    elif Path("/run/systemd/system").is_dir():
        key = "systemd"
    return key, _NAMES[key]


_CONTAINER_CURES = {
    "docker": "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined",
    "podman": "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL",
    "kubernetes": "in the pod hostUsers: false; in the container's securityContext procMount: "
    "Unmasked, seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}",
    "lxc": "allow nesting (incus config set NAME security.nesting=true; systemd-nspawn: "
    "--system-call-filter and an unmasked /proc)",
}
_CGROUP_CURES = {
    "docker": "docker run --cgroupns=private --security-opt writable-cgroups=true (Docker from "
    "2025 on), or --privileged",
    "podman": "podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup",
    "kubernetes": "a runtime that makes cgroups writable (containerd: cgroup_writable = true in "
    "its runtime's section; CRI-O: annotation io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw: "
    '"true"), or privileged: true',
}


def container_cure(otherwise: str) -> str:
    """How to let a container make namespaces; `otherwise` where we are in none we know."""
    return _CONTAINER_CURES.get(surroundings()[0], otherwise)


def cgroup_cure(otherwise: str, version: int = 2) -> str:
    """How to get a cgroup of one's own; `otherwise` where nothing better is known.

    Args:
        otherwise: What the cgroup code itself advises.
        version: No engine hands v1 cgroups out.
    """
    engine = _CGROUP_CURES.get(surroundings()[0])
    if engine is None or version == 1:
        return otherwise
    if os.geteuid() == 0:
        return engine
    return f"{engine}; and chown that cgroup to this user, or run as root"
