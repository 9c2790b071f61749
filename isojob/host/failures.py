"""A failed stage of the set-up, with what an operator can do about it."""

from __future__ import annotations

import errno
import os

from isojob.cgroups.base import ROOM
from isojob.errors import HostNotSupportedError, IsojobError, SandboxSetupError
from isojob.host import kernel
from isojob.wire import Failure

__all__ = ["CONTAINER", "to_exception"]

CONTAINER = (
    "in a container give it its own seccomp profile that allows clone, unshare and mount, and an "
    "unmasked /proc (docker run --security-opt seccomp=unconfined --security-opt "
    "systempaths=unconfined; Kubernetes: procMount: Unmasked); see docs/hosts.md"
)

_NO_NAMESPACES = (
    errno.EPERM,
    errno.EACCES,
    errno.ENOSPC,
    errno.EUSERS,
    errno.EINVAL,  # a kernel built without
    errno.ENOENT,
)


_TARGETS = {
    errno.EACCES: "a directory on the way there is closed to the job's user",
    errno.ENOENT: "a mount hides it, and has no such directory",
    errno.EROFS: "nothing can be made there: name what the root has, or something new at its top; "
    "a root from Root.directory or Root.layers can be writable",
    errno.ENOTDIR: "a directory is wanted, and there is a file, or a link, which is not followed",
    errno.EISDIR: "a file is to be mounted, and there is a directory",
    errno.ELOOP: "there is a link, which is not followed: name where it leads",
}
"""What is wrong with the place of a mount or of the working directory."""


def _user_namespaces() -> str:
    if kernel.sysctl("user/max_user_namespaces") == "0":
        return "sysctl user.max_user_namespaces=15000"
    if os.geteuid() != 0 and kernel.sysctl("kernel/unprivileged_userns_clone") == "0":
        return "sysctl kernel.unprivileged_userns_clone=1"
    if kernel.sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "load an AppArmor profile with `userns,` for this program, or sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return CONTAINER


def _want(stage: str, number: int) -> str:
    """What to raise where something has run out, or to name where a path is no good."""
    if number in (errno.EMFILE, errno.ENFILE):
        return "raise the hard limit of open files: ulimit -Hn, LimitNOFILE= of a systemd unit"
    if number == errno.EAGAIN and stage.startswith(("clone", "owner of", "start of")):
        return "raise pids.max of the cgroup around this process (TasksMax=), or RLIMIT_NPROC"
    if number in ROOM and (stage == "cgroup mkdir" or number == errno.ENOMEM):
        return ROOM[number]
    if number in _TARGETS and stage.startswith(("mkdir /", "mount target /", "bind /", "open /")):
        return _TARGETS[number]
    if number == errno.EOWNERDEAD:
        return (
            "the zygote could not take the request (no descriptor was free, or it was dying), or "
            "the cell's init was killed"
        )
    return ""


def to_exception(failure: Failure) -> IsojobError:
    """The exception for a stage that failed in zygote or init."""
    stage, number = failure.stage, failure.errno
    denied = number in (errno.EPERM, errno.EACCES)
    if (stage in ("user namespace", "uid_map") and number in _NO_NAMESPACES) or (
        stage in ("clone", "owner of the layers") and number in (errno.EPERM, errno.ENOSPC)
    ):
        return HostNotSupportedError(
            f"user namespaces cannot be made ({stage}: {os.strerror(number)})", _user_namespaces()
        )
    if stage in ("mount /proc", "proc of the template") and denied:
        return HostNotSupportedError(
            f"a cell cannot mount its own /proc ({os.strerror(number)}): the outer one is covered "
            "in part",
            CONTAINER,
        )
    if stage in ("make mounts private", "mount root tmpfs", "pivot_root", "mount namespace") and (
        denied
    ):
        return HostNotSupportedError(f"{stage}: {os.strerror(number)}", CONTAINER)
    if stage.startswith("dangerous mount"):
        return SandboxSetupError(
            stage,
            number,
            "a proc or cgroup file system of the host would be visible there: bind directories "
            "that have none below them",
        )
    if stage == "launcher" and number in (0, errno.ECHILD):
        return SandboxSetupError(
            stage,
            0,
            "it died before its job came: killed by a seccomp filter around this process, or for "
            "want of memory",
        )
    if stage == "seccomp listener thread" and number == errno.EAGAIN:
        return SandboxSetupError(
            stage, number, "this seccomp profile needs limits.processes of at least 2"
        )
    if stage == "map layer" and number in (errno.EINVAL, errno.EPERM):
        return HostNotSupportedError(
            f"a layer's file system does not let its files belong to jobs ({os.strerror(number)})",
            "keep the layers of a writable root on ext4, xfs or btrfs of the machine itself "
            "(EROFS: Linux 5.19, squashfs: 6.2, tmpfs: 6.3), or run as an ordinary user, who needs "
            "no mapped mounts",
        )
    if stage == "bind of the layers" and number == errno.EINVAL:
        return SandboxSetupError(
            stage,
            number,
            "something is mounted below a layer, which only root can leave out: unmount it, or "
            "copy the directory",
        )
    if stage == "overlay of the root" and number == errno.EINVAL:
        if os.geteuid() == 0 and kernel.release() < (5, 19):
            return HostNotSupportedError(
                "overlayfs does not take layers with mapped owners", "upgrade to Linux 5.19"
            )
        return SandboxSetupError(
            stage,
            number,
            "overlayfs refuses the layers: they lie on two overlays already, or fold case; see "
            "dmesg",
        )
    if stage.startswith("overlay") and number in (errno.ENODEV, errno.EPERM):
        return HostNotSupportedError(
            f"overlayfs cannot be mounted ({os.strerror(number)})", "modprobe overlay; as root once"
        )
    if detail := _want(stage, number):
        return SandboxSetupError(stage, number, detail)
    if number == errno.ENOSYS:
        return HostNotSupportedError(
            f"{stage}: the kernel, or a seccomp filter around us, lacks the system call",
            f"upgrade to Linux 5.14, or {CONTAINER}",
        )
    return SandboxSetupError(stage, number)
